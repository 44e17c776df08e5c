//! What a guest's kernel and agent log, for whoever has to find out why it failed.
//!
//! Both come through pipes. The last lines are kept for error messages; the rest goes to the log at
//! debug level, at a bounded rate, since a guest may write as much as it likes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe::Receiver;
use tokio::sync::watch;
use tokio::time::Instant;

use super::error::Error;
use crate::agent::clean;

/// Lines kept.
const KEPT: usize = 6;
/// Longest line; what is beyond it counts as the next.
const LINE: u64 = 400;
/// Lines that may be logged at once, and the time after which one more may.
const BURST: u32 = 100;
const INTERVAL: Duration = Duration::from_millis(100);

/// What a kernel says when it gives up. A long trace follows, of less use to most.
const PANIC: &str = "Kernel panic - not syncing";

/// The ends of a guest's log.
#[derive(Debug)]
pub(super) struct GuestLog {
    last: Arc<Mutex<Last>>,
    /// Becomes an error when both sources have ended.
    open: watch::Receiver<()>,
}

/// The last lines, or those up to a panic.
#[derive(Debug, Default)]
struct Last {
    lines: VecDeque<String>,
    panicked: bool,
}

impl GuestLog {
    /// A log, and where the serial port and the agent are to write.
    pub(super) fn start() -> Result<(Self, OwnedFd, OwnedFd), Error> {
        let (closed, open) = watch::channel(());
        let log = Self {
            last: Arc::default(),
            open,
        };
        let closed = Arc::new(closed);
        let serial = log.source("kernel", Arc::clone(&closed))?;
        let agent = log.source("agent", closed)?;
        Ok((log, serial, agent))
    }

    fn source(&self, from: &'static str, open: Arc<watch::Sender<()>>) -> Result<OwnedFd, Error> {
        let failed = |source: io::Error| Error::Machine {
            what: "making a pipe for its log",
            source: source.into(),
        };
        let (reader, writer) = io::pipe().map_err(failed)?;
        let reader = Receiver::from_owned_fd(reader.into()).map_err(failed)?;
        let last = Arc::clone(&self.last);
        tokio::spawn(async move {
            follow(from, reader, &last).await;
            drop(open);
        });
        Ok(writer.into())
    }

    /// The last lines, in one.
    pub(super) fn last_words(&self) -> String {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let lines: Vec<&str> = last.lines.iter().map(String::as_str).collect();
        lines.join(" | ")
    }

    /// Resolves when nothing writes to it any more, and all has been read.
    pub(super) async fn ended(&self) {
        // Nothing is ever sent: this ends with the senders.
        let _ = self.open.clone().changed().await;
    }
}

async fn follow(from: &'static str, reader: Receiver, last: &Mutex<Last>) {
    let mut reader = BufReader::with_capacity(512, reader);
    let mut line = Vec::new();
    let mut budget = Budget::new();
    loop {
        line.clear();
        match (&mut reader).take(LINE).read_until(b'\n', &mut line).await {
            // The machine is gone, or its log is of no use.
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = clean(String::from_utf8_lossy(&line).trim_end());
        if text.is_empty() {
            continue;
        }
        if budget.take(Instant::now()) {
            tracing::debug!("guest's {from}: {text}");
        }
        last.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(text);
    }
}

impl Last {
    fn push(&mut self, line: String) {
        if self.panicked {
            return;
        }
        self.panicked = line.contains(PANIC);
        if self.lines.len() == KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

/// So many lines now, and then so many a second.
#[derive(Debug)]
struct Budget {
    left: u32,
    since: Option<Instant>,
}

impl Budget {
    fn new() -> Self {
        Self {
            left: BURST,
            since: None,
        }
    }

    fn take(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let regained = (now - since).as_millis() / INTERVAL.as_millis();
        if let Ok(regained @ 1..) = u32::try_from(regained) {
            self.left = self.left.saturating_add(regained).min(BURST);
            self.since = Some(now);
        }
        self.left = match self.left.checked_sub(1) {
            Some(left) => left,
            None => return false,
        };
        true
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    #[tokio::test]
    async fn the_last_lines_are_kept_and_harmless() {
        let (log, serial, agent) = GuestLog::start().unwrap();
        let mut serial = File::from(serial);
        for number in 0..20 {
            writeln!(serial, "line {number}\u{1b}[31m").unwrap();
        }
        drop((serial, agent));
        log.ended().await;
        let words = log.last_words();
        assert!(words.starts_with("line 14 [31m | line 15"), "{words}");
    }

    #[tokio::test]
    async fn a_panic_is_not_lost_behind_its_trace() {
        let (log, serial, agent) = GuestLog::start().unwrap();
        let mut serial = File::from(serial);
        writeln!(serial, "before\n[    1.5] {PANIC}: Fatal exception").unwrap();
        for depth in 0..20 {
            writeln!(serial, " do_something+0x{depth:x}").unwrap();
        }
        drop((serial, agent));
        log.ended().await;
        assert_eq!(
            log.last_words(),
            format!("before | [    1.5] {PANIC}: Fatal exception")
        );
    }

    #[test]
    fn a_flood_is_cut_and_silence_makes_up_for_it() {
        let mut budget = Budget::new();
        let start = Instant::now();
        let taken = (0..1000).filter(|_| budget.take(start)).count();
        assert_eq!(taken, 100);
        assert!(budget.take(start + INTERVAL));
        assert!(!budget.take(start + INTERVAL));
    }
}
