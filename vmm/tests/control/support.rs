//! A VMM process whose events are collected.

use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use libtest_mimic::{Failed, Trial};
use supermachine_vmm::control::{ControlError, Event, Exit, Preparation, SpawnConfig, VmHandle};

/// No test waits longer for anything.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) type Outcome = Result<(), Failed>;

/// A test that can always run.
pub(crate) fn test(name: &str, run: fn() -> Outcome) -> Trial {
    Trial::test(name, run)
}

pub(crate) struct Vm {
    pub(crate) handle: VmHandle,
    pub(crate) events: Receiver<Event>,
}

impl Vm {
    pub(crate) fn spawn(name: &str) -> Result<Self, ControlError> {
        Self::spawn_prepared(name, None)
    }

    pub(crate) fn spawn_prepared(
        name: &str,
        preparation: Option<Preparation>,
    ) -> Result<Self, ControlError> {
        let (sender, events) = mpsc::channel();
        let handle = VmHandle::spawn_prepared(
            SpawnConfig::new(name),
            preparation,
            Box::new(move |event| {
                // Nobody listens any more when a test has failed.
                let _ = sender.send(event);
            }),
        )?;
        Ok(Self { handle, events })
    }

    /// Everything up to the end, which must come, and the end itself.
    pub(crate) fn all_events(&self) -> Result<(Vec<Event>, Exit), Failed> {
        let mut before = Vec::new();
        loop {
            match self.events.recv_timeout(DEADLINE) {
                Ok(Event::Ended(exit)) => break self.nothing_follows().map(|()| (before, exit)),
                Ok(event) => before.push(event),
                Err(error) => return Err(format!("No end: {error}").into()),
            }
        }
    }

    pub(crate) fn end(&self) -> Result<Exit, Failed> {
        Ok(self.all_events()?.1)
    }

    /// The supervisor drops the callback, and with it the sender, after the last event.
    fn nothing_follows(&self) -> Outcome {
        match self.events.recv_timeout(DEADLINE) {
            Err(mpsc::RecvTimeoutError::Disconnected) => Ok(()),
            other => Err(format!("After the end came {other:?}").into()),
        }
    }
}

/// Whether the process is there, a zombie included.
pub(crate) fn exists(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

pub(crate) fn kill_9(pid: u32) -> Outcome {
    let pid = rustix::process::Pid::from_raw(pid as i32).ok_or("no pid")?;
    Ok(rustix::process::kill_process(
        pid,
        rustix::process::Signal::KILL,
    )?)
}

pub(crate) fn check(condition: bool, message: impl Into<String>) -> Outcome {
    if condition {
        return Ok(());
    }
    Err(message.into().into())
}

pub(crate) fn check_eq<T: PartialEq + std::fmt::Debug>(found: T, expected: T) -> Outcome {
    check(
        found == expected,
        format!("found {found:?}, expected {expected:?}"),
    )
}

/// Checks that a VM ended by a fault whose reason holds `part`.
pub(crate) fn check_fault(exit: &Exit, part: &str) -> Outcome {
    match exit {
        Exit::Fault(reason) if reason.contains(part) => Ok(()),
        exit => Err(format!("found {exit:?}, expected a fault with {part:?}").into()),
    }
}
