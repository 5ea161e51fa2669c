//! A small version of Bookinfo's four services: they call each other by service name, and a page names its parts
//! that could not be fetched, as the originals do.

#![allow(missing_docs, reason = "a program of the demo")]

use std::env;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::Duration;

const USAGE: &str = "usage: bookinfo productpage|details|reviews-v1|reviews-v2|reviews-v3|ratings";
const PORT: u16 = 9080;
/// How long a service waits for another one.
const PATIENCE: Duration = Duration::from_secs(3);

fn main() -> io::Result<()> {
    let role = env::args().nth(1).unwrap_or_default();
    let answer: fn(&str) -> Answer = match role.as_str() {
        "productpage" => productpage,
        "details" => details,
        "reviews-v1" => |path| reviews(path, "v1", None),
        "reviews-v2" => |path| reviews(path, "v2", Some("black")),
        "reviews-v3" => |path| reviews(path, "v3", Some("red")),
        "ratings" => ratings,
        _ => {
            eprintln!("{USAGE}");
            std::process::exit(2);
        }
    };
    let listener =
        TcpListener::bind(("::", PORT)).or_else(|_| TcpListener::bind(("0.0.0.0", PORT)))?;
    println!("{role} listens on {PORT}");
    for connection in listener.incoming() {
        let connection = connection?;
        std::thread::spawn(move || {
            // A client that leaves early is no error.
            let _ = serve(&connection, answer);
        });
    }
    Ok(())
}

/// Status, content type, content.
type Answer = (u16, &'static str, String);

fn serve(connection: &TcpStream, answer: fn(&str) -> Answer) -> io::Result<()> {
    let client = connection.peer_addr()?;
    let mut lines = BufReader::new(connection);
    loop {
        let mut request = String::new();
        if lines.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let mut header = String::new();
        while lines.read_line(&mut header)? > 2 {
            header.clear();
        }
        let path = request.split(' ').nth(1).unwrap_or("/");
        let (status, kind, content) = match path {
            // The client's address as the server sees it, which would be another one behind a proxy.
            "/client" => (
                200,
                "text/plain",
                format!("{}\n", client.ip().to_canonical()),
            ),
            path => answer(path),
        };
        let head = format!(
            "HTTP/1.1 {status} {}\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n",
            if status == 200 { "OK" } else { "Error" },
            content.len()
        );
        let mut out = connection;
        out.write_all((head + &content).as_bytes())?;
    }
}

fn productpage(path: &str) -> Answer {
    if !path.starts_with("/productpage") {
        return missing();
    }
    let details = match get("details.backend", "/details/0") {
        Ok(details) => details,
        Err(error) => format!("Error fetching product details! ({error})"),
    };
    let reviews = match get("reviews.backend", "/reviews/0") {
        Ok(reviews) => reviews,
        Err(error) => format!("Error fetching product reviews! ({error})"),
    };
    let page = format!(
        "<html><title>The Comedy of Errors</title>\n<h4>Book Details</h4>\n{details}\n<h4>Book Reviews</h4>\n{reviews}\n<p>served by {}</p></html>\n",
        hostname()
    );
    (200, "text/html", page)
}

fn details(path: &str) -> Answer {
    if !path.starts_with("/details") {
        return missing();
    }
    let book = r#"{"id":0,"author":"William Shakespeare","year":1595,"publisher":"PublisherA","pages":200}"#;
    (200, "application/json", book.to_owned())
}

fn reviews(path: &str, version: &str, stars: Option<&str>) -> Answer {
    if !path.starts_with("/reviews") {
        return missing();
    }
    let rating = match stars {
        None => String::new(),
        Some(color) => match get("ratings.backend", "/ratings/0") {
            Ok(ratings) => format!(r#","rating":{{"color":"{color}","stars":{ratings}}}"#),
            Err(_) => {
                r#","rating":{"error":"Ratings service is currently unavailable"}"#.to_owned()
            }
        },
    };
    let pod = hostname();
    let page = format!(
        r#"{{"id":"0","podname":"{pod}","version":"{version}","reviews":[{{"reviewer":"Reviewer1"{rating}}},{{"reviewer":"Reviewer2"{rating}}}]}}"#
    );
    (200, "application/json", page)
}

fn ratings(path: &str) -> Answer {
    if !path.starts_with("/ratings") {
        return missing();
    }
    let ratings = r#"{"Reviewer1":5,"Reviewer2":4}"#;
    (200, "application/json", ratings.to_owned())
}

fn missing() -> Answer {
    (404, "text/plain", "not found\n".to_owned())
}

fn hostname() -> String {
    env::var("HOSTNAME").unwrap_or_default()
}

/// Gets the content at a path of a service, by the service's name.
fn get(service: &str, path: &str) -> io::Result<String> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in (service, PORT).to_socket_addrs()? {
        let mut connection = match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(connection) => connection,
            Err(error) => {
                last = error;
                continue;
            }
        };
        connection.set_read_timeout(Some(PATIENCE))?;
        write!(
            connection,
            "GET {path} HTTP/1.1\r\nhost: {service}:{PORT}\r\n\r\n"
        )?;
        return content(BufReader::new(connection));
    }
    Err(last)
}

fn content(mut answer: impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    answer.read_line(&mut line)?;
    let ok = line.split(' ').nth(1) == Some("200");
    let mut length = 0;
    loop {
        line.clear();
        if answer.read_line(&mut line)? <= 2 {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
    }
    let mut content = String::new();
    answer.take(length).read_to_string(&mut content)?;
    if ok && content.len() as u64 == length {
        Ok(content)
    } else {
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, "no answer"))
    }
}
