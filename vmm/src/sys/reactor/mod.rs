//! One thread that waits for readiness and runs device workers.
//!
//! A worker never blocks on anything but its own backend, is only ever touched by the reactor's
//! thread while it runs, and comes back to its owner when it is stopped. Until the reactor begins,
//! workers are seated and spoken to on the threads of those who do it, one at a time.
//! Readiness is level triggered: what a worker leaves undone is reported again, so a bounded amount
//! of work for each call is enough. Nothing wakes the thread while there is nothing to do.

mod inbox;
#[cfg(any(test, feature = "testing"))]
mod manual;
mod wheel;

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::doorbell::Doorbell;
use super::threads;
use crate::jail::{Filter, Rule, When, allow, allow_if, calls};

use inbox::{Inbox, Turner};
#[cfg(any(test, feature = "testing"))]
pub use manual::ManualReactor;
use wheel::{Core, Source, WorkerId};

/// What a source or a timer has to say.
///
/// Readiness may be spurious, and a hang-up or an error shows as both readable and writable: the
/// read or write that follows tells which.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// A read would not block.
    pub readable: bool,
    /// A write would not block.
    pub writable: bool,
    /// The time given to [`Control::wake_at`] has come.
    pub timer: bool,
}

/// What a worker wants to hear about a source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// Report when a read would not block.
    pub read: bool,
    /// Report when a write would not block.
    pub write: bool,
}

impl Interest {
    /// Nothing; the source stays registered, silently.
    pub const NONE: Self = Self {
        read: false,
        write: false,
    };
    /// Readability only.
    pub const READ: Self = Self {
        read: true,
        write: false,
    };
    /// Writability only.
    pub const WRITE: Self = Self {
        read: false,
        write: true,
    };
    /// Both directions.
    pub const BOTH: Self = Self {
        read: true,
        write: true,
    };

    fn is_none(self) -> bool {
        self == Self::NONE
    }
}

/// A device's active half: owns its queues and its backend, and acts on events.
pub trait Worker: Send + 'static {
    /// Registers the sources to begin with. Runs on the reactor's thread once it has begun; an
    /// error gives up the worker and is what [`ReactorHandle::spawn`] returns.
    fn start(&mut self, control: &mut Control<'_>) -> io::Result<()>;

    /// Acts on the source or timer registered under `token`. The work done in one call must be
    /// bounded, whatever a guest wrote.
    fn ready(&mut self, control: &mut Control<'_>, token: usize, readiness: Readiness);
}

/// The reactor is gone, or the worker no longer runs on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("The worker is no longer running")]
pub struct Stopped;

/// What it takes to wait for events; a filter of a reactor's thread holds it.
pub(crate) const WAITING: &[Rule] = &[
    allow(calls::SYS_epoll_ctl),
    allow(calls::SYS_epoll_wait),
    allow(calls::SYS_epoll_pwait),
    allow(calls::SYS_epoll_pwait2),
    allow(calls::SYS_timerfd_settime),
    // The reactor's own copy of a source.
    allow_if(
        calls::SYS_fcntl,
        &[When::Is(1, libc::F_DUPFD_CLOEXEC as u32)],
    ),
];

/// Owns the workers and their thread. Dropping it stops every worker and joins.
#[derive(Debug)]
pub struct Reactor {
    inbox: Arc<Inbox>,
    /// Where the thread waits for its work, until it has it.
    start: Option<mpsc::Sender<Turner>>,
    thread: Option<JoinHandle<()>>,
}

impl Reactor {
    /// A reactor with a thread called `name` that makes the system calls of `filter` alone. No worker
    /// hears of anything before it [begins](Self::begin).
    pub fn new(name: &str, filter: &'static Filter) -> io::Result<Self> {
        let inbox = Arc::new(Inbox::new(Core::new()?));
        let (start, started) = mpsc::channel::<Turner>();
        let thread = threads::spawn(name, filter, move || {
            // Nothing comes for the thread of a reactor that is dropped before.
            if let Ok(turner) = started.recv() {
                turner.run();
            }
        })?;
        Ok(Self {
            inbox,
            start: Some(start),
            thread: Some(thread),
        })
    }

    /// Begins, if it has not: from now on workers are the thread's.
    pub fn begin(&self) {
        if let (Some(start), Some(turner)) = (&self.start, self.inbox.take()) {
            // Refused by no thread that waits.
            let _ = start.send(turner);
        }
    }

    /// A handle to spawn workers with.
    pub fn handle(&self) -> ReactorHandle {
        ReactorHandle {
            inbox: Arc::clone(&self.inbox),
        }
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        self.start = None;
        self.inbox.close();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // A panic of the thread was reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Spawns workers on a reactor, from any thread.
#[derive(Clone)]
pub struct ReactorHandle {
    inbox: Arc<Inbox>,
}

impl fmt::Debug for ReactorHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReactorHandle").finish_non_exhaustive()
    }
}

impl ReactorHandle {
    /// Hands `worker` to the reactor; its `start` has run when this returns.
    ///
    /// Fails with what `start` returned, or with `BrokenPipe` when the reactor has stopped.
    /// Must not be called on the reactor's own thread.
    pub fn spawn<W: Worker>(&self, worker: W) -> io::Result<Running<W>> {
        let id = self
            .ask(move |core| core.seat(Box::new(worker)))
            .map_err(|stopped| io::Error::new(io::ErrorKind::BrokenPipe, stopped))??;
        Ok(Running {
            id,
            handle: self.clone(),
            taken: false,
            worker: PhantomData,
        })
    }

    /// Whether another thread is at work in the reactor: what a worker does can be waited for.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.inbox.is_elsewhere()
    }

    /// Runs `f` on the reactor's thread and waits for its answer.
    fn ask<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Core) -> R + Send + 'static,
    ) -> Result<R, Stopped> {
        if self.inbox.is_current_thread() {
            // Waiting here for ourselves would never end.
            return Err(Stopped);
        }
        let (sender, receiver) = mpsc::sync_channel(1);
        self.inbox.submit(Box::new(move |core| {
            // Nobody waiting any more is no loss.
            let _ = sender.send(f(core));
        }));
        receiver.recv().map_err(|_| Stopped)
    }
}

/// A worker on its reactor. Dropping it stops the worker and drops that too.
pub struct Running<W> {
    id: WorkerId,
    handle: ReactorHandle,
    taken: bool,
    worker: PhantomData<fn() -> W>,
}

impl<W> fmt::Debug for Running<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl<W: Worker> Running<W> {
    /// Runs `f` with the worker on the reactor's thread and waits for the answer.
    ///
    /// On the reactor's own thread that can't be: there the answer is [`Stopped`].
    pub fn call<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut W, &mut Control<'_>) -> R + Send + 'static,
    ) -> Result<R, Stopped> {
        let id = self.id;
        self.handle
            .ask(move |core| {
                core.with(id, |worker, control| {
                    worker
                        .as_any()
                        .downcast_mut::<W>()
                        .map(|worker| f(worker, control))
                })
                .flatten()
            })?
            .ok_or(Stopped)
    }

    /// Stops the worker between two events and returns it with everything it owns.
    pub fn stop(self) -> Result<W, Stopped> {
        self.stop_with(|_| ())
    }

    /// The same, with something to be done last, on the reactor's thread, when no event comes any
    /// more.
    pub fn stop_with(mut self, finish: impl FnOnce(&mut W) + Send + 'static) -> Result<W, Stopped> {
        self.taken = true;
        let id = self.id;
        let stop = move |core: &mut Core| {
            let mut worker = core.unseat(id)?;
            worker.as_any().downcast_mut::<W>().map(finish);
            Some(worker)
        };
        let worker = self.handle.ask(stop)?.ok_or(Stopped)?;
        worker
            .into_any()
            .downcast::<W>()
            .map(|worker| *worker)
            .map_err(|_| Stopped)
    }
}

impl<W> Drop for Running<W> {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let id = self.id;
        if self.handle.inbox.is_current_thread() {
            self.handle
                .inbox
                .submit(Box::new(move |core| drop(core.unseat(id))));
        } else {
            // Waits, so that nothing of the worker touches guest memory afterwards.
            let _ = self.handle.ask(move |core| drop(core.unseat(id)));
        }
    }
}

/// A worker's way to its reactor, while it runs there.
#[derive(Debug)]
pub struct Control<'a> {
    core: &'a mut Core,
    worker: WorkerId,
}

impl Control<'_> {
    /// Registers `source` under `token`. The reactor holds a duplicate of the descriptor until
    /// [`Control::remove`]: a peer sees a close only after both are gone.
    ///
    /// Fails for a token in use, and for what can't be waited for, such as a regular file.
    pub fn add(&mut self, source: &impl AsFd, token: usize, interest: Interest) -> io::Result<()> {
        let fd = source.as_fd().try_clone_to_owned()?;
        let source = Source::Copy(fd);
        self.core.add(self.worker, source, token, interest)
    }

    /// Registers a doorbell under `token`, to hear when it rings. The reactor has a share of it until
    /// [`Control::remove`].
    ///
    /// Fails for a token in use, and for a doorbell that is registered.
    pub fn listen(&mut self, bell: &Arc<Doorbell>, token: usize) -> io::Result<()> {
        let source = Source::Bell(Arc::clone(bell));
        self.core.add(self.worker, source, token, Interest::READ)
    }

    /// Changes what is reported of the source `token`.
    pub fn set_interest(&mut self, token: usize, interest: Interest) -> io::Result<()> {
        self.core.set_interest(self.worker, token, interest)
    }

    /// Forgets the source `token`, if there is one; nothing of it is reported any more.
    pub fn remove(&mut self, token: usize) {
        self.core.remove(self.worker, token);
    }

    /// Asks for one call with `timer` set at `when`; replaces an earlier request of this token.
    pub fn wake_at(&mut self, token: usize, when: Instant) {
        self.core.wake_at(self.worker, token, when);
    }

    /// Takes back a [`Control::wake_at`].
    pub fn cancel_wake(&mut self, token: usize) {
        self.core.cancel_wake(self.worker, token);
    }
}

#[cfg(test)]
mod tests;
