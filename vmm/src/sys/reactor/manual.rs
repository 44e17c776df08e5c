//! A reactor turned by hand, for tests.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};
use std::time::Duration;

use super::wheel::Core;
use super::{Executor, Job, ReactorHandle, relock};

/// A reactor without a thread: whoever holds it turns it. Workers become single-stepped, which
/// is what a test wants.
#[derive(Debug)]
pub struct ManualReactor {
    inline: Arc<Inline>,
}

impl ManualReactor {
    /// A reactor with no worker.
    pub fn new() -> io::Result<Self> {
        let core = Core::new()?;
        let inline = Inline {
            core: Mutex::new(core),
            later: Mutex::new(Vec::new()),
            inside: Mutex::new(None),
        };
        Ok(Self {
            inline: Arc::new(inline),
        })
    }

    /// A handle to spawn workers with; spawning and calls happen at once, on the caller's thread.
    pub fn handle(&self) -> ReactorHandle {
        ReactorHandle {
            executor: Arc::clone(&self.inline) as Arc<dyn Executor>,
        }
    }

    /// Waits up to `limit` for events, dispatches one batch and returns how many there were.
    pub fn turn(&self, limit: Duration) -> io::Result<usize> {
        self.inline.enter(|core| core.turn(Some(limit)))
    }
}

/// The executor of a [`ManualReactor`].
#[derive(Debug)]
struct Inline {
    core: Mutex<Core>,
    later: Mutex<Vec<LaterJob>>,
    inside: Mutex<Option<ThreadId>>,
}

struct LaterJob(Job);

impl fmt::Debug for LaterJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LaterJob")
    }
}

impl Inline {
    fn enter<R>(&self, f: impl FnOnce(&mut Core) -> R) -> R {
        let mut core = relock(&self.core);
        *relock(&self.inside) = Some(thread::current().id());
        let answer = f(&mut core);
        loop {
            let later = std::mem::take(&mut *relock(&self.later));
            if later.is_empty() {
                break;
            }
            for job in later {
                (job.0)(&mut core);
            }
        }
        *relock(&self.inside) = None;
        answer
    }
}

impl Executor for Inline {
    fn submit(&self, job: Job) {
        if self.is_current_thread() {
            relock(&self.later).push(LaterJob(job));
        } else {
            self.enter(|core| job(core));
        }
    }

    fn is_current_thread(&self) -> bool {
        *relock(&self.inside) == Some(thread::current().id())
    }
}
