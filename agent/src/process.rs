//! One process that the host knows: a container's init or an exec'd one.

use std::sync::{Arc, Mutex};

use nix::unistd::Pid;
use tokio::sync::watch;

use crate::engine::run::Waiting;
use crate::error::Error;
use crate::stdio::{self, Streams};
use crate::sys::{self, lock};

/// A process and its streams.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    streams: Mutex<Option<Streams>>,
    phase: watch::Sender<Phase>,
    /// An init before its start.
    waiting: Mutex<Option<Waiting>>,
}

/// How far a process's life has come; it only ever advances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    Created,
    Running,
    Exited,
    /// The host doesn't ask for it any more.
    Forgotten,
}

impl Process {
    pub(crate) fn new(pid: Pid, streams: Streams, waiting: Option<Waiting>) -> Self {
        Self {
            pid,
            streams: Mutex::new(Some(streams)),
            phase: watch::Sender::new(Phase::Created),
            waiting: Mutex::new(waiting),
        }
    }

    /// As the guest's init namespace numbers it.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    fn advance(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let before = *phase;
            *phase = before.max(to);
            *phase != before
        });
    }

    async fn reached(&self, wanted: Phase) {
        // The sender lives as long as the process.
        let _ = self
            .phase
            .subscribe()
            .wait_for(|phase| *phase >= wanted)
            .await;
    }

    /// What lets an init run its program; only once.
    pub(crate) fn take_waiting(&self) -> Result<Waiting, Error> {
        lock(&self.waiting)
            .take()
            .ok_or_else(|| Error::State("Container was already started".to_owned()))
    }

    pub(crate) fn set_running(self: &Arc<Self>) {
        self.advance(Phase::Running);
        if lock(&self.streams).as_ref().is_some_and(Streams::has_input) {
            let process = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(stdio::OPENING).await;
                if let Some(streams) = &*lock(&process.streams) {
                    streams.assume_opened();
                }
            });
        }
    }

    pub(crate) fn set_exited(&self) {
        self.advance(Phase::Exited);
    }

    /// Waits for the process's end.
    pub(crate) async fn exited(&self) {
        self.reached(Phase::Exited).await;
    }

    /// Finishes the streams of a process that has exited.
    pub(crate) async fn drain(&self) {
        let Some(streams) = lock(&self.streams).take() else {
            return;
        };
        tokio::select! {
            () = streams.drain() => (),
            // Whoever deletes the process doesn't want the rest.
            () = self.reached(Phase::Forgotten) => (),
        }
    }

    /// Cuts what is left of its streams.
    pub(crate) fn forget(&self) {
        self.advance(Phase::Forgotten);
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: u32) -> Result<(), Error> {
        let signal = check_signal(signal)?;
        // Until it was waited for, the number is its own.
        if self.phase() >= Phase::Exited {
            return Err(Error::Finished);
        }
        sys::kill(self.pid, signal).map_err(|error| match error.raw_os_error() {
            Some(nix::libc::ESRCH) => Error::Finished,
            _ => Error::system("send a signal")(error),
        })
    }

    pub(crate) fn resize(&self, columns: u32, rows: u32) -> Result<(), Error> {
        let fit = |size: u32| {
            u16::try_from(size)
                .map_err(|_| Error::invalid("terminal size", format!("{size} is above 65535")))
        };
        let (columns, rows) = (fit(columns)?, fit(rows)?);
        match &*lock(&self.streams) {
            Some(streams) => streams.resize(columns, rows),
            None => Err(Error::Finished),
        }
    }

    /// Ends stdin once everything received so far was delivered.
    pub(crate) fn close_input(&self) {
        if let Some(streams) = &*lock(&self.streams) {
            streams.close_input();
        }
    }
}

/// A signal's number as the kernel takes it.
pub(crate) fn check_signal(signal: u32) -> Result<i32, Error> {
    match i32::try_from(signal) {
        // SIGRTMAX of the kernel.
        Ok(signal @ 1..=64) => Ok(signal),
        _ => Err(Error::invalid(
            "signal",
            format!("{signal} is not from 1 to 64"),
        )),
    }
}
