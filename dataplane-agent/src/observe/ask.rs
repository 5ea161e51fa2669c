//! Asks an agent over its admin socket.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

/// Interval at which an agent is tried again whose queue of connections is full.
const RETRY: Duration = Duration::from_millis(50);

/// The answer of an agent.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The line with the status code.
    pub status: String,
    /// The content.
    pub body: String,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No process listens.
    #[error("{0}")]
    Nobody(io::Error),
    /// A process listens, and has not answered whole within this time.
    #[error("the daemon does not answer within {} s", .0.as_secs_f32())]
    Slow(Duration),
    /// It has answered something else, or a part.
    #[error("the daemon does not answer whole: {0}")]
    Broken(io::Error),
}

/// Returns the answer at a path of a socket's agent, in all within this time.
///
/// # Errors
/// See [`AskError`].
pub async fn ask(socket: &Path, path: &str, long: Duration) -> Result<Answer, AskError> {
    let answer = async {
        let mut stream = connect(socket).await.map_err(AskError::Nobody)?;
        exchange(&mut stream, path).await.map_err(AskError::Broken)
    };
    let answer = timeout(long, answer).await;
    answer.unwrap_or(Err(AskError::Slow(long)))
}

/// Connects, as soon as there is room in the agent's queue.
async fn connect(socket: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(socket).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(RETRY).await,
            connected => return connected,
        }
    }
}

async fn exchange(stream: &mut UnixStream, path: &str) -> io::Result<Answer> {
    let request = format!("GET {path} HTTP/1.0\r\nhost: dataplane\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or_else(|| io::Error::other("it is not HTTP"))?;
    Ok(Answer {
        status: head.lines().next().unwrap_or_default().to_owned(),
        body: body.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_millis(300);

    #[tokio::test]
    async fn one_that_answers_a_byte_at_a_time_for_ever_is_not_waited_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).expect("a socket");
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("who asks");
            while stream.write_all(b"x").is_ok() {
                thread::sleep(LONG / 10);
            }
        });
        let answer = ask(&path, "/status", LONG).await;
        assert!(matches!(answer, Err(AskError::Slow(LONG))), "{answer:?}");
    }

    #[tokio::test]
    async fn one_that_accepts_nobody_is_not_waited_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let _listener = UnixListener::bind(&path).expect("a socket");
        let mut queued = Vec::new();
        while let Ok(stream) = UnixStream::connect(&path).await {
            queued.push(stream);
        }
        let answer = ask(&path, "/status", LONG).await;
        assert!(matches!(answer, Err(AskError::Slow(LONG))), "{answer:?}");
    }

    #[tokio::test]
    async fn nobody_is_told_apart_from_one_that_answers_something_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let answer = ask(&path, "/status", LONG).await;
        assert!(matches!(answer, Err(AskError::Nobody(_))), "{answer:?}");
        let listener = UnixListener::bind(&path).expect("a socket");
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("who asks");
            stream.write_all(b"hello").expect("it reads");
        });
        let answer = ask(&path, "/status", LONG * 100).await;
        assert!(matches!(answer, Err(AskError::Broken(_))), "{answer:?}");
    }
}
