//! What a reactor holds: the workers, their sources and timers, and one turn of the wheel.

use std::any::Any;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use polling::{Event, Events, PollMode, Poller};

use super::{Control, Interest, Readiness, Worker};
use crate::sys::doorbell::Doorbell;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct WorkerId(u64);

/// Every worker, whatever its type.
pub(super) trait Erased: Send {
    fn start(&mut self, control: &mut Control<'_>) -> io::Result<()>;
    fn ready(&mut self, control: &mut Control<'_>, token: usize, readiness: Readiness);
    fn as_any(&mut self) -> &mut dyn Any;
    fn into_any(self: Box<Self>) -> Box<dyn Any + Send>;
}

impl<W: Worker> Erased for W {
    fn start(&mut self, control: &mut Control<'_>) -> io::Result<()> {
        Worker::start(self, control)
    }
    fn ready(&mut self, control: &mut Control<'_>, token: usize, readiness: Readiness) {
        Worker::ready(self, control, token, readiness);
    }
    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

/// The workers, their sources and timers.
pub(super) struct Core {
    pub(super) poller: Arc<Poller>,
    events: Events,
    /// Copied out of `events`, since a worker changes the sources while a batch is dispatched.
    batch: Vec<Event>,
    workers: HashMap<WorkerId, Seat>,
    /// By poll key. Keys are never used twice, so an event of a removed source finds nothing.
    sources: HashMap<usize, Entry>,
    wakes: BTreeSet<(Instant, WorkerId, usize)>,
    next_worker: u64,
    next_key: usize,
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core")
            .field("workers", &self.workers.len())
            .field("sources", &self.sources.len())
            .finish_non_exhaustive()
    }
}

struct Seat {
    /// Absent while it runs.
    worker: Option<Box<dyn Erased>>,
    keys: HashMap<usize, usize>,
    wakes: HashMap<usize, Instant>,
}

/// What is waited for. Its descriptor stays open as long as the reactor knows it.
pub(super) enum Source {
    /// A copy of somebody's descriptor.
    Copy(OwnedFd),
    Bell(Arc<Doorbell>),
}

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Copy(fd) => fd.as_fd(),
            Self::Bell(bell) => bell.as_fd(),
        }
    }
}

struct Entry {
    worker: WorkerId,
    token: usize,
    source: Source,
    /// Whether the poller knows it: one without interest is taken out, or its hang-up would be
    /// reported for ever.
    polled: bool,
}

impl Core {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            poller: Arc::new(Poller::new()?),
            events: Events::new(),
            batch: Vec::new(),
            workers: HashMap::new(),
            sources: HashMap::new(),
            wakes: BTreeSet::new(),
            next_worker: 0,
            next_key: 0,
        })
    }

    pub(super) fn seat(&mut self, worker: Box<dyn Erased>) -> io::Result<WorkerId> {
        let id = WorkerId(self.next_worker);
        self.next_worker += 1;
        let seat = Seat {
            worker: Some(worker),
            keys: HashMap::new(),
            wakes: HashMap::new(),
        };
        self.workers.insert(id, seat);
        let started = self.with(id, |worker, control| worker.start(control));
        match started {
            Some(Err(error)) => {
                self.unseat(id);
                Err(error)
            }
            _ => Ok(id),
        }
    }

    pub(super) fn unseat(&mut self, id: WorkerId) -> Option<Box<dyn Erased>> {
        let seat = self.workers.remove(&id)?;
        for key in seat.keys.into_values() {
            self.drop_source(key);
        }
        for (token, when) in seat.wakes {
            self.wakes.remove(&(when, id, token));
        }
        seat.worker
    }

    /// Runs `f` with the worker, unless it is gone.
    pub(super) fn with<R>(
        &mut self,
        id: WorkerId,
        f: impl FnOnce(&mut dyn Erased, &mut Control<'_>) -> R,
    ) -> Option<R> {
        let mut worker = self.workers.get_mut(&id)?.worker.take()?;
        let answer = f(
            &mut *worker,
            &mut Control {
                core: self,
                worker: id,
            },
        );
        if let Some(seat) = self.workers.get_mut(&id) {
            seat.worker = Some(worker);
        }
        Some(answer)
    }

    pub(super) fn add(
        &mut self,
        worker: WorkerId,
        source: Source,
        token: usize,
        interest: Interest,
    ) -> io::Result<()> {
        let seat = self
            .workers
            .get_mut(&worker)
            .ok_or(io::ErrorKind::NotFound)?;
        if seat.keys.contains_key(&token) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let key = self.next_key;
        self.next_key += 1;
        seat.keys.insert(token, key);
        self.sources.insert(
            key,
            Entry {
                worker,
                token,
                source,
                polled: false,
            },
        );
        self.set_interest(worker, token, interest)
            .inspect_err(|_| self.remove(worker, token))
    }

    pub(super) fn set_interest(
        &mut self,
        worker: WorkerId,
        token: usize,
        interest: Interest,
    ) -> io::Result<()> {
        let seat = self.workers.get(&worker).ok_or(io::ErrorKind::NotFound)?;
        let key = *seat.keys.get(&token).ok_or(io::ErrorKind::NotFound)?;
        let entry = self.sources.get_mut(&key).ok_or(io::ErrorKind::NotFound)?;
        let event = Event::new(key, interest.read, interest.write);
        match (entry.polled, interest.is_none()) {
            (false, true) => Ok(()),
            (true, true) => {
                entry.polled = false;
                self.poller.delete(&entry.source)
            }
            (true, false) => {
                self.poller
                    .modify_with_mode(entry.source.as_fd(), event, PollMode::Level)
            }
            (false, false) => {
                // SAFETY: the source keeps the descriptor open, and is deleted from the poller before
                // it is dropped (`drop_source`); the poller itself goes with `self`.
                unsafe {
                    self.poller
                        .add_with_mode(&entry.source.as_fd(), event, PollMode::Level)
                }?;
                entry.polled = true;
                Ok(())
            }
        }
    }

    pub(super) fn remove(&mut self, worker: WorkerId, token: usize) {
        let key = self
            .workers
            .get_mut(&worker)
            .and_then(|seat| seat.keys.remove(&token));
        if let Some(key) = key {
            self.drop_source(key);
        }
    }

    fn drop_source(&mut self, key: usize) {
        if let Some(entry) = self.sources.remove(&key)
            && entry.polled
            && let Err(error) = self.poller.delete(&entry.source)
        {
            tracing::error!(%error, "A source can't be taken out of the poller");
        }
    }

    pub(super) fn wake_at(&mut self, worker: WorkerId, token: usize, when: Instant) {
        self.cancel_wake(worker, token);
        if let Some(seat) = self.workers.get_mut(&worker) {
            seat.wakes.insert(token, when);
            self.wakes.insert((when, worker, token));
        }
    }

    pub(super) fn cancel_wake(&mut self, worker: WorkerId, token: usize) {
        let when = self
            .workers
            .get_mut(&worker)
            .and_then(|seat| seat.wakes.remove(&token));
        if let Some(when) = when {
            self.wakes.remove(&(when, worker, token));
        }
    }

    /// Waits for events, at most `limit`, and dispatches one batch; returns how many there were.
    pub(super) fn turn(&mut self, limit: Option<Duration>) -> io::Result<usize> {
        let next_wake = self
            .wakes
            .first()
            .map(|(when, ..)| when.saturating_duration_since(Instant::now()));
        let timeout = match (limit, next_wake) {
            (Some(limit), Some(wake)) => Some(limit.min(wake)),
            (limit, wake) => limit.or(wake),
        };
        self.events.clear();
        self.poller.wait(&mut self.events, timeout)?;

        let mut batch = std::mem::take(&mut self.batch);
        batch.extend(self.events.iter());
        let mut dispatched = 0;
        for event in batch.drain(..) {
            if let Some(entry) = self.sources.get(&event.key) {
                let (worker, token) = (entry.worker, entry.token);
                let readiness = Readiness {
                    readable: event.readable,
                    writable: event.writable,
                    timer: false,
                };
                self.with(worker, |worker, control| {
                    worker.ready(control, token, readiness)
                });
                dispatched += 1;
            }
        }
        self.batch = batch;

        if !self.wakes.is_empty() {
            let now = Instant::now();
            let later = self.wakes.split_off(&(now, WorkerId(u64::MAX), usize::MAX));
            for (_, worker, token) in std::mem::replace(&mut self.wakes, later) {
                let due = self.workers.get_mut(&worker).and_then(|seat| {
                    // Cancelled or moved by a worker that ran just before?
                    seat.wakes
                        .get(&token)
                        .is_some_and(|when| *when <= now)
                        .then(|| seat.wakes.remove(&token))
                });
                if due.is_some() {
                    let readiness = Readiness {
                        timer: true,
                        ..Readiness::default()
                    };
                    self.with(worker, |worker, control| {
                        worker.ready(control, token, readiness)
                    });
                    dispatched += 1;
                }
            }
        }
        Ok(dispatched)
    }
}
