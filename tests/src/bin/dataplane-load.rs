//! The load of the benchmark, and what answers it. A load begins things when they are due, whether or not
//! those before have ended, and measures from when each was due: what had to wait is not measured as if it had
//! begun later.

#![allow(missing_docs, reason = "a program of the benchmark")]

use std::collections::BTreeMap;
use std::env;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

const USAGE: &str = "usage: dataplane-load COMMAND
  echo PORT                      prints `ready`, and sends back what each connection sends
  connects ADDRESS RATE SECONDS  begins RATE connections a second, sends a byte on each and waits for its echo;
                                 prints how long that took from when each was due, as JSON: `answered` and
                                 `failed` are counts, the others microseconds";

/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest time that is told apart from longer ones, in microseconds.
const LONGEST: u64 = 60_000_000;

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let done = match words.as_slice() {
        ["echo", port] => runtime.block_on(echo(port)),
        ["connects", to, rate, seconds] => runtime.block_on(connects(to, rate, seconds)),
        _ => {
            eprintln!("{USAGE}");
            std::process::exit(2);
        }
    };
    if let Err(error) = done {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn parsed<T>(text: &str) -> io::Result<T>
where
    T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    text.parse().map_err(io::Error::other)
}

async fn echo(port: &str) -> io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", parsed::<u16>(port)?)).await?;
    println!("ready");
    loop {
        let (mut stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            let (mut read, mut write) = stream.split();
            tokio::io::copy(&mut read, &mut write).await
        });
    }
}

async fn connects(to: &str, rate: &str, seconds: &str) -> io::Result<()> {
    let (to, rate, seconds) = (parsed(to)?, parsed(rate)?, parsed(seconds)?);
    let (ended, mut ends) = mpsc::unbounded_channel();
    let mut due = schedule(rate, seconds);
    let begin = async {
        while let Some(due) = due.recv().await {
            let ended = ended.clone();
            tokio::spawn(async move {
                let answered = timeout(PATIENCE, connect(to)).await;
                let answered = answered.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()));
                let _ = ended.send((due.elapsed(), answered));
            });
        }
        drop(ended);
    };
    let count = async {
        let mut times = Times::default();
        while let Some((time, answered)) = ends.recv().await {
            times.add(time, answered);
        }
        times
    };
    let ((), times) = tokio::join!(begin, count);
    println!("{}", times.said());
    Ok(())
}

/// Says when each of `rate` things a second is due, then. The runtime's own timers are exact to a millisecond only.
fn schedule(rate: u32, seconds: u32) -> mpsc::UnboundedReceiver<Instant> {
    let (send, due) = mpsc::unbounded_channel();
    thread::spawn(move || {
        let begin = Instant::now();
        for number in 0..rate * seconds {
            let due = begin + Duration::from_secs(1) * number / rate;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if send.send(due).is_err() {
                return;
            }
        }
    });
    due
}

async fn connect(to: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect(to).await?;
    stream.write_all(b"a").await?;
    stream.read_exact(&mut [0]).await?;
    Ok(())
}

/// How long things took, and how others failed.
struct Times {
    answered: Histogram<u64>,
    failed: BTreeMap<String, u64>,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            answered: Histogram::new_with_bounds(1, LONGEST, 3).expect("three digits"),
            failed: BTreeMap::new(),
        }
    }
}

impl Times {
    fn add(&mut self, time: Duration, answered: io::Result<()>) {
        match answered {
            Ok(()) => {
                let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
                self.answered.saturating_record(micros);
            }
            Err(error) => *self.failed.entry(error.kind().to_string()).or_default() += 1,
        }
    }

    fn said(&self) -> Value {
        let at = |part| self.answered.value_at_quantile(part);
        json!({
            "answered": self.answered.len(),
            "failed": self.failed,
            "p50": at(0.5),
            "p90": at(0.9),
            "p99": at(0.99),
            "p999": at(0.999),
            "most": self.answered.max(),
        })
    }
}
