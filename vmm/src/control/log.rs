//! The child's log: `tracing` events become [`Event::Log`] frames.
//!
//! A guest can provoke log lines, so lines are counted out by a [`Budget`] on both sides: here to
//! keep the guest from filling the host's log, in the parent because the child may be the guest's.

use std::fmt::{self, Write as _};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::span;
use tracing::{Level, Metadata, Subscriber};

use super::message::{Event, LogLevel};

/// The longest line, in bytes.
pub(super) const MAX_LINE: usize = 2048;

/// The longest name of a module or device, in bytes.
pub(super) const MAX_NAME: usize = 128;

/// How many lines may leave at once.
pub(super) const BURST: u32 = 100;

/// One more line may leave each interval.
pub(super) const INTERVAL: Duration = Duration::from_millis(100);

/// So many at once, then one per interval; what it refuses it counts.
#[derive(Debug)]
pub(super) struct Budget {
    burst: u32,
    interval: Duration,
    left: u32,
    /// When `left` was last right.
    since: Instant,
    refused: u64,
}

impl Budget {
    pub(super) fn new(burst: u32, interval: Duration, now: Instant) -> Self {
        Self {
            burst,
            interval,
            left: burst,
            since: now,
            refused: 0,
        }
    }

    /// Takes one. `Some(n)`: granted, and `n` were refused since the last grant.
    pub(super) fn take(&mut self, now: Instant) -> Option<u64> {
        let intervals =
            now.saturating_duration_since(self.since).as_nanos() / self.interval.as_nanos().max(1);
        if intervals >= u128::from(self.burst - self.left) {
            self.left = self.burst;
            self.since = now;
        } else {
            // Less than `burst`, so it fits.
            self.left += intervals as u32;
            self.since += self.interval * intervals as u32;
        }
        if self.left == 0 {
            self.refused += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.refused))
    }
}

/// Turns `tracing` events into [`Event::Log`]. Spans are not told apart: the parent knows which VM
/// the child runs.
pub(super) struct ControlLog<S> {
    level: LogLevel,
    budget: Mutex<Budget>,
    sink: S,
}

impl<S> fmt::Debug for ControlLog<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlLog")
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

impl<S: Fn(Event) + Send + Sync + 'static> ControlLog<S> {
    pub(super) fn new(level: LogLevel, sink: S) -> Self {
        Self {
            level,
            budget: Mutex::new(Budget::new(BURST, INTERVAL, Instant::now())),
            sink,
        }
    }
}

impl<S: Fn(Event) + Send + Sync + 'static> Subscriber for ControlLog<S> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        level_of(metadata.level()) <= self.level
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        use tracing::level_filters::LevelFilter;
        Some(match self.level {
            LogLevel::Error => LevelFilter::ERROR,
            LogLevel::Warn => LevelFilter::WARN,
            LogLevel::Info => LevelFilter::INFO,
            LogLevel::Debug => LevelFilter::DEBUG,
            LogLevel::Trace => LevelFilter::TRACE,
        })
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let granted = match self.budget.lock() {
            Ok(mut budget) => budget.take(Instant::now()),
            Err(_) => None,
        };
        let Some(refused) = granted else { return };
        let mut line = Line(String::new());
        event.record(&mut line);
        if refused > 0 {
            // Writing to a string doesn't fail.
            let _ = write!(line.0, " ({refused} lines before this one were dropped)");
        }
        (self.sink)(Event::Log {
            level: level_of(event.metadata().level()),
            target: event.metadata().target().to_owned(),
            text: line.0,
        });
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

fn level_of(level: &Level) -> LogLevel {
    match *level {
        Level::ERROR => LogLevel::Error,
        Level::WARN => LogLevel::Warn,
        Level::INFO => LogLevel::Info,
        Level::DEBUG => LogLevel::Debug,
        Level::TRACE => LogLevel::Trace,
    }
}

/// The message, then the other fields as `name=value`.
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string doesn't fail.
        let _ = if field.name() == "message" {
            write!(self.0, "{value:?}")
        } else {
            let space = if self.0.is_empty() { "" } else { " " };
            write!(self.0, "{space}{}={value:?}", field.name())
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

/// Cuts a text to `most` bytes at a character's start and replaces control characters, so that no
/// line can pass itself off as two or steer a terminal.
pub(super) fn clean(text: &str, most: usize) -> String {
    let text = text.get(..text.floor_char_boundary(most)).unwrap_or(text);
    text.replace(char::is_control, " ")
}
