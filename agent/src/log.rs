//! The agent's log: one line per event, to the agent's console port once that is open.
//!
//! Writing never blocks and never fails the caller: a host that doesn't read loses lines, which are
//! counted.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Environment variable with the least severe level to log; the kernel hands unknown command line
/// words of this form to init.
pub(crate) const LEVEL_VARIABLE: &str = "SUPERMACHINE_LOG";

static SINK: OnceLock<Sink> = OnceLock::new();

#[derive(Debug)]
struct Sink {
    port: Mutex<Option<File>>,
    lost: AtomicU64,
    level: LevelFilter,
}

/// Starts logging to standard error.
pub(crate) fn start() {
    let level = std::env::var(LEVEL_VARIABLE)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(LevelFilter::INFO);
    let sink = SINK.get_or_init(|| Sink {
        port: Mutex::new(None),
        lost: AtomicU64::new(0),
        level,
    });
    // An error means that a subscriber exists already, which then logs.
    let _ = tracing::subscriber::set_global_default(Logger(sink));
}

/// Logs to `port` from now on; it must be non-blocking.
pub(crate) fn use_port(port: OwnedFd) {
    if let Some(sink) = SINK.get() {
        *sink.port.lock().unwrap_or_else(PoisonError::into_inner) = Some(File::from(port));
    }
}

impl Sink {
    fn write(&self, line: &[u8]) {
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        let written = match port.as_mut() {
            Some(port) => port.write_all(line),
            None => std::io::stderr().write_all(line),
        };
        if written.is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[derive(Debug)]
struct Logger(&'static Sink);

impl Subscriber for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.0.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.0.level)
    }

    fn event(&self, event: &Event<'_>) {
        let metadata = event.metadata();
        let level = match *metadata.level() {
            Level::ERROR => "error",
            Level::WARN => "warn",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let mut line = Line(String::with_capacity(128));
        let lost = self.0.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _ = writeln!(line.0, "warn agent: {lost} lines were lost");
        }
        let _ = write!(line.0, "{level} {}:", metadata.target());
        event.record(&mut line);
        line.0.push('\n');
        self.0.write(line.0.as_bytes());
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}
