//! The exact text of access-log lines, and that each connection has one.

use std::io::Write;
use std::sync::Mutex;

use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;

use super::super::log::{Format, LineFormatter};
use super::super::metrics::Sources;
use super::*;
use crate::mesh::workload::tests::workload;

/// A writer that keeps its output.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0
            .lock()
            .expect("not poisoned")
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Kept {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Returns the lines that `work` logs, without their times.
fn logged(format: Format, work: impl FnOnce(&Observer)) -> Vec<String> {
    let kept = Kept::default();
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(kept.clone())
        .with_ansi(false)
        .event_format(LineFormatter(format));
    let subscriber = tracing_subscriber::registry().with(lines);
    let observer = Observer::new(Arc::new(Metrics::new(Sources {
        kernel: Box::new(Vec::new),
        repairs: Box::new(Vec::new),
        places: crate::proxy::limits::NodePlaces::new(1),
        workers: Vec::new(),
        root_ends: 0,
    })));
    tracing::subscriber::with_default(subscriber, || work(&observer));
    let text = String::from_utf8(kept.0.lock().expect("not poisoned").clone()).expect("text");
    text.lines()
        .map(|line| {
            line.split_once('\t')
                .map_or(line, |(_, rest)| rest)
                .to_owned()
        })
        .collect()
}

pub(crate) fn connection_info() -> ConnectionInfo {
    let target = Workload {
        name: "server".into(),
        ..workload(&[])
    };
    ConnectionInfo {
        reporter: Reporter::Source,
        src_addr: "10.0.0.1:4000".parse().expect("an address"),
        source: Some(Arc::new(workload(&[]))),
        source_identity: Some(workload(&[]).identity()),
        dst_addr: "10.0.0.2:15008".parse().expect("an address"),
        hbone_addr: Some("10.0.0.2:80".parse().expect("an address")),
        service: None,
        target: Some(Arc::new(target)),
        mutual_tls: true,
    }
}

pub(crate) struct Refusal;

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("http status: 401 Unauthorized")
    }
}

impl Failure for Refusal {
    fn flag(&self) -> Flag {
        Flag::Connect
    }
    fn reason(&self) -> &'static str {
        "status"
    }
}

fn without_duration(line: &str) -> String {
    let (head, tail) = line.split_once("duration=\"").expect("a duration");
    let (_, tail) = tail.split_once("ms\"").expect("milliseconds");
    format!("{head}duration{tail}")
}

#[test]
fn a_connection_that_fails_is_one_line_of_this_form() {
    let lines = logged(Format::Plain, |observer| {
        let record = observer.open(connection_info());
        record.bytes().add_up(11);
        record.bytes().add_down(22);
        record.close(Err(&Refusal));
    });
    let complete: Vec<_> = lines
        .iter()
        .filter(|line| line.contains("connection complete"))
        .collect();
    assert_eq!(complete.len(), 1);
    assert_eq!(
        without_duration(complete[0]),
        "error\taccess\tconnection complete\tsrc.addr=10.0.0.1:4000 src.workload=\"pod\" \
         src.namespace=\"ns\" src.identity=\"spiffe://td/ns/ns/sa/sa\" dst.addr=10.0.0.2:15008 \
         dst.hbone_addr=10.0.0.2:80 dst.workload=\"server\" dst.namespace=\"ns\" \
         dst.identity=\"spiffe://td/ns/ns/sa/sa\" direction=\"outbound\" bytes_sent=11 \
         bytes_recv=22 duration error=\"http status: 401 Unauthorized\" reason=\"status\""
    );
}

#[test]
fn inbound_counts_from_the_other_side_and_in_clear_nobody_is_named() {
    let lines = logged(Format::Plain, |observer| {
        let clear = ConnectionInfo {
            reporter: Reporter::Destination,
            mutual_tls: false,
            ..connection_info()
        };
        let record = observer.open(clear);
        record.bytes().add_up(11);
        record.bytes().add_down(22);
        record.close(Ok(()));
    });
    let line = lines
        .iter()
        .find(|line| line.contains("connection complete"))
        .expect("a line");
    assert!(line.starts_with("info\taccess\t"), "{line}");
    assert!(
        line.contains("direction=\"inbound\" bytes_sent=22 bytes_recv=11"),
        "{line}"
    );
    assert!(
        !line.contains("identity") && !line.contains("error"),
        "{line}"
    );
}

#[test]
fn a_client_that_gives_up_is_told_of_and_is_no_failure() {
    let lines = logged(Format::Plain, |observer| {
        observer.open(connection_info()).give_up();
    });
    let lines: Vec<_> = lines
        .iter()
        .filter(|line| line.contains("complete"))
        .collect();
    let [line] = lines[..] else {
        panic!("{lines:?}")
    };
    assert!(line.starts_with("info\taccess\t"), "{line}");
    assert!(line.ends_with("ms\" reason=\"client_gone\""), "{line}");
}

#[test]
fn a_record_that_nobody_closes_still_tells() {
    let lines = logged(Format::Plain, |observer| {
        drop(observer.open(connection_info()));
    });
    let lines: Vec<_> = lines
        .iter()
        .filter(|line| line.contains("complete"))
        .collect();
    assert_eq!(lines.len(), 1);
    assert!(
        lines[0].contains("error=\"connection closed due to connection drain\""),
        "{}",
        lines[0]
    );
}

fn arrival(observer: &Observer) -> Arrival {
    let at = |text: &str| text.parse().expect("an address");
    observer.arrived(at("[fd00::1]:4"), at("10.0.0.2:80"), Reporter::Destination)
}

#[test]
fn an_early_refusal_is_one_line() {
    let lines = logged(Format::Plain, |observer| {
        arrival(observer).refuse(&Refusal);
    });
    assert_eq!(
        lines,
        [
            "warn\taccess\tconnection failed\tsrc.addr=[fd00::1]:4 dst.addr=10.0.0.2:80 \
         direction=\"inbound\" error=\"http status: 401 Unauthorized\" reason=\"status\""
        ]
    );
}

#[test]
fn what_is_cut_before_it_is_known_where_it_goes_still_tells() {
    let lines = logged(Format::Plain, |observer| {
        drop(arrival(observer));
        arrival(observer).is_tunnel();
        arrival(observer).open(connection_info()).close(Ok(()));
    });
    let failed = lines.iter().filter(|line| line.contains("failed"));
    assert_eq!(
        failed.collect::<Vec<_>>(),
        [
            "warn\taccess\tconnection failed\tsrc.addr=[fd00::1]:4 dst.addr=10.0.0.2:80 \
         direction=\"inbound\" error=\"connection closed due to connection drain\" reason=\"drain\""
        ]
    );
}

#[test]
fn json_lines_are_objects() {
    let lines = logged(Format::Json, |observer| {
        observer.open(connection_info()).close(Ok(()));
    });
    for line in lines {
        let object: serde_json::Value = serde_json::from_str(&line).expect("an object");
        assert_eq!(object["scope"], "access");
        assert_eq!(object["src.workload"], "pod");
    }
}
