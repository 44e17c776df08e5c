//! A device's worker, at work or held still.

use std::fmt;
use std::io;

use super::QuiesceError;
use crate::sys::reactor::{self, ReactorHandle, Running, Stopped};

/// A worker that can be held still between two events, with everything it owns.
pub(super) struct Active<W> {
    reactor: ReactorHandle,
    worker: State<W>,
}

enum State<W> {
    Running(Running<W>),
    Still(Box<W>),
    /// Its reactor ended before it was asked for.
    Lost,
}

impl<W: reactor::Worker> Active<W> {
    /// Hands `worker` to the reactor; see [`ReactorHandle::spawn`].
    pub(super) fn spawn(reactor: ReactorHandle, worker: W) -> io::Result<Self> {
        let worker = State::Running(reactor.spawn(worker)?);
        Ok(Self { reactor, worker })
    }

    /// Takes the worker off its reactor; does nothing to one that is held already.
    pub(super) fn quiesce(&mut self) -> Result<(), Stopped> {
        self.quiesce_with(|_| ())
    }

    /// The same, with something to be done last, on the reactor's thread.
    pub(super) fn quiesce_with(
        &mut self,
        finish: impl FnOnce(&mut W) + Send + 'static,
    ) -> Result<(), Stopped> {
        match std::mem::replace(&mut self.worker, State::Lost) {
            State::Running(running) => {
                self.worker = State::Still(Box::new(running.stop_with(finish)?));
            }
            State::Still(worker) => self.worker = State::Still(worker),
            State::Lost => return Err(Stopped),
        }
        Ok(())
    }

    /// Puts a worker that is held back; does nothing to one that is at work.
    pub(super) fn resume(&mut self) -> io::Result<()> {
        match std::mem::replace(&mut self.worker, State::Lost) {
            State::Still(worker) => {
                self.worker = State::Running(self.reactor.spawn(*worker)?);
            }
            other => self.worker = other,
        }
        Ok(())
    }

    /// The worker, while it is held.
    pub(super) fn still(&self) -> Option<&W> {
        match &self.worker {
            State::Still(worker) => Some(worker),
            State::Running(_) | State::Lost => None,
        }
    }

    /// The same, to be changed.
    pub(super) fn still_mut(&mut self) -> Option<&mut W> {
        match &mut self.worker {
            State::Still(worker) => Some(worker),
            State::Running(_) | State::Lost => None,
        }
    }

    /// The worker, for good, with something to be done last if it is at work.
    pub(super) fn stop_with(
        self,
        finish: impl FnOnce(&mut W) + Send + 'static,
    ) -> Result<W, Stopped> {
        match self.worker {
            State::Running(running) => running.stop_with(finish),
            State::Still(worker) => Ok(*worker),
            State::Lost => Err(Stopped),
        }
    }
}

impl<W> fmt::Debug for Active<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.worker {
            State::Running(_) => "Running",
            State::Still(_) => "Still",
            State::Lost => "Lost",
        })
    }
}

/// Holds a device's worker still, if it has one.
pub(super) fn quiesce<W: reactor::Worker>(
    active: &mut Option<Active<W>>,
    device: &str,
) -> Result<(), QuiesceError> {
    match active {
        Some(active) => active.quiesce().map_err(|Stopped| QuiesceError {
            device: device.to_owned(),
        }),
        None => Ok(()),
    }
}

/// Lets a device's worker go on, if it has one.
pub(super) fn resume<W: reactor::Worker>(active: &mut Option<Active<W>>) -> io::Result<()> {
    match active {
        Some(active) => active.resume(),
        None => Ok(()),
    }
}
