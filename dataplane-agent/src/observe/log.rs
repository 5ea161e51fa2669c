//! The log, in ztunnel's two forms: `<time>\t<level>\t<target>\t<message>\t<fields>`, or JSON.

use std::fmt::{self, Write as _};

use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

/// The form of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people: fields separated by tabs.
    #[default]
    Plain,
    /// For machines: an object per line.
    Json,
}

/// What changes the level while the daemon runs.
#[derive(Clone)]
pub struct Level {
    set: std::sync::Arc<Set>,
    now: std::sync::Arc<std::sync::Mutex<String>>,
}

/// Sets directives, or says why not.
type Set = dyn Fn(&str) -> Result<(), String> + Send + Sync;

impl Level {
    /// Sets the directives: a level, or `target=level`, separated by commas.
    ///
    /// # Errors
    /// They are not directives.
    pub fn set(&self, directives: &str) -> Result<(), String> {
        (self.set)(directives)?;
        directives.clone_into(
            &mut self
                .now
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner),
        );
        Ok(())
    }

    /// The directives that hold.
    pub fn now(&self) -> String {
        self.now
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }
}

/// Starts the log, on standard error.
///
/// # Errors
/// The directives are none; the log is started already.
pub fn start(directives: &str, format: Format) -> Result<Level, String> {
    let filter = parse(directives)?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .event_format(Lines(format));
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()
        .map_err(|error| error.to_string())?;
    let set = move |directives: &str| {
        let filter = parse(directives)?;
        handle.reload(filter).map_err(|error| error.to_string())
    };
    Ok(Level {
        set: std::sync::Arc::new(set),
        now: std::sync::Arc::new(std::sync::Mutex::new(directives.to_owned())),
    })
}

fn parse(directives: &str) -> Result<EnvFilter, String> {
    EnvFilter::builder()
        .parse(directives)
        .map_err(|error| format!("`{directives}`: {error}"))
}

/// Writes one line per event.
#[derive(Debug)]
pub struct Lines(pub Format);

const TIME: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");

impl<S, N> FormatEvent<S, N> for Lines
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

/// Events that come from the `log` crate have their target in a field.
fn target_of(event: &Event<'_>, logged: &str) -> String {
    let target = if logged.is_empty() {
        event.metadata().target()
    } else {
        logged
    };
    let target = target.strip_prefix("dataplane_agent::").unwrap_or(target);
    target.to_owned()
}

/// What `log` events carry besides their message.
fn is_logs_own(field: &Field) -> bool {
    field.name().starts_with("log.")
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
            let _ = write!(self.message, "{value}");
        } else if !is_logs_own(field) {
            let between = if self.rest.is_empty() { '\t' } else { ' ' };
            let _ = write!(self.rest, "{between}{}={value}", field.name());
        }
    }
}

impl Visit for Plain {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format_args!("{value:?}"));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message.push_str(value),
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
        self.put(field, format!("{value:?}").into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "log.target" {
            value.clone_into(&mut self.target);
        }
        self.put(field, value.into());
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
