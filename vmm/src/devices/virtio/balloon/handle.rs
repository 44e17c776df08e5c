//! The host's side of a balloon.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::hints::Hints;
use super::{Metrics, PAGE, Stats};
use crate::devices::virtio::Interrupt;
use crate::sys::doorbell::Doorbell;

/// Why a balloon refuses.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// Too little memory would be left to the guest.
    #[error("Balloon target of {asked} bytes is more than the limit of {limit}")]
    Target {
        /// Bytes asked for.
        asked: u64,
        /// The most there can be.
        limit: u64,
    },
    /// The guest has not come to the target in time.
    #[error("Balloon holds {actual} bytes, not yet its target of {target}")]
    Short {
        /// Bytes asked of the balloon.
        target: u64,
        /// Bytes it holds.
        actual: u64,
    },
    /// No driver is there that would tell its free pages.
    #[error("The guest's driver gives no hints of free pages")]
    NoHints,
    /// Hints are being collected already.
    #[error("The guest is telling its free pages already")]
    Busy,
    /// The guest has not told all its free pages in time, or was reset.
    #[error("The guest has not told all its free pages; {discarded} bytes were discarded")]
    Unfinished {
        /// Bytes that went back to the host.
        discarded: u64,
    },
    /// The statistics can't be asked for.
    #[error("Balloon statistics cannot be requested")]
    Request(#[source] io::Error),
}

/// A balloon at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Bytes asked of the balloon.
    pub target: u64,
    /// Bytes the guest says it holds.
    pub actual: u64,
    /// What the guest said last about its memory.
    pub stats: Stats,
}

/// Sets a balloon's target and reads what the guest says, from any thread.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(super) shared: Arc<Shared>,
}

impl Handle {
    /// Asks the guest to put `bytes` into the balloon, or to take back what is over that. Rounded
    /// down to whole pages. The guest follows in its own time, as far as it can.
    ///
    /// # Errors
    /// More than the balloon's limit.
    pub fn set_target(&self, bytes: u64) -> Result<(), BalloonError> {
        let limit = self.shared.limit;
        let too_large = BalloonError::Target {
            asked: bytes,
            limit,
        };
        if bytes > limit {
            return Err(too_large);
        }
        let pages = u32::try_from(bytes / PAGE).map_err(|_| too_large)?;
        let before = self.shared.target.swap(pages, Ordering::SeqCst);
        if before != pages {
            self.shared.config_changed();
            self.shared.wake();
        }
        Ok(())
    }

    /// Bytes asked of the balloon.
    pub fn target(&self) -> u64 {
        u64::from(self.shared.target.load(Ordering::SeqCst)) * PAGE
    }

    /// Bytes the guest says the balloon holds.
    pub fn actual(&self) -> u64 {
        u64::from(self.shared.actual.load(Ordering::SeqCst)) * PAGE
    }

    /// Waits until the guest has come to the target, up to `limit`, and answers with the bytes the
    /// balloon then holds. A guest that is short of memory may never come there.
    ///
    /// # Errors
    /// [`BalloonError::Short`].
    pub fn wait_for_target(&self, limit: Duration) -> Result<u64, BalloonError> {
        let deadline = Instant::now() + limit;
        let mut moved = lock(&self.shared.moved);
        loop {
            let (target, actual) = (self.target(), self.actual());
            if target == actual {
                return Ok(actual);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(BalloonError::Short { target, actual });
            }
            let waited = self.shared.changed.wait_timeout(moved, left);
            moved = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Asks the guest for pages that are free at this moment, discards them and answers with how
    /// many bytes those were, once the guest has told all or `limit` is over.
    ///
    /// A Linux guest holds these pages back until that is done, unless it runs out of memory
    /// meanwhile: a page it then uses again can be discarded under it. Ask a guest that has memory
    /// to spare, as before a snapshot; [reporting](super::BalloonConfig::page_reporting) has no such
    /// weakness.
    ///
    /// # Errors
    /// [`BalloonError::NoHints`], [`BalloonError::Busy`] or [`BalloonError::Unfinished`].
    pub fn discard_free_pages(&self, limit: Duration) -> Result<u64, BalloonError> {
        let deadline = Instant::now() + limit;
        self.shared.hints.begin()?;
        self.shared.config_changed();
        let collected = self.shared.hints.wait(deadline);
        // The guest may have its pages back.
        self.shared.config_changed();
        collected
    }

    /// Asks the guest for fresh statistics and waits for them up to `wait`; what came last is in
    /// the report even when nothing fresh comes.
    ///
    /// # Errors
    /// When the device can't be reached.
    pub fn report(&self, wait: Duration) -> Result<Report, BalloonError> {
        let deadline = Instant::now() + wait;
        let mut told = lock(&self.shared.told);
        let known = told.updates;
        if !wait.is_zero() {
            self.shared.request.ring().map_err(BalloonError::Request)?;
        }
        while told.updates == known {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.shared.fresh.wait_timeout(told, left);
            told = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(Report {
            target: self.target(),
            actual: self.actual(),
            stats: told.stats,
        })
    }

    /// The balloon's counters.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }
}

/// What device, worker and handles have in common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) limit: u64,
    /// In pages, as are all of configuration space.
    pub(super) target: AtomicU32,
    pub(super) actual: AtomicU32,
    /// What the driver fills free pages with (virtio 1.2, 5.5.6.5).
    pub(super) poison: AtomicU32,
    moved: Mutex<()>,
    /// Target or actual size have changed.
    changed: Condvar,
    pub(super) hints: Hints,
    /// Present while a driver is there.
    pub(super) interrupt: Mutex<Option<Interrupt>>,
    /// Rung to ask for statistics.
    pub(super) request: Doorbell,
    told: Mutex<Told>,
    fresh: Condvar,
    pub(super) metrics: Metrics,
}

#[derive(Debug, Default)]
struct Told {
    stats: Stats,
    updates: u64,
}

impl Shared {
    pub(super) fn new(limit: u64) -> io::Result<Self> {
        Ok(Self {
            limit,
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            poison: AtomicU32::new(0),
            moved: Mutex::default(),
            changed: Condvar::new(),
            hints: Hints::default(),
            interrupt: Mutex::new(None),
            request: Doorbell::new()?,
            told: Mutex::default(),
            fresh: Condvar::new(),
            metrics: Metrics::default(),
        })
    }

    pub(super) fn set_interrupt(&self, interrupt: Option<Interrupt>) {
        *lock(&self.interrupt) = interrupt;
    }

    /// Tells a driver that is there to look at its configuration.
    fn config_changed(&self) {
        if let Some(interrupt) = &*lock(&self.interrupt) {
            interrupt.config();
        }
    }

    /// The balloon holds so many pages now.
    pub(super) fn set_actual(&self, pages: u32) {
        self.actual.store(pages, Ordering::SeqCst);
        self.wake();
    }

    pub(super) fn wake(&self) {
        // Nobody may be between looking and waiting.
        drop(lock(&self.moved));
        self.changed.notify_all();
    }

    /// The guest has spoken.
    pub(super) fn tell(&self, stats: Stats) {
        let mut told = lock(&self.told);
        told.stats = stats;
        told.updates += 1;
        drop(told);
        self.metrics.stats_updates.add(1);
        self.fresh.notify_all();
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is whole between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
