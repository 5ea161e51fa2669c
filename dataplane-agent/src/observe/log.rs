//! The log, in ztunnel's two forms: `<time>\t<level>\t<target>\t<message>\t<fields>`, or JSON.
//!
//! Peers choose some of its contents. So an event is always one line, whatever is in its fields, and the length
//! of a field is bounded.

use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::sync::OnceLock;

use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

use super::{levels, writer};

/// Most bytes of a field.
const MAX_FIELD: usize = 1 << 10;
/// Most bytes of a message.
const MAX_MESSAGE: usize = 16 << 10;

/// The writer of the process's one log, once it is started.
static WRITER: OnceLock<writer::Writer> = OnceLock::new();
/// The format that it was started with.
static FORMAT: OnceLock<Format> = OnceLock::new();

/// The form of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people: fields separated by tabs.
    #[default]
    Plain,
    /// For machines: an object per line.
    Json,
}

/// A handle that changes the level while the daemon runs.
#[derive(Clone)]
pub struct Level {
    set: std::sync::Arc<Set>,
    now: std::sync::Arc<std::sync::Mutex<String>>,
}

/// Sets directives, or returns the reason why not.
type Set = dyn Fn(&str) -> Result<(), String> + Send + Sync;

impl Level {
    /// Sets the directives: a level, or `target=level`, separated by commas.
    ///
    /// # Errors
    /// They are not valid directives, or name unknown targets.
    pub fn set(&self, directives: &str) -> Result<(), String> {
        levels::check(directives)?;
        if let Some(told) = levels::unknown_targets(directives) {
            return Err(told);
        }
        (self.set)(directives)?;
        directives.clone_into(
            &mut self
                .now
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner),
        );
        Ok(())
    }

    /// Returns the current directives.
    pub fn now(&self) -> String {
        self.now
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }
}

/// Starts the log on standard error; at most `waiting` bytes wait to be written. Messages of panics go there
/// too: the standard library would write them itself, and wait for the reader.
///
/// # Errors
/// The directives are not valid, the writer cannot be started, or the log is started already.
pub fn start(directives: &str, format: Format, waiting: usize) -> Result<Level, String> {
    let filter = levels::parse(directives)?;
    let (filter, handle) = reload::Layer::new(filter);
    let writer = writer::Writer::to_stderr(waiting).map_err(|error| error.to_string())?;
    let writer = WRITER.get_or_init(|| writer);
    FORMAT.get_or_init(|| format);
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(move || writer)
        .with_ansi(false)
        .event_format(LineFormatter(format));
    tracing_subscriber::registry()
        .with(filter)
        .with(layer)
        .try_init()
        .map_err(|error| error.to_string())?;
    std::panic::set_hook(Box::new(|panic| {
        let what = panic.payload_as_str().unwrap_or("a panic");
        let place = panic.location().map(tracing::field::display);
        let thread = std::thread::current();
        tracing::error!(place, thread = thread.name(), "panic: {what}");
        // The process may end after this. Threads of connections must not wait for a reader.
        if thread.name() == Some("main") {
            flush();
        }
    }));
    let set = move |directives: &str| {
        let filter = levels::parse(directives)?;
        handle.reload(filter).map_err(|error| error.to_string())
    };
    Ok(Level {
        set: std::sync::Arc::new(set),
        now: std::sync::Arc::new(std::sync::Mutex::new(directives.to_owned())),
    })
}

/// Returns the number of lines that were lost: they were not read in time, or could not be written.
pub fn lost() -> u64 {
    WRITER.get().map_or(0, writer::Writer::lost)
}

/// Waits for a short time until the log is written; to be called before the process ends.
pub fn flush() {
    if let Some(writer) = WRITER.get() {
        writer.flush();
    }
}

/// Writes a line to standard error as it is: through the log if that is started, so that it comes in order
/// and nobody waits for the reader.
pub fn say(line: &str) {
    match WRITER.get() {
        Some(writer) if FORMAT.get() == Some(&Format::Json) => {
            let time = OffsetDateTime::now_utc().format(TIME).unwrap_or_default();
            let object =
                json!({"level": "error", "time": time, "scope": "dataplane", "message": line});
            writer.push(format!("{object}\n").as_bytes());
        }
        Some(writer) => writer.push(format!("{line}\n").as_bytes()),
        // An error means that standard error is closed: nobody wants to read it.
        None => _ = writeln!(io::stderr(), "{line}"),
    }
    flush();
}

/// Formats each event as one line.
#[derive(Debug)]
pub struct LineFormatter(pub Format);

const TIME: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");

impl<S, N> FormatEvent<S, N> for LineFormatter
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let time = OffsetDateTime::now_utc()
            .format(TIME)
            .map_err(|_| fmt::Error)?;
        let level = event.metadata().level().as_str().to_ascii_lowercase();
        match self.0 {
            Format::Plain => {
                let mut fields = Plain::default();
                event.record(&mut fields);
                let target = target_of(event, &fields.target);
                writeln!(
                    writer,
                    "{time}\t{level}\t{target}\t{}{}",
                    fields.message, fields.rest
                )
            }
            Format::Json => {
                let mut fields = Json::default();
                event.record(&mut fields);
                let target = target_of(event, &fields.target);
                let mut line = Map::new();
                line.insert("level".into(), level.into());
                line.insert("time".into(), time.into());
                line.insert("scope".into(), target.into());
                line.append(&mut fields.rest);
                line.insert("message".into(), fields.message.into());
                writeln!(writer, "{}", Value::Object(line))
            }
        }
    }
}

/// Returns an event's target; events of the `log` crate have it in a field, `logged`.
fn target_of(event: &Event<'_>, logged: &str) -> String {
    let target = if logged.is_empty() {
        event.metadata().target()
    } else {
        logged
    };
    let target = target.strip_prefix("dataplane_agent::").unwrap_or(target);
    target.to_owned()
}

/// Returns `true` for the fields that events of the `log` crate have besides their message.
fn is_logs_own(field: &Field) -> bool {
    field.name().starts_with("log.")
}

/// Appends a value, escaped so that it stays on its line, and cut to `most` bytes before escaping.
fn push_escaped(to: &mut String, most: usize, value: fmt::Arguments<'_>) {
    let left = most;
    // The only error is that the value was cut.
    let _ = write!(EscapingWriter { to, left }, "{value}");
}

struct EscapingWriter<'a> {
    to: &'a mut String,
    left: usize,
}

impl fmt::Write for EscapingWriter<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            let Some(left) = self.left.checked_sub(c.len_utf8()) else {
                self.to.push('…');
                return Err(fmt::Error);
            };
            self.left = left;
            if must_escape(c) {
                self.to.extend(c.escape_default());
            } else {
                self.to.push(c);
            }
        }
        Ok(())
    }
}

/// Returns `true` for characters that act on a terminal or on a reader of lines: control characters, line and
/// paragraph separators, and those that change the direction of writing.
fn must_escape(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[derive(Default)]
struct Plain {
    message: String,
    rest: String,
    target: String,
}

impl Plain {
    fn put(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        if field.name() == "message" {
            push_escaped(&mut self.message, MAX_MESSAGE, value);
        } else if !is_logs_own(field) {
            let between = if self.rest.is_empty() { '\t' } else { ' ' };
            let _ = write!(self.rest, "{between}{}=", field.name());
            push_escaped(&mut self.rest, MAX_FIELD, value);
        }
    }
}

impl Visit for Plain {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format_args!("{value:?}"));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => push_escaped(&mut self.message, MAX_MESSAGE, format_args!("{value}")),
            "log.target" => value.clone_into(&mut self.target),
            _ => self.put(field, format_args!("{value:?}")),
        }
    }
}

#[derive(Default)]
struct Json {
    message: String,
    rest: Map<String, Value>,
    target: String,
}

impl Json {
    /// Puts a text, escaped and cut as in the plain format.
    fn text(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        let most = if field.name() == "message" {
            MAX_MESSAGE
        } else {
            MAX_FIELD
        };
        let mut text = String::new();
        push_escaped(&mut text, most, value);
        self.put(field, text.into());
    }
    fn put(&mut self, field: &Field, value: Value) {
        if field.name() == "message" {
            self.message = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
        } else if !is_logs_own(field) {
            self.rest.insert(field.name().to_owned(), value);
        }
    }
}

impl Visit for Json {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.text(field, format_args!("{value:?}"));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "log.target" {
            value.clone_into(&mut self.target);
        }
        self.text(field, format_args!("{value}"));
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fitted(most: usize, text: &str) -> String {
        let mut to = String::from("x=");
        push_escaped(&mut to, most, format_args!("{text}"));
        to
    }

    #[test]
    fn a_value_stays_on_its_line_and_does_nothing_to_a_terminal() {
        let nasty = "a\n2026-01-01\terror\r\u{1b}[2J\u{9b}\u{202e}\u{2028}ä";
        let fitted = fitted(MAX_FIELD, nasty);
        assert!(fitted.ends_with('ä'), "{fitted}");
        assert!(!fitted.chars().any(must_escape), "{fitted:?}");
    }

    #[test]
    fn a_value_has_a_most_length() {
        assert_eq!(fitted(3, "abc"), "x=abc");
        assert_eq!(fitted(3, "abcd"), "x=abc…");
        assert!(fitted(MAX_FIELD, &"ä\u{1b}".repeat(1 << 20)).len() < 6 * MAX_FIELD);
    }
}
