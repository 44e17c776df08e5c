//! The host kernel's tracepoints: they cost little and tell what a VMM can't.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::time::{ClockId, clock_gettime};

/// Room for a boot's exits.
const BUFFER_KIB: &str = "16384";

/// A tracepoint, `system/name`, and what of it is wanted.
#[derive(Debug, Clone)]
pub(crate) struct Point {
    pub(crate) name: &'static str,
    pub(crate) filter: Option<String>,
}

impl Point {
    pub(crate) fn all(name: &'static str) -> Self {
        Self { name, filter: None }
    }
}

/// One hit of a tracepoint.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    /// CLOCK_MONOTONIC, in nanoseconds; the kernel prints microseconds.
    pub(crate) time: u64,
    /// The tracepoint's name, without its system.
    pub(crate) event: String,
    /// What it says.
    pub(crate) text: String,
}

/// tracefs, ours for the time of the bench.
#[derive(Debug)]
pub(crate) struct Tracer {
    root: PathBuf,
    /// How many recordings there were.
    count: Cell<u32>,
}

/// A fifth of the tick of Debian's kernels, which are what a lab runs.
const FIFTH: Duration = Duration::from_micros(800);

impl Tracer {
    /// Mounts tracefs where it isn't.
    pub(crate) fn open() -> Result<Self> {
        let root = PathBuf::from("/sys/kernel/tracing");
        if !root.join("trace").exists() {
            mount(
                Some("tracefs"),
                &root,
                Some("tracefs"),
                MsFlags::empty(),
                None::<&str>,
            )
            .context("cannot mount tracefs")?;
        }
        let count = Cell::new(0);
        let tracer = Self { root, count };
        tracer.write("tracing_on", "0")?;
        tracer.write("trace_clock", "mono")?;
        tracer.write("buffer_size_kb", BUFFER_KIB)?;
        Ok(tracer)
    }

    /// What the tracepoints say while `work` runs. Setting them up ends with a tick of the host's
    /// kernel, so what waits for ticks would always wait as long, by luck or bad luck: it begins a
    /// fifth later each time.
    pub(crate) fn record<T>(
        &self,
        points: &[Point],
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Vec<Record>, String)> {
        self.write("trace", "")?;
        for point in points {
            let event = Path::new("events").join(point.name);
            let filter = point.filter.as_deref().unwrap_or("0");
            self.write(event.join("filter"), filter)?;
            self.write(event.join("enable"), "1")?;
        }
        self.write("tracing_on", "1")?;
        let count = self.count.replace(self.count.get() + 1);
        std::thread::sleep(FIFTH * (count % 5));
        let done = work();
        self.write("tracing_on", "0")?;
        self.write("events/enable", "0")?;
        let text = fs::read_to_string(self.root.join("trace")).context("cannot read the trace")?;
        Ok((done?, text.lines().filter_map(parse).collect(), text))
    }

    fn write(&self, file: impl AsRef<Path>, value: &str) -> Result<()> {
        let file = self.root.join(file);
        fs::write(&file, value)
            .with_context(|| format!("cannot write {value} to {}", file.display()))
    }
}

/// `    task-123     [000] d..1.    12.345678: event: text`
fn parse(line: &str) -> Option<Record> {
    if line.starts_with('#') {
        return None;
    }
    let (_, rest) = line.split_once(" [")?;
    let mut words = rest.split_whitespace();
    let time = words.nth(2)?.strip_suffix(':')?;
    let (seconds, micros) = time.split_once('.')?;
    let time = seconds.parse::<u64>().ok()? * 1_000_000_000 + micros.parse::<u64>().ok()? * 1000;
    let event = words.next()?.strip_suffix(':')?.to_owned();
    let text = words.collect::<Vec<_>>().join(" ");
    Some(Record { time, event, text })
}

/// The clock of [`Record::time`].
pub(crate) fn now() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("no monotonic clock")?;
    let nanoseconds = now.tv_sec() * 1_000_000_000 + now.tv_nsec();
    u64::try_from(nanoseconds).context("a time before the start")
}
