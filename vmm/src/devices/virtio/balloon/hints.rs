//! Free page hints (virtio 1.2, 5.5.6.6): a run begins with a command id in configuration space, in
//! whose name the driver then tells its free pages, and ends with another.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use super::BalloonError;
use super::handle::lock;

/// The driver has told all; or, at the beginning, need not tell anything.
const STOP: u32 = 0;
/// The host needs no more hints, and the driver can use the pages again.
const DONE: u32 = 1;
/// The first id of a run.
const FIRST: u32 = 2;

/// The run there is, if there is one.
#[derive(Debug, Default)]
pub(super) struct Hints {
    /// As in configuration space.
    command: AtomicU32,
    run: Mutex<Run>,
    over: Condvar,
}

#[derive(Debug, Default)]
struct Run {
    /// Whether a driver is there that understands.
    possible: bool,
    last_id: u32,
    stage: Stage,
    discarded: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Idle,
    /// Somebody waits for hints under this id.
    Asked(u32),
    /// The driver has begun to tell them.
    Telling(u32),
    /// The driver has told all.
    Told,
    /// The driver is gone.
    Lost,
}

impl Hints {
    /// What configuration space shows.
    pub(super) fn command(&self) -> u32 {
        self.command.load(Ordering::SeqCst)
    }

    /// A driver is there, or is no more.
    pub(super) fn set_possible(&self, possible: bool) {
        let mut run = lock(&self.run);
        run.possible = possible;
        self.command.store(STOP, Ordering::SeqCst);
        if run.stage != Stage::Idle {
            run.stage = Stage::Lost;
            self.over.notify_all();
        }
    }

    /// Begins a run.
    pub(super) fn begin(&self) -> Result<(), BalloonError> {
        let mut run = lock(&self.run);
        if !run.possible {
            return Err(BalloonError::NoHints);
        }
        if run.stage != Stage::Idle {
            return Err(BalloonError::Busy);
        }
        run.last_id = run.last_id.checked_add(1).unwrap_or(FIRST).max(FIRST);
        run.stage = Stage::Asked(run.last_id);
        run.discarded = 0;
        self.command.store(run.last_id, Ordering::SeqCst);
        Ok(())
    }

    /// Waits for the end of a run, and ends it.
    pub(super) fn wait(&self, deadline: Instant) -> Result<u64, BalloonError> {
        let mut run = lock(&self.run);
        while matches!(run.stage, Stage::Asked(_) | Stage::Telling(_)) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.over.wait_timeout(run, left);
            run = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let stage = std::mem::take(&mut run.stage);
        if stage != Stage::Lost {
            self.command.store(DONE, Ordering::SeqCst);
        }
        match (stage, run.discarded) {
            (Stage::Told, discarded) => Ok(discarded),
            (_, discarded) => Err(BalloonError::Unfinished { discarded }),
        }
    }

    /// The driver sends a command id.
    pub(super) fn heard(&self, id: u32) {
        let mut run = lock(&self.run);
        run.stage = match run.stage {
            Stage::Asked(asked) if asked == id => Stage::Telling(id),
            Stage::Telling(told) if told == id => return,
            // Whatever else it says, it no longer speaks of this run.
            Stage::Telling(_) => Stage::Told,
            _ => return,
        };
        if run.stage == Stage::Told {
            self.over.notify_all();
        }
    }

    /// Has `discard` take what is hinted, if it belongs to the run there is. While it works, the run
    /// can't end: the driver gets its pages back after that.
    pub(super) fn take(&self, discard: impl FnOnce() -> u64) -> bool {
        let mut run = lock(&self.run);
        let wanted = matches!(run.stage, Stage::Telling(_));
        if wanted {
            run.discarded += discard();
        }
        wanted
    }
}
