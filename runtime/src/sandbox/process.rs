//! The life of one process of a container: a state machine without I/O.
//!
//! `Creating -> Created -> Starting -> Running -> Stopped -> Deleting`. The stages that end in
//! "-ing" are calls under way in the guest: what arrives meanwhile (an exit, the machine's end) is
//! kept and takes effect when the call is over, so that nobody hears of an exit before the start.

use std::collections::BTreeSet;

use tokio::sync::watch;

use super::error::Error;
use crate::events::Exit;
use crate::request::Stdio;

/// What containerd calls a process's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It exists, its program does not run yet.
    Created,
    /// Its program runs.
    Running,
    /// It would run, but its machine is paused.
    Paused,
    /// It has ended; its exit status is kept.
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Creating,
    Created,
    Starting,
    Running,
    Stopped,
    Deleting,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    ToBegin,
    Underway,
    Over,
}

/// One process: a container's init or an exec'd one.
#[derive(Debug)]
pub(super) struct Process {
    /// Where its streams go, as asked for.
    pub(super) stdio: Stdio,
    stage: Stage,
    /// What the guest reported, or what the machine's end made of it.
    reported: Option<Exit>,
    /// Ports whose output has not all been delivered yet.
    draining: BTreeSet<u32>,
    /// Whether clients have read the output that was delivered to them.
    reading: Reading,
    /// What it wrote is on its way to its snapshot.
    saving: bool,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    /// A container's init process, whose creation in the guest is about to begin.
    pub(super) fn init(stdio: Stdio) -> Self {
        Self::new(stdio, Stage::Creating)
    }

    /// A further process, known to the host alone until it is started.
    pub(super) fn exec(stdio: Stdio) -> Self {
        Self::new(stdio, Stage::Created)
    }

    fn new(stdio: Stdio, stage: Stage) -> Self {
        Self {
            stdio,
            stage,
            reported: None,
            draining: BTreeSet::new(),
            reading: Reading::ToBegin,
            saving: false,
            exit: watch::Sender::new(None),
        }
    }

    pub(super) fn status(&self) -> Status {
        match self.stage {
            Stage::Creating | Stage::Created | Stage::Starting => Status::Created,
            Stage::Running => Status::Running,
            Stage::Stopped | Stage::Deleting => Status::Stopped,
        }
    }

    /// How it ended, once that is public.
    pub(super) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Resolves as soon as the exit is public; at once when it already is.
    pub(super) fn exit_watch(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }

    /// The exit waits for these ports to close.
    pub(super) fn expect_output(&mut self, ports: impl IntoIterator<Item = u32>) {
        self.draining.extend(ports);
    }

    /// The guest has created it.
    pub(super) fn created(&mut self) {
        debug_assert_eq!(self.stage, Stage::Creating);
        self.stage = Stage::Created;
    }

    /// Whether it may be started; from here until `started` or `start_failed` nobody else may.
    pub(super) fn begin_start(&mut self) -> Result<(), Error> {
        let refused = match self.stage {
            Stage::Created => {
                self.stage = Stage::Starting;
                return Ok(());
            }
            Stage::Creating => "process not created",
            Stage::Starting | Stage::Running => "cannot start a running process",
            Stage::Stopped => "cannot start a stopped process",
            Stage::Deleting => "cannot start a deleted process",
        };
        Err(Error::state(refused))
    }

    /// Its program runs.
    pub(super) fn started(&mut self) {
        self.stage = Stage::Running;
    }

    /// Its program could not be run; there is nothing left to wait for.
    pub(super) fn start_failed(&mut self, unknown: Exit) -> Exit {
        self.draining.clear();
        self.stop(self.reported.unwrap_or(unknown))
    }

    /// The guest reaped it. Whether that is news.
    pub(super) fn exited(&mut self, exit: Exit) -> bool {
        let news = self.reported.is_none();
        self.reported.get_or_insert(exit);
        news
    }

    /// Whether its end is known, public or not.
    pub(super) fn has_ended(&self) -> bool {
        self.reported.is_some()
    }

    /// The exit waits for what it wrote to be saved, whatever becomes of the machine meanwhile.
    pub(super) fn saving(&mut self) {
        self.saving = true;
    }

    /// What it wrote is saved, or lost.
    pub(super) fn saved(&mut self) {
        self.saving = false;
    }

    /// Everything written to the port has been delivered.
    pub(super) fn port_closed(&mut self, port: u32) {
        self.draining.remove(&port);
    }

    /// Nobody reads what is left of its output: stop waiting for that.
    pub(super) fn give_up_output(&mut self) {
        self.draining.clear();
        self.reading = Reading::Over;
    }

    /// It has ended and its output is delivered, but not known to be read: from here until `read`
    /// its exit waits for that. True once.
    pub(super) fn begins_reading(&mut self) -> bool {
        let begins = self.reading == Reading::ToBegin && self.is_settled();
        if begins {
            self.reading = Reading::Underway;
        }
        begins
    }

    /// Its output is read, or had its time.
    pub(super) fn read(&mut self) {
        self.reading = Reading::Over;
    }

    /// The machine is gone: an end nobody reported becomes `exit`, output still under way is lost.
    pub(super) fn lost(&mut self, exit: Exit) {
        self.exited(exit);
        self.draining.clear();
    }

    /// Whether its end is known but output is still being delivered.
    pub(super) fn is_draining(&self) -> bool {
        self.reported.is_some() && !self.draining.is_empty() && self.exit().is_none()
    }

    /// Makes the exit public when everything that must come before it has: answers it exactly once.
    pub(super) fn settle(&mut self) -> Option<Exit> {
        let ready = self.is_settled() && self.reading != Reading::Underway;
        match self.reported {
            Some(exit) if ready => Some(self.stop(exit)),
            _ => None,
        }
    }

    fn is_settled(&self) -> bool {
        matches!(self.stage, Stage::Created | Stage::Running)
            && self.reported.is_some()
            && self.draining.is_empty()
            && !self.saving
    }

    fn stop(&mut self, exit: Exit) -> Exit {
        self.stage = Stage::Stopped;
        self.exit.send_replace(Some(exit));
        exit
    }

    /// Whether a signal may be sent to it.
    pub(super) fn check_signal(&self, is_exec: bool) -> Result<(), Error> {
        match self.stage {
            Stage::Running => Ok(()),
            // A created init process waits in the guest; a created exec exists on the host only.
            Stage::Created if !is_exec => Ok(()),
            Stage::Creating | Stage::Created | Stage::Starting => {
                Err(Error::state("process not created"))
            }
            Stage::Stopped | Stage::Deleting => Err(Error::not_found("process already finished")),
        }
    }

    /// Whether it may be deleted; from here on nobody else may. `Ok(None)`: it never ended, since
    /// it never ran.
    pub(super) fn begin_delete(&mut self) -> Result<Option<Exit>, Error> {
        match self.stage {
            Stage::Created | Stage::Stopped => {
                self.stage = Stage::Deleting;
                Ok(self.exit())
            }
            Stage::Creating => Err(Error::state(
                "cannot delete a process that is being created",
            )),
            Stage::Starting | Stage::Running => {
                Err(Error::state("cannot delete a running process"))
            }
            Stage::Deleting => Err(Error::not_found("cannot delete a deleted process")),
        }
    }

    /// It was deleted without ever having run: waiters hear this.
    pub(super) fn end_unrun(&mut self, exit: Exit) -> Exit {
        self.exit.send_replace(Some(exit));
        exit
    }
}
