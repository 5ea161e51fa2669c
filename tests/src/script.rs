//! A connection as a list of steps for each end, with a text of what each step saw, so that a connection through
//! the mesh can be compared with one without.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use socket2::SockRef;

use crate::scaled;

/// The syntax of the steps, for people.
pub const STEPS: &str = "write=TEXT fill=BYTES urgent=BYTE read=BYTES all fin wait=MILLISECONDS
  until=FILE (waits until there is one) input (a client waits for a line of its input, or the end of that) hangup (waits until the connection is broken) reset (ends it by one)";

const RESET: &str = "ECONNRESET";

/// Runs the steps until one of them is reset; returns what each saw, in order.
///
/// # Errors
/// A step has invalid syntax.
pub fn run(stream: &TcpStream, steps: &[String]) -> io::Result<String> {
    let patience = scaled(Duration::from_secs(12));
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(scaled(Duration::from_millis(700))))?;
    stream.set_nodelay(true)?;
    let mut both = stream;
    let mut saw = Vec::new();
    for step in steps {
        let (verb, object) = step.split_once('=').unwrap_or((step, ""));
        let number = || object.parse::<usize>().map_err(io::Error::other);
        saw.push(match verb {
            "write" => outcome(
                (&*stream)
                    .write_all(object.as_bytes())
                    .map(|()| "sent".into()),
            ),
            "fill" => outcome(
                (&*stream)
                    .write_all(&vec![b'.'; number()?])
                    .map(|()| "sent".into()),
            ),
            "urgent" => {
                let sent = SockRef::from(stream).send_out_of_band(object.as_bytes());
                outcome(sent.map(|_| "sent".into()))
            }
            "read" => {
                let mut bytes = vec![0; number()?];
                let read = both.read_exact(&mut bytes);
                outcome(read.map(|()| String::from_utf8_lossy(&bytes).into_owned()))
            }
            "all" => {
                let (mut bytes, mut buffer) = (0, vec![0; 1 << 16]);
                let end = loop {
                    match both.read(&mut buffer) {
                        Ok(0) => break "end".to_owned(),
                        Ok(read) => bytes += read,
                        // This process was stopped, and goes on.
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => break word(&error),
                    }
                };
                format!("{bytes} bytes, {end}")
            }
            "fin" => outcome(stream.shutdown(Shutdown::Write).map(|()| "fin".into())),
            "wait" => {
                std::thread::sleep(Duration::from_millis(number()? as u64));
                continue;
            }
            "until" => {
                while !Path::new(object).exists() {
                    std::thread::sleep(Duration::from_millis(10));
                }
                continue;
            }
            "input" => {
                io::stdin().read_line(&mut String::new())?;
                continue;
            }
            "hangup" => hangup(stream, patience)?.into(),
            "reset" => {
                SockRef::from(stream).set_linger(Some(Duration::ZERO))?;
                continue;
            }
            _ => return Err(io::Error::other(format!("no step: {step}"))),
        });
        // The kernel reports a reset once: a read after the write that got it would see an orderly end.
        if saw.last().is_some_and(|seen| seen.ends_with(RESET)) {
            break;
        }
    }
    Ok(saw.join("; "))
}

fn outcome(done: io::Result<String>) -> String {
    done.unwrap_or_else(|error| word(&error))
}

/// Returns the C library's name of an error, as programs may tell errors apart.
fn word(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ECONNRESET) => RESET.into(),
        Some(libc::EPIPE) => "EPIPE".into(),
        Some(libc::ETIMEDOUT) => "ETIMEDOUT".into(),
        Some(libc::EAGAIN) => "nothing".into(),
        _ => error.to_string(),
    }
}

fn hangup(stream: &TcpStream, patience: Duration) -> io::Result<&'static str> {
    let mut wanted = libc::pollfd {
        fd: stream.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    let patience = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the descriptor is open, and it is one.
    match unsafe { libc::poll(&raw mut wanted, 1, patience) } {
        0 => Ok("whole"),
        1 => Ok("broken"),
        _ => Err(io::Error::last_os_error()),
    }
}
