//! The way to a reactor's core: at once on the caller's thread until the reactor begins, then through
//! a list that its own thread works off.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use polling::Poller;

use super::wheel::Core;

pub(super) type Job = Box<dyn FnOnce(&mut Core) + Send>;

#[derive(Debug)]
pub(super) struct Inbox {
    poller: Arc<Poller>,
    /// Until the reactor's thread has it, or the reactor is gone.
    core: Mutex<Option<Core>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    jobs: Vec<Job>,
    closing: bool,
    /// The thread that works with the core, or did last.
    thread: Option<ThreadId>,
    /// It does so now.
    inside: bool,
}

impl State {
    fn work(&mut self, inside: bool) {
        self.thread = Some(thread::current().id());
        self.inside = inside;
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("jobs", &self.jobs.len())
            .finish_non_exhaustive()
    }
}

impl Inbox {
    pub(super) fn new(core: Core) -> Self {
        Self {
            poller: Arc::clone(&core.poller),
            core: Mutex::new(Some(core)),
            state: Mutex::default(),
        }
    }

    /// Runs `job`, now or soon, or drops it when the reactor has stopped.
    pub(super) fn submit(&self, job: Job) {
        if !self.is_current_thread()
            && let Some(core) = relock(&self.core).as_mut()
        {
            self.enter(core, job);
            return;
        }
        let mut state = self.lock();
        if state.closing {
            return;
        }
        state.jobs.push(job);
        drop(state);
        if let Err(error) = self.poller.notify() {
            tracing::error!(%error, "The reactor can't be notified");
        }
    }

    /// Whether the caller is inside the reactor.
    pub(super) fn is_current_thread(&self) -> bool {
        let state = self.lock();
        state.inside && state.thread == Some(thread::current().id())
    }

    /// Whether it is another thread that works there.
    pub(super) fn is_elsewhere(&self) -> bool {
        self.lock().thread != Some(thread::current().id())
    }

    /// The core, for the reactor's thread to have it for good; nothing if it has.
    pub(super) fn take(self: &Arc<Self>) -> Option<Turner> {
        let core = relock(&self.core).take()?;
        self.lock().thread = None;
        Some(Turner {
            core,
            closing: Closing(Arc::clone(self)),
        })
    }

    /// Works with the core on this thread, as long as no other has it for good.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn with<R>(&self, f: impl FnOnce(&mut Core) -> R) -> Option<R> {
        let mut core = relock(&self.core);
        Some(self.enter(core.as_mut()?, f))
    }

    /// Has the thread end, or does what that would do.
    pub(super) fn close(&self) {
        self.lock().closing = true;
        // A poller that can't be notified has no waiting thread left.
        let _ = self.poller.notify();
        let core = relock(&self.core).take();
        drop(core);
    }

    /// Runs `f` and what was left by workers meanwhile.
    fn enter<R>(&self, core: &mut Core, f: impl FnOnce(&mut Core) -> R) -> R {
        self.lock().work(true);
        let answer = f(core);
        loop {
            let left = std::mem::take(&mut self.lock().jobs);
            if left.is_empty() {
                break;
            }
            for job in left {
                job(core);
            }
        }
        self.lock().work(false);
        answer
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        relock(&self.state)
    }
}

/// What a reactor's thread has.
pub(super) struct Turner {
    core: Core,
    // Dropped last, also when a worker panics or there is no thread: nobody may wait for one.
    closing: Closing,
}

impl Turner {
    /// Turns the core until the reactor is closed.
    pub(super) fn run(mut self) {
        let inbox = Arc::clone(&self.closing.0);
        inbox.lock().work(true);
        loop {
            let jobs = {
                let mut state = inbox.lock();
                if state.closing {
                    return;
                }
                std::mem::take(&mut state.jobs)
            };
            for job in jobs {
                job(&mut self.core);
            }
            if let Err(error) = self.core.turn(None) {
                tracing::error!(%error, "The reactor can't wait for events any more");
                return;
            }
        }
    }
}

/// Turns the waiting callers away when the thread ends.
struct Closing(Arc<Inbox>);

impl Drop for Closing {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closing = true;
        let jobs = std::mem::take(&mut state.jobs);
        drop(state);
        drop(jobs);
    }
}

fn relock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The states behind these locks are consistent between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
