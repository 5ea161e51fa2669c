//! The app that runs in pods: servers that report their client's address, and clients that end in every way.

#![allow(missing_docs, reason = "a program of the tests")]

use std::collections::BTreeMap;
use std::env;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

const USAGE: &str = "usage: dataplane-test-app COMMAND
  pause                        does nothing
  leaderless                   does nothing, on a thread that is not its first: that one has ended
  hide ADDRESS HOW             its first thread leaves the network namespace as any user may, and it asks from
                               there with each line of its input: by a thread, or by a socket from before
  serve PORT [OPTION...]       answers each line with the client's address, a space, and the line
  end-server PORT HOW          takes a line, and ends the connection: close, reset, half, unread
  sink PORT                    reads to the end; answers with how much it was, and a checksum
  ask ADDRESS LINE [OPTION...] sends a line, prints the answer
  talk ADDRESS                 sends each line of its input, prints each answer; a line `late-mark=N`
                               or `late-device=NAME` does that to its socket
  end ADDRESS HOW              connects and ends it: now, sent, half, reset, unread, vanish
  flood ADDRESS BYTES          sends as much, prints what the sink answers
  script-server PORT STEP...   does the steps of tests/src/script.rs on each connection
  script ADDRESS TIMES STEP... the same as a client, on so many, one after the other
  hold ADDRESS COUNT           opens COUNT connections, asks on each, and counts, with all of them open
  rate ADDRESS SECONDS EACH [AT-ONCE]
                               opens EACH connections a second, and asks on each; counts. While so many
                               (16) wait for their answer it opens no more, and is late
  load ADDRESS AT-ONCE         opens connections and asks on each, AT-ONCE at a time, until its input
                               closes; counts
  many ADDRESS COUNT [silent]  opens COUNT connections and asks on each, unless silent; holds them
options of serve: late-mark=N late-device=NAME, on what it accepts and before it answers
options of ask: mapped (IPv4 in an IPv6 socket) mptcp fastopen source=IP[:PORT] device=NAME mark=N late-device=NAME late-mark=N twice=ADDRESS
                in-syn (fails unless the line went in the SYN) say-mark (prints the mark that it has then)";

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["pause"] => pause(),
        ["leaderless"] => leaderless(),
        ["hide", to, how] => hide(to, how),
        ["serve", port, options @ ..] => serve(port, options),
        ["end-server", port, how] => end_server(port, how),
        ["sink", port] => sink(port),
        ["ask", to, line, options @ ..] => ask(to, line, options),
        ["talk", to] => talk(to),
        ["end", to, how] => end(to, how),
        ["flood", to, bytes] => flood(to, bytes),
        ["script-server", port, steps @ ..] => script_server(port, steps),
        ["script", to, times, steps @ ..] => script(to, times, steps),
        ["hold", to, count] => hold(to, count),
        ["rate", to, seconds, each] => rate(to, seconds, each, "16"),
        ["rate", to, seconds, each, at_once] => rate(to, seconds, each, at_once),
        ["load", to, at_once] => load(to, at_once),
        ["many", to, count] => many(to, count, true),
        ["many", to, count, "silent"] => many(to, count, false),
        _ => {
            eprintln!("{USAGE}");
            std::process::exit(2);
        }
    };
    if let Err(error) = done {
        eprintln!("{}", word(&error));
        std::process::exit(1);
    }
}

/// Returns one word for an error.
fn word(error: &io::Error) -> String {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::ConnectionRefused => "refused".into(),
        Kind::ConnectionReset | Kind::ConnectionAborted | Kind::BrokenPipe => "reset".into(),
        Kind::TimedOut | Kind::WouldBlock => "timeout".into(),
        Kind::UnexpectedEof => "eof".into(),
        Kind::PermissionDenied => "denied".into(),
        _ => error.to_string(),
    }
}

fn pause() -> io::Result<()> {
    println!("ready");
    // Runs until the harness ends, which closes the input.
    io::stdin().read_to_end(&mut Vec::new()).map(|_| ())
}

fn leaderless() -> io::Result<()> {
    std::thread::spawn(|| std::process::exit(i32::from(pause().is_err())));
    // SAFETY: takes no pointers; it ends this thread, and the process goes on.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    Ok(())
}

fn hide(to: &str, how: &str) -> io::Result<()> {
    const NOBODY: libc::uid_t = 65534;
    let done = |result: libc::c_int| match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: it takes no pointers.
    done(unsafe { libc::setresuid(NOBODY, NOBODY, NOBODY) })?;
    // SAFETY: it takes no pointers.
    done(unsafe { libc::unshare(libc::CLONE_NEWUSER) })?;
    let to = to.to_owned();
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    let (told, left) = std::sync::mpsc::channel::<()>();
    let inside = (how == "thread").then(|| {
        let to = to.clone();
        std::thread::spawn(move || {
            left.recv()
                .map(|()| answer_lines(|line| ask(&to, line, &[])))
        })
    });
    // SAFETY: it takes no pointers.
    done(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    println!("ready");
    let Some(inside) = inside else {
        let to = parse(&to)?;
        return answer_lines(|line| {
            socket.connect_timeout(&to.into(), patience())?;
            let stream = TcpStream::from(socket.try_clone()?);
            (&stream).write_all(format!("{line}\n").as_bytes())?;
            let mut answer = String::new();
            BufReader::new(&stream).read_line(&mut answer)?;
            print!("{answer}");
            Ok(())
        });
    };
    told.send(()).map_err(io::Error::other)?;
    let ended = inside.join().map_err(|_| io::Error::other("a panic"))?;
    ended.map_err(io::Error::other)?
}

/// Asks with each line of the input; prints the word of each failure.
fn answer_lines(ask: impl Fn(&str) -> io::Result<()>) -> io::Result<()> {
    for line in io::stdin().lines() {
        if let Err(error) = ask(&line?) {
            println!("{}", word(&error));
        }
    }
    Ok(())
}

fn listen(port: &str) -> io::Result<TcpListener> {
    let port = port.parse().map_err(io::Error::other)?;
    // Both families, or IPv4 if this kernel has no IPv6.
    let listener =
        TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))?;
    println!("ready");
    Ok(listener)
}

/// Serves each connection on a thread of its own, until the input closes.
fn each(
    port: &str,
    serve: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
) -> io::Result<()> {
    let listener = listen(port)?;
    let serve = std::sync::Arc::new(serve);
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let serve = serve.clone();
            std::thread::spawn(move || serve(connection));
        }
    });
    io::stdin().read_to_end(&mut Vec::new()).map(|_| ())
}

fn serve(port: &str, options: &[&str]) -> io::Result<()> {
    let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
    each(port, move |connection| {
        let client = connection.peer_addr()?.ip().to_canonical();
        let mut lines = BufReader::new(&connection);
        loop {
            let mut line = String::new();
            if lines.read_line(&mut line)? == 0 {
                return Ok(());
            }
            // Bound to an interface it gets nothing more from a client that comes by another one.
            for option in &options {
                late(&connection, option)?;
            }
            (&connection).write_all(format!("{client} {line}").as_bytes())?;
        }
    })
}

/// Marks or binds a connected socket, if `option` says so; returns `true` if it does.
fn late(connection: &TcpStream, option: &str) -> io::Result<bool> {
    let socket = SockRef::from(connection);
    if let Some(mark) = option.strip_prefix("late-mark=") {
        socket.set_mark(mark.parse().map_err(io::Error::other)?)?;
    } else if let Some(device) = option.strip_prefix("late-device=") {
        socket.bind_device(Some(device.as_bytes()))?;
    } else {
        return Ok(false);
    }
    Ok(true)
}

fn end_server(port: &str, how: &str) -> io::Result<()> {
    match how {
        "close" => each(port, |connection| {
            BufReader::new(&connection)
                .read_line(&mut String::new())
                .map(|_| ())
        }),
        "reset" => each(port, |connection| {
            BufReader::new(&connection).read_line(&mut String::new())?;
            SockRef::from(&connection).set_linger(Some(Duration::ZERO))
        }),
        "half" => each(port, |connection| {
            connection.shutdown(std::net::Shutdown::Write)?;
            (&connection).read_to_end(&mut Vec::new()).map(|_| ())
        }),
        // Closed with unread bytes, which resets the connection.
        "unread" => each(port, |connection| {
            let mut one = [0];
            (&connection).read_exact(&mut one)
        }),
        _ => Err(io::Error::other(USAGE)),
    }
}

/// Prints what each connection saw, once it is over.
fn script_server(port: &str, steps: &[&str]) -> io::Result<()> {
    let steps: Vec<String> = steps.iter().map(|step| (*step).to_owned()).collect();
    each(port, move |connection| {
        println!("{}", dataplane_tests::script::run(&connection, &steps)?);
        Ok(())
    })
}

fn script(to: &str, times: &str, steps: &[&str]) -> io::Result<()> {
    let steps: Vec<String> = steps.iter().map(|step| (*step).to_owned()).collect();
    let to = parse(to)?;
    for _ in 0..times.parse::<usize>().map_err(io::Error::other)? {
        let connection = TcpStream::connect_timeout(&to, patience())?;
        println!("{}", dataplane_tests::script::run(&connection, &steps)?);
    }
    Ok(())
}

fn sink(port: &str) -> io::Result<()> {
    each(port, |connection| {
        let mut sum = 0_u64;
        let mut bytes = 0_u64;
        let mut buffer = vec![0_u8; 1 << 16];
        loop {
            match (&connection).read(&mut buffer)? {
                0 => break,
                read => {
                    bytes += read as u64;
                    sum = buffer[..read].iter().fold(sum, |sum, byte| {
                        sum.wrapping_mul(31).wrapping_add(u64::from(*byte))
                    });
                }
            }
        }
        (&connection).write_all(format!("{bytes} {sum}\n").as_bytes())
    })
}

fn patience() -> Duration {
    dataplane_tests::scaled(Duration::from_secs(8)).min(Duration::from_secs(24))
}

fn patient(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_read_timeout(Some(patience()))?;
    stream.set_write_timeout(Some(patience()))?;
    Ok(stream)
}

fn parse(to: &str) -> io::Result<SocketAddr> {
    to.parse().map_err(io::Error::other)
}

fn ask(to: &str, line: &str, options: &[&str]) -> io::Result<()> {
    let mut to = parse(to)?;
    let option = |name: &str| {
        options
            .iter()
            .find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
    };
    let number = |text: &str| {
        let hex = text.strip_prefix("0x");
        hex.map_or_else(|| text.parse(), |hex| u32::from_str_radix(hex, 16))
            .map_err(io::Error::other)
    };
    if options.contains(&"mapped")
        && let SocketAddr::V4(v4) = to
    {
        to = SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port());
    }
    let protocol = if options.contains(&"mptcp") {
        Protocol::MPTCP
    } else {
        Protocol::TCP
    };
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol))?;
    if let Some(source) = option("source") {
        let any_port = source.parse().map(|ip: IpAddr| SocketAddr::new(ip, 0));
        socket.bind(&any_port.or_else(|_| parse(source))?.into())?;
    }
    if let Some(device) = option("device") {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    if let Some(mark) = option("mark") {
        socket.set_mark(number(mark)?)?;
    }
    let request = format!("{line}\n");
    let mut sent = false;
    if let Some(other) = option("twice") {
        // A socket that was connected elsewhere before, and disconnected by AF_UNSPEC.
        let other = parse(other)?;
        let _ = socket.connect_timeout(&other.into(), patience());
        disconnect(&socket)?;
    }
    if options.contains(&"fastopen") {
        // With a cookie the data is in the SYN; the first time, without one, it follows the handshake.
        let flags = libc::MSG_FASTOPEN;
        let address: SockAddr = to.into();
        socket.send_to_with_flags(request.as_bytes(), &address, flags)?;
        sent = true;
    } else {
        socket.connect_timeout(&to.into(), patience())?;
    }
    let stream = patient(socket.into())?;
    for option in options {
        late(&stream, option)?;
    }
    if !sent {
        (&stream).write_all(request.as_bytes())?;
    }
    let mut answer = String::new();
    if BufReader::new(&stream).read_line(&mut answer)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if options.contains(&"in-syn") && !was_in_syn(&stream)? {
        return Err(io::Error::other("it did not go in the SYN"));
    }
    print!("{answer}");
    if options.contains(&"say-mark") {
        println!("mark={:#x}", SockRef::from(&stream).mark()?);
    }
    Ok(())
}

/// Returns `true` if the server has acknowledged data in the SYN.
fn was_in_syn(stream: &TcpStream) -> io::Result<bool> {
    use std::os::fd::AsRawFd;
    const TCPI_OPT_SYN_DATA: u8 = 32;
    // SAFETY: all zeros are a value of this type of numbers alone.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the descriptor is open; the kernel writes as much as the length says.
    let done = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    match done {
        0 => Ok(info.tcpi_options & TCPI_OPT_SYN_DATA != 0),
        _ => Err(io::Error::last_os_error()),
    }
}

fn disconnect(socket: &Socket) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let nowhere = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as u16,
        sa_data: [0; 14],
    };
    // SAFETY: the descriptor is open, and the address is whole.
    let done = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            &raw const nowhere,
            size_of::<libc::sockaddr>() as libc::socklen_t,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn talk(to: &str) -> io::Result<()> {
    let stream = TcpStream::connect_timeout(&parse(to)?, patience())?;
    println!("connected");
    let mut answers = BufReader::new(stream.try_clone()?);
    std::thread::spawn(move || {
        loop {
            let mut answer = String::new();
            match answers.read_line(&mut answer) {
                Ok(0) => println!("closed: eof"),
                Ok(_) => {
                    print!("{answer}");
                    continue;
                }
                Err(error) => println!("closed: {}", word(&error)),
            }
            std::process::exit(0);
        }
    });
    for line in io::stdin().lines() {
        let line = line?;
        if !late(&stream, &line)? {
            // The thread that reads reports errors.
            let _ = (&stream).write_all(format!("{line}\n").as_bytes());
        }
    }
    Ok(())
}

fn end(to: &str, how: &str) -> io::Result<()> {
    let stream = patient(TcpStream::connect_timeout(&parse(to)?, patience())?)?;
    match how {
        "now" => {}
        "sent" => (&stream).write_all(b"hello\n")?,
        "half" => {
            (&stream).write_all(b"hello\n")?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let _ = (&stream).read_to_end(&mut Vec::new());
        }
        "reset" => {
            (&stream).write_all(b"hello\n")?;
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        }
        "unread" => {
            (&stream).write_all(b"hello\n")?;
            std::thread::sleep(Duration::from_millis(100));
        }
        // The process dies with all its sockets open.
        "vanish" => {
            (&stream).write_all(b"hello\n")?;
            // SAFETY: takes no pointers; this process ends by it.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
        // Waits, whatever the other side does.
        "wait" => {
            (&stream).write_all(b"hello\nmore\n")?;
            let _ = (&stream).read_to_end(&mut Vec::new());
        }
        _ => return Err(io::Error::other(USAGE)),
    }
    Ok(())
}

fn flood(to: &str, bytes: &str) -> io::Result<()> {
    let mut left: usize = bytes.parse().map_err(io::Error::other)?;
    let stream = TcpStream::connect_timeout(&parse(to)?, patience())?;
    let mut seed = 1_u32;
    let mut buffer = vec![0_u8; 1 << 16];
    let (mut sum, mut sent) = (0_u64, 0_u64);
    while left > 0 {
        for byte in &mut buffer {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = (seed >> 24) as u8;
        }
        let piece = &buffer[..left.min(buffer.len())];
        (&stream).write_all(piece)?;
        sum = piece.iter().fold(sum, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(u64::from(*byte))
        });
        sent += piece.len() as u64;
        left -= piece.len();
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    (&stream).read_to_string(&mut answer)?;
    if answer.trim() != format!("{sent} {sum}") {
        return Err(io::Error::other(format!(
            "sent {sent} {sum}, arrived {}",
            answer.trim()
        )));
    }
    println!("{sent} arrived");
    Ok(())
}

/// Opens connections that stay open, some at a time, and counts those that work.
fn hold(to: &str, count: &str) -> io::Result<()> {
    let (to, count): (SocketAddr, usize) = (parse(to)?, count.parse().map_err(io::Error::other)?);
    let once = move || {
        let stream = patient(TcpStream::connect_timeout(&to, patience())?)?;
        (&stream).write_all(b"hello\n")?;
        let mut answer = [0; 256];
        match (&stream).read(&mut answer)? {
            0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            _ => Ok(stream),
        }
    };
    let workers = 16;
    let threads: Vec<_> = (0..workers)
        .map(|_| {
            std::thread::spawn(move || {
                let all: Vec<_> = (0..count / workers).map(|_| once()).collect();
                all
            })
        })
        .collect();
    let mut held = Vec::new();
    let mut bad = 0;
    for thread in threads {
        for end in thread
            .join()
            .map_err(|_| io::Error::other("a thread panicked"))?
        {
            match end {
                Ok(stream) => held.push(stream),
                Err(error) => {
                    bad += 1;
                    println!("{}", word(&error));
                }
            }
        }
    }
    println!("{} good, {bad} bad", held.len());
    Ok(())
}

/// Opens a connection whenever one is due and less than `at_once` wait for their answer, and asks on each. Prints
/// how many were answered, and for each way in which others ended how many and when.
fn rate(to: &str, seconds: &str, each: &str, at_once: &str) -> io::Result<()> {
    let to: SocketAddr = parse(to)?;
    let number = |text: &str| text.parse::<u64>().map_err(io::Error::other);
    let (seconds, each, at_once) = (number(seconds)?, number(each)?, number(at_once)?);
    let started = std::time::Instant::now();
    let (ended, ends) = std::sync::mpsc::channel();
    let mut counts = Counts::default();
    let mut count = |end| counts.add(end);
    let mut waiting = 0;
    for number in 0..seconds * each {
        let due = Duration::from_micros(number * 1_000_000 / each);
        std::thread::sleep(due.saturating_sub(started.elapsed()));
        while waiting == at_once {
            count(ends.recv().map_err(io::Error::other)?);
            waiting -= 1;
        }
        for end in ends.try_iter() {
            count(end);
            waiting -= 1;
        }
        waiting += 1;
        let ended = ended.clone();
        let thread = std::thread::Builder::new().stack_size(1 << 16);
        thread.spawn(move || {
            let end = ask_once(&to).map_err(|error| word(&error));
            let _ = ended.send((end, started.elapsed()));
        })?;
    }
    drop(ended);
    ends.iter().for_each(&mut count);
    counts.print();
    Ok(())
}

/// Opens connections, so many at a time, and asks on each, until the input closes. Prints the same as [`rate`].
fn load(to: &str, at_once: &str) -> io::Result<()> {
    /// Between two connections of a thread, so that whoever is tested is not all that runs.
    const PAUSE: Duration = Duration::from_millis(20);
    let (to, at_once) = (parse(to)?, at_once.parse().map_err(io::Error::other)?);
    let (started, over) = (std::time::Instant::now(), AtomicBool::new(false));
    let (ended, ends) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let end = ask_once(&to).map_err(|error| word(&error));
                    let _ = ended.send((end, started.elapsed()));
                    std::thread::sleep(PAUSE);
                }
            });
        }
        let closed = io::stdin().read_to_end(&mut Vec::new());
        over.store(true, Ordering::Relaxed);
        closed
    })?;
    drop(ended);
    let mut counts = Counts::default();
    ends.iter().for_each(|end| counts.add(end));
    counts.print();
    Ok(())
}

/// Opens a connection, and asks on it.
fn ask_once(to: &SocketAddr) -> io::Result<()> {
    let stream = patient(TcpStream::connect_timeout(to, patience())?)?;
    (&stream).write_all(b"hello\n")?;
    match BufReader::new(&stream).read_line(&mut String::new())? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// How many connections were answered, and how and when the others ended.
#[derive(Default)]
struct Counts {
    good: usize,
    bad: BTreeMap<String, Vec<Duration>>,
}

impl Counts {
    fn add(&mut self, (end, at): (Result<(), String>, Duration)) {
        match end {
            Ok(()) => self.good += 1,
            Err(word) => self.bad.entry(word).or_default().push(at),
        }
    }

    fn print(&self) {
        let bad: usize = self.bad.values().map(Vec::len).sum();
        println!("{} good, {bad} bad", self.good);
        for (word, at) in &self.bad {
            println!(
                "{} {word}, from {:.2?} to {:.2?}",
                at.len(),
                at[0],
                at[at.len() - 1]
            );
        }
    }
}

/// Holds connections until the input closes; prints the number of good ones.
fn many(to: &str, count: &str, asks: bool) -> io::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let (to, count): (SocketAddr, usize) = (parse(to)?, count.parse().map_err(io::Error::other)?);
    let one = || {
        let stream = patient(TcpStream::connect_timeout(&to, patience())?)?;
        if asks {
            (&stream).write_all(b"hello\n")?;
            // Byte by byte: a buffered reader would lose the bytes that it has read ahead.
            let mut byte = [0];
            while byte != *b"\n" {
                (&stream).read_exact(&mut byte)?;
            }
        }
        Ok::<_, io::Error>(stream)
    };
    let held: Vec<TcpStream> = (0..count).filter_map(|_| one().ok()).collect();
    println!("{} open", held.len());
    io::stdin().read_to_end(&mut Vec::new()).map(|_| ())
}
