//! What machine and agent report becomes state and events.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use supermachine_protocol as protocol;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::watch;

use super::create::end_of;
use super::machine::{Ending, Event as MachineEvent, Machine};
use super::process::Status;
use super::{Container, Error, Event, Exit, Inner, Slot, Vm, killed_exit, unknown_exit};
use crate::agent;

/// How far a machine has come.
pub(super) struct Progress {
    pub(super) listening: watch::Receiver<bool>,
    pub(super) ended: watch::Receiver<Option<String>>,
}

/// What a machine that has ended logged last, in words.
async fn last_words(machine: &dyn Machine) -> String {
    /// How long its log may take to end: another process can hold the pipe open.
    const GRACE: Duration = Duration::from_secs(1);
    let _ = tokio::time::timeout(GRACE, machine.log_ended()).await;
    said(machine)
}

/// What a machine has logged so far, in words.
pub(super) fn said(machine: &dyn Machine) -> String {
    match machine.last_words() {
        words if words.is_empty() => "it logged nothing".to_owned(),
        words => format!("the last it logged is: {words}"),
    }
}

impl Inner {
    /// Follows the machine until its end.
    pub(super) fn watch_machine(
        self: &Arc<Self>,
        machine: Arc<dyn Machine>,
        mut events: UnboundedReceiver<MachineEvent>,
    ) -> Progress {
        let (listening_tx, listening) = watch::channel(false);
        let (ended_tx, ended) = watch::channel(None);
        let inner = Arc::clone(self);
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                match event {
                    MachineEvent::PortOpened(protocol::AGENT_CONSOLE_PORT) => {
                        listening_tx.send_replace(true);
                    }
                    MachineEvent::PortOpened(port) => inner.port_opened(port),
                    MachineEvent::PortClosed(port) => inner.port_closed(port),
                    MachineEvent::Ended { mut reason, how } => {
                        if how == Ending::Failed || !*listening_tx.borrow() {
                            reason = format!("{reason}; {}", last_words(&*machine).await);
                        }
                        if how == Ending::Failed {
                            tracing::warn!(reason, "the virtual machine failed");
                        } else {
                            tracing::info!(reason, "the virtual machine ended");
                        }
                        // First: whoever waits for the guest then finds why it does not answer.
                        ended_tx.send_replace(Some(reason));
                        inner.machine_ended(how);
                        return;
                    }
                }
            }
            ended_tx.send_replace(Some("its process vanished".to_owned()));
            inner.machine_ended(Ending::Failed);
        });
        Progress { listening, ended }
    }

    /// Follows the agent until its connection ends; a machine without one is of no use.
    pub(super) fn watch_agent(self: &Arc<Self>, mut vm: Vm, mut events: agent::Events) {
        let inner = Arc::clone(self);
        tokio::spawn(async move {
            let why = loop {
                match events.recv().await {
                    Ok(Some(event)) => inner.agent_event(event),
                    Ok(None) => break "it closed the event stream".to_owned(),
                    Err(error) => break agent::clean(&error.to_string()),
                }
            };
            let limit = inner.timeouts.stop;
            if tokio::time::timeout(limit, end_of(&mut vm.ended))
                .await
                .is_err()
            {
                tracing::warn!(why, "lost the guest's agent, ending its machine");
                vm.machine.kill().await;
            }
        });
    }

    fn agent_event(self: &Arc<Self>, event: protocol::Event) {
        match event.kind {
            Some(protocol::event::Kind::Exit(exit)) => self.process_exited(&exit),
            Some(protocol::event::Kind::Oom(oom)) => {
                let known = self.with(&oom.container_id, |container| Ok(container.id.clone()));
                if let Ok(container_id) = known {
                    self.tell(Event::OutOfMemory { container_id });
                }
            }
            _ => {}
        }
    }

    fn process_exited(self: &Arc<Self>, report: &protocol::Exit) {
        let exit = Exit {
            // The host's clock: the guest's is its own affair.
            at: SystemTime::now(),
            status: report.status.min(super::STATUS_UNKNOWN),
        };
        let (id, exec_id) = (&report.container_id, &report.exec_id);
        let reported = self.with_process(id, exec_id, |entry, vm| {
            let save = entry.process.exited(exit) && report.changes && exec_id.is_empty();
            if save {
                entry.process.saving();
            }
            Ok((entry.process.is_draining(), save.then(|| vm.clone())))
        });
        match reported {
            Ok((draining, save)) => {
                if draining {
                    self.bound_drain(id.clone(), exec_id.clone());
                }
                if let Some(vm) = save {
                    self.save_changes(vm, id.clone());
                }
            }
            Err(_) => {
                let exec_id = agent::clean(exec_id);
                tracing::warn!(exec_id, "the guest reports the exit of an unknown process");
            }
        }
        self.settle(id, exec_id);
    }

    /// Lets the exit of a container wait until what it wrote is in its snapshot.
    fn save_changes(self: &Arc<Self>, vm: Vm, id: String) {
        let inner = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = vm.machine.save_changes(&id).await {
                let error = error.chain();
                tracing::error!(id, error, "what the container wrote is not in its snapshot");
            }
            let _ = inner.with_process(&id, "", |entry, _| {
                entry.process.saved();
                Ok(())
            });
            inner.settle(&id, "");
        });
    }

    /// Output that nobody takes must not hide an exit for ever.
    fn bound_drain(self: &Arc<Self>, id: String, exec_id: String) {
        let inner = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(inner.timeouts.drain).await;
            let gave_up = inner.with_process(&id, &exec_id, |entry, _| {
                let draining = entry.process.is_draining();
                entry.process.give_up_output();
                Ok(draining)
            });
            if let Ok(true) = gave_up {
                tracing::warn!(
                    id,
                    exec_id,
                    "output was not read in time; reporting the exit"
                );
                inner.settle(&id, &exec_id);
            }
        });
    }

    /// Lets clients read what is in their fifos before they hear of the exit: containerd's closes
    /// them as soon as it has, and what it has not read by then is lost (`cancel` of
    /// containerd's pkg/cio/io_unix.go). Nothing tells that a fifo is empty, so it is asked.
    fn bound_reading(self: &Arc<Self>, id: String, exec_id: String) {
        /// How long they may take. Where nobody reads, an exit is told so much later.
        const LIMIT: Duration = Duration::from_secs(1);
        const FIRST: Duration = Duration::from_millis(1);
        const LONGEST: Duration = Duration::from_millis(20);
        let inner = Arc::clone(self);
        tokio::spawn(async move {
            let until = Instant::now() + inner.timeouts.drain.min(LIMIT);
            let mut pause = FIRST;
            while Instant::now() < until {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST);
                let unread =
                    inner.with_process(&id, &exec_id, |entry, _| Ok(entry.held.has_unread()));
                if !unread.unwrap_or(false) {
                    break;
                }
            }
            let _ = inner.with_process(&id, &exec_id, |entry, _| {
                entry.process.read();
                Ok(())
            });
            inner.settle(&id, &exec_id);
        });
    }

    fn port_opened(&self, port: u32) {
        if let Slot::Taken(container) = &mut *self.slot() {
            container.ports.guest_opened(port);
        }
    }

    fn port_closed(self: &Arc<Self>, port: u32) {
        let mut slot = self.slot();
        let Slot::Taken(container) = &mut *slot else {
            return;
        };
        container.ports.guest_closed(port);
        let owner = container
            .processes
            .iter_mut()
            .find(|(_, entry)| entry.ports.contains(&port));
        let Some((exec_id, entry)) = owner else {
            return;
        };
        entry.process.port_closed(port);
        let (id, exec_id) = (container.id.clone(), exec_id.clone());
        drop(slot);
        self.settle(&id, &exec_id);
    }

    fn machine_ended(self: &Arc<Self>, how: Ending) {
        let exit = match how {
            Ending::Killed => killed_exit(),
            Ending::Orderly | Ending::Failed => unknown_exit(),
        };
        let mut slot = self.slot();
        let Slot::Taken(container) = &mut *slot else {
            return;
        };
        let mut exec_ids: Vec<String> = container.processes.keys().cloned().collect();
        // The init process, whose id is empty, last: its end is the container's.
        exec_ids.sort_by(|a, b| b.cmp(a));
        for entry in container.processes.values_mut() {
            // An exec that was never started is not in the guest, and stays startable in vain.
            if entry.exec.is_none() {
                entry.process.lost(exit);
            }
        }
        let id = container.id.clone();
        drop(slot);
        for exec_id in exec_ids {
            self.settle(&id, &exec_id);
        }
    }

    /// Makes a process's exit public if it is time, and gives back what it held.
    pub(super) fn settle(self: &Arc<Self>, id: &str, exec_id: &str) {
        let _ = self.with(id, |container| {
            let pid = container.pid();
            let Some(entry) = container.processes.get_mut(exec_id) else {
                return Ok(());
            };
            if entry.held.has_unread() && entry.process.begins_reading() {
                self.bound_reading(id.to_owned(), exec_id.to_owned());
            }
            if let Some(exit) = entry.process.settle() {
                self.tell_exit(container, exec_id, pid, exit);
            }
            Ok(())
        });
    }

    /// The process has stopped: tells so and frees its ports.
    pub(super) fn tell_exit(
        self: &Arc<Self>,
        container: &mut Container,
        exec_id: &str,
        pid: u32,
        exit: Exit,
    ) {
        self.tell(Event::Exited {
            container_id: container.id.clone(),
            exec_id: exec_id.to_owned(),
            pid,
            exit,
        });
        self.free_streams(container, exec_id);
    }

    /// Detaches a process's ports, whose numbers then serve others.
    pub(super) fn free_streams(self: &Arc<Self>, container: &mut Container, exec_id: &str) {
        let Some(entry) = container.processes.get_mut(exec_id) else {
            return;
        };
        debug_assert_ne!(entry.process.status(), Status::Running);
        entry.held = super::Held::default();
        let ports = std::mem::take(&mut entry.ports);
        if ports.is_empty() || container.vm.ended.borrow().is_some() {
            return;
        }
        let machine = Arc::clone(&container.vm.machine);
        let (inner, id) = (Arc::clone(self), container.id.clone());
        tokio::spawn(async move {
            for port in ports {
                machine.detach(port).await;
                let _: Result<(), Error> = inner.with(&id, |container| {
                    container.ports.host_closed(port);
                    Ok(())
                });
            }
        });
    }
}
