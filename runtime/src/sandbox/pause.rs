//! Stopping a container's machine for a while.
//!
//! What a paused guest cannot be asked waits here: signals and the sizes of terminals are given to
//! it when it goes on, as a frozen process of runc's gets them then.

use std::sync::Arc;

use super::create::detached;
use super::process::Status;
use super::resources::STATS;
use super::{Container, Error, Event, Inner, Sandbox, Vm};

/// Whether the machine's processors run.
#[derive(Debug, Default)]
pub(super) enum Pause {
    #[default]
    No,
    /// A call is under way that changes it.
    Changing,
    Yes(Waiting),
}

/// What a paused guest is told when it goes on.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// In order of arrival; one that waits already is not added.
    signals: Vec<Signal>,
    /// The last for each process.
    sizes: Vec<(String, (u32, u32))>,
}

/// A signal as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Signal {
    pub(super) exec_id: String,
    pub(super) number: u32,
    pub(super) all: bool,
}

impl Waiting {
    /// As with the kernel's own, a signal that is pending is not pending twice.
    pub(super) fn signal(&mut self, signal: Signal) {
        if !self.signals.contains(&signal) {
            self.signals.push(signal);
        }
    }

    pub(super) fn resize(&mut self, exec_id: &str, size: (u32, u32)) {
        self.sizes.retain(|(known, _)| known != exec_id);
        self.sizes.push((exec_id.to_owned(), size));
    }
}

impl Container {
    /// Where a process is in its life, a paused machine considered.
    pub(super) fn status(&mut self, exec_id: &str) -> Result<Status, Error> {
        let paused = matches!(self.pause, Pause::Yes(_));
        Ok(match self.entry(exec_id)?.process.status() {
            Status::Running if paused => Status::Paused,
            status => status,
        })
    }

    /// What waits for a paused machine to go on; nothing if it isn't paused.
    pub(super) fn waiting(&mut self) -> Option<&mut Waiting> {
        match &mut self.pause {
            Pause::Yes(waiting) => Some(waiting),
            Pause::No | Pause::Changing => None,
        }
    }
}

/// Somebody else pauses or resumes it at this moment.
fn changing() -> Error {
    Error::state("the container is being paused or resumed")
}

impl Sandbox {
    /// Stops the container's machine; returns when no processor of it runs any more.
    ///
    /// # Errors
    ///
    /// `NotFound`, `FailedPrecondition` when the container does not run or is paused already, and
    /// what the machine refuses: then it runs on.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        let vm = self.inner.with(id, |container| {
            let ended = container.entry("")?.process.has_ended();
            match (container.status("")?, &container.pause) {
                (Status::Created, _) => Err(Error::state("cannot pause task in created state")),
                (Status::Stopped, _) => Err(Error::state("cannot pause a stopped container")),
                (Status::Paused, _) => Err(Error::state("cannot pause a paused container")),
                (Status::Running, Pause::Changing) => Err(changing()),
                (Status::Running, _) if ended => {
                    Err(Error::state("cannot pause a container that has ended"))
                }
                (Status::Running, _) => {
                    container.pause = Pause::Changing;
                    Ok(container.vm.clone())
                }
            }
        })?;
        let (inner, id) = (Arc::clone(&self.inner), id.to_owned());
        detached(async move { inner.pause(&id, &vm).await }).await
    }

    /// Lets a paused machine go on.
    ///
    /// # Errors
    ///
    /// `NotFound`, `FailedPrecondition` when it is not paused, and what the machine refuses.
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        let (vm, waiting) = self.inner.with(id, |container| {
            match container.status("")? {
                Status::Created => return Err(Error::state("cannot resume task in created state")),
                Status::Stopped => return Err(Error::state("cannot resume a stopped container")),
                Status::Running if matches!(container.pause, Pause::Changing) => {
                    return Err(changing());
                }
                Status::Running => return Err(Error::state("cannot resume a running process")),
                Status::Paused => {}
            }
            Ok((container.vm.clone(), container.take_waiting()))
        })?;
        let (inner, id) = (Arc::clone(&self.inner), id.to_owned());
        detached(async move { inner.resume(&id, &vm, waiting, true).await }).await
    }
}

impl Container {
    /// Marks a paused machine as changing.
    fn take_waiting(&mut self) -> Waiting {
        match std::mem::replace(&mut self.pause, Pause::Changing) {
            Pause::Yes(waiting) => waiting,
            Pause::No | Pause::Changing => Waiting::default(),
        }
    }
}

impl Inner {
    async fn pause(self: &Arc<Self>, id: &str, vm: &Vm) -> Result<(), Error> {
        // What is told of it while it is paused.
        if let Err(error) = self.ask_stats(id, vm, STATS).await {
            tracing::debug!(error = error.chain(), "no statistics before a pause");
        }
        let paused = vm.machine.pause().await;
        let ended = self.with(id, |container| {
            container.pause = Pause::No;
            if paused.is_err() {
                return Ok(false);
            }
            // It may have ended while it was being stopped.
            if container.status("")? == Status::Stopped {
                return Ok(true);
            }
            container.pause = Pause::Yes(Waiting::default());
            self.tell(Event::Paused {
                container_id: container.id.clone(),
            });
            Ok(false)
        })?;
        if ended {
            vm.machine.resume().await?;
            return Err(Error::state("cannot pause a stopped container"));
        }
        paused
    }

    async fn resume(
        self: &Arc<Self>,
        id: &str,
        vm: &Vm,
        waiting: Waiting,
        tell: bool,
    ) -> Result<(), Error> {
        let resumed = vm.machine.resume().await;
        let waiting = self.with(id, |container| {
            if resumed.is_err() {
                container.pause = Pause::Yes(waiting);
                return Ok(None);
            }
            container.pause = Pause::No;
            if tell {
                self.tell(Event::Resumed {
                    container_id: container.id.clone(),
                });
            }
            Ok(Some(waiting))
        })?;
        let Some(Waiting { signals, sizes }) = waiting else {
            return resumed;
        };
        for (exec_id, (columns, rows)) in sizes {
            let resize = vm.agent.resize(id, &exec_id, columns, rows);
            if let Err(error) = vm.call("resizing a terminal", resize).await {
                tracing::warn!(error = error.chain(), "a terminal keeps its size");
            }
        }
        for signal in signals {
            let (exec_id, number) = (&signal.exec_id, signal.number);
            let sent = vm.agent.signal(id, exec_id, number, signal.all);
            if let Err(error) = vm.call("sending a signal", sent).await {
                tracing::warn!(number, error = error.chain(), "a signal was not delivered");
            }
        }
        Ok(())
    }

    /// Has a machine that is paused go on before it is ended, so that it can end in good order.
    /// Nobody is told: what follows is its end.
    pub(super) async fn resume_to_end(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let paused = self.with(id, |container| {
            Ok(matches!(container.pause, Pause::Yes(_)).then(|| {
                // Nobody will see the new sizes, and the signals come too late.
                container.take_waiting();
                container.vm.clone()
            }))
        })?;
        match paused {
            Some(vm) => self.resume(id, &vm, Waiting::default(), false).await,
            None => Ok(()),
        }
    }
}
