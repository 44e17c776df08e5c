//! What can be done with a container once it exists.

use std::sync::Arc;

use supermachine_protocol as protocol;

use super::create::{assign_ports, attach, detached, end_of, run_hooks, start_logger};
use super::pause::Signal;
use super::process::{Process, Status};
use super::{
    Container, Entry, Error, Event, Exit, Inner, Kind, Sandbox, Slot, State, Vm, killed_exit,
    unknown_exit,
};
use crate::acquire::stdio;
use crate::hooks::Hooks;
use crate::request;

/// Highest signal number there is (SIGRTMAX).
const SIGNAL_MAX: u32 = 64;
const SIGKILL: u32 = 9;

impl Sandbox {
    /// Runs a container's program, or with an `exec_id` a process described by [`exec`](Self::exec).
    /// Answers the pid that stands for it.
    ///
    /// # Errors
    ///
    /// `NotFound`, `FailedPrecondition` when it does not wait to be started, the guest's refusal;
    /// `ResourceExhausted` when no console port is free. A process that could not be started is
    /// stopped.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32, Error> {
        self.inner
            .with_process(id, exec_id, |entry, _| entry.process.begin_start())?;
        let inner = Arc::clone(&self.inner);
        let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
        detached(async move { inner.start(&id, &exec_id).await }).await
    }

    /// Describes a further process; [`start`](Self::start) runs it.
    ///
    /// # Errors
    ///
    /// `AlreadyExists` for an exec id that is taken, `FailedPrecondition` when the container does
    /// not run.
    pub fn exec(&self, request: request::Exec) -> Result<(), Error> {
        let id = request.container_id.to_string();
        self.inner.with(&id, |container| {
            let exec_id = request.exec_id.to_string();
            if container.processes.contains_key(&exec_id) {
                return Err(Error::refused(Kind::AlreadyExists, format!("id {exec_id}")));
            }
            match container.status("")? {
                Status::Running => {}
                Status::Paused => return Err(Error::state("cannot exec in a paused state")),
                Status::Created => return Err(Error::state("cannot exec in a created state")),
                Status::Stopped => return Err(Error::state("cannot exec in a stopped state")),
            }
            let process = Process::exec(request.stdio.clone());
            let entry = Entry::new(process, Some(request));
            container.processes.insert(exec_id.clone(), entry);
            self.inner.tell(Event::ExecAdded {
                container_id: container.id.clone(),
                exec_id,
            });
            Ok(())
        })
    }

    /// Sends a signal to a process; with `all`, to every process of the container.
    ///
    /// # Errors
    ///
    /// `NotFound` when it is unknown or has finished, `FailedPrecondition` when it does not exist in
    /// the guest yet, `InvalidArgument` for a number that is no signal.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        if signal > SIGNAL_MAX {
            return Err(Error::refused(
                Kind::InvalidArgument,
                format!("signal {signal} does not exist; expected 0 to {SIGNAL_MAX}"),
            ));
        }
        let vm = self.inner.with(id, |container| {
            let process = &container.entry(exec_id)?.process;
            process.check_signal(!exec_id.is_empty())?;
            if let Some(waiting) = container.waiting()
                && !(signal == SIGKILL && exec_id.is_empty())
            {
                waiting.signal(Signal {
                    exec_id: exec_id.to_owned(),
                    number: signal,
                    all,
                });
                return Ok(None);
            }
            Ok(Some(container.vm.clone()))
        })?;
        // A paused container gets it when it goes on.
        let Some(vm) = vm else { return Ok(()) };
        // Its death is the one thing that a paused container does not wait for.
        self.inner.resume_to_end(id).await?;
        let sent = vm.call(
            "sending a signal",
            vm.agent.signal(id, exec_id, signal, all),
        );
        match sent.await {
            // What cannot be killed from inside is killed from outside.
            Err(Error::Silent { .. }) if signal == SIGKILL && exec_id.is_empty() => {
                vm.machine.kill().await;
                Ok(())
            }
            Err(Error::MachineEnded { .. }) => Err(Error::not_found("process already finished")),
            result => result,
        }
    }

    /// Where a process is in its life. Never asks the guest.
    ///
    /// # Errors
    ///
    /// `NotFound`.
    pub fn state(&self, id: &str, exec_id: &str) -> Result<State, Error> {
        self.inner.with(id, |container| {
            let pid = container.pid();
            let bundle = container.bundle.clone();
            let status = container.status(exec_id)?;
            let process = &container.entry(exec_id)?.process;
            Ok(State {
                bundle,
                pid,
                status,
                stdio: process.stdio.clone(),
                exit: process.exit(),
            })
        })
    }

    /// Resolves when the process has ended and its output has been delivered; at once if it has.
    ///
    /// # Errors
    ///
    /// `NotFound`, also when it is deleted without ever having run.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, Error> {
        let mut exit = self
            .inner
            .with_process(id, exec_id, |entry, _| Ok(entry.process.exit_watch()))?;
        let exit = exit.wait_for(Option::is_some).await.map(|exit| *exit);
        exit.ok()
            .flatten()
            .ok_or_else(|| Error::not_found("process was deleted"))
    }

    /// Forgets a process that does not run. With its init process goes the container, its machine
    /// and everything that was acquired for it: when this returns, nothing is left.
    ///
    /// # Errors
    ///
    /// `NotFound`, `FailedPrecondition` when it runs.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(u32, Exit), Error> {
        let (exit, pid) = self.inner.with(id, |container| {
            let pid = container.pid();
            if container.status(exec_id)? == Status::Paused {
                return Err(Error::state("cannot delete a paused container"));
            }
            Ok((container.entry(exec_id)?.process.begin_delete()?, pid))
        })?;
        let inner = Arc::clone(&self.inner);
        let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
        detached(async move {
            let exit = if exec_id.is_empty() {
                inner.delete_container(&id, exit).await?
            } else {
                inner.delete_exec(&id, &exec_id, exit).await?
            };
            Ok((pid, exit))
        })
        .await
    }

    /// Changes the size of a process's terminal.
    ///
    /// # Errors
    ///
    /// `NotFound`, `FailedPrecondition` when it has stopped, the guest's refusal.
    pub async fn resize(
        &self,
        id: &str,
        exec_id: &str,
        columns: u32,
        rows: u32,
    ) -> Result<(), Error> {
        let vm = self.inner.with(id, |container| {
            let status = container.status(exec_id)?;
            let vm = container.vm.clone();
            let entry = container.entry(exec_id)?;
            match status {
                Status::Stopped => Err(Error::state("cannot resize a stopped container")),
                _ if !entry.process.stdio.terminal => Ok(None),
                Status::Paused => {
                    if let Some(waiting) = container.waiting() {
                        waiting.resize(exec_id, (columns, rows));
                    }
                    Ok(None)
                }
                // An exec gets its terminal when it is started.
                Status::Created if !exec_id.is_empty() => {
                    entry.size = Some((columns, rows));
                    Ok(None)
                }
                _ => Ok(Some(vm)),
            }
        })?;
        let Some(vm) = vm else { return Ok(()) };
        vm.call(
            "resizing a terminal",
            vm.agent.resize(id, exec_id, columns, rows),
        )
        .await
    }

    /// Lets a process's stdin end, once its client has closed it too.
    ///
    /// # Errors
    ///
    /// `NotFound`.
    pub fn close_stdin(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        self.inner.with_process(id, exec_id, |entry, _| {
            entry.held.stdin = None;
            Ok(())
        })
    }

    /// The pid that stands for a container.
    ///
    /// # Errors
    ///
    /// `NotFound`.
    pub fn pid(&self, id: &str) -> Result<u32, Error> {
        self.inner.with(id, |container| Ok(container.pid()))
    }

    /// Whether it may be ended: nothing is in it, or nothing that anybody has been told of. Who asks
    /// for the end while a container is being created has given that up.
    pub fn is_idle(&self) -> bool {
        *self.inner.creating.borrow() || self.is_empty()
    }

    /// Whether nothing is in it, nor on its way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        matches!(&*self.inner.slot(), Slot::Empty)
    }

    /// Ends whatever runs or is being created, by force, and gives everything back.
    pub async fn end(&self) {
        self.inner.ending.send_replace(true);
        let mut creating = self.inner.creating.subscribe();
        // It undoes what it has done. The sender lives as long as this.
        let _ = creating.wait_for(|creating| !creating).await;
        let vm = match &*self.inner.slot() {
            Slot::Taken(container) => container.vm.clone(),
            Slot::Empty | Slot::Reserved(_) => return,
        };
        vm.machine.kill().await;
        end_of(&mut vm.ended.clone()).await;
        vm.machine.release().await;
    }
}

impl Container {
    pub(super) fn entry(&mut self, exec_id: &str) -> Result<&mut Entry, Error> {
        self.processes
            .get_mut(exec_id)
            .ok_or_else(|| Error::not_found(format!("process does not exist {exec_id}")))
    }
}

impl Inner {
    /// Starts a process that has been marked as starting.
    async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32, Error> {
        let (vm, hooks) = self.with(id, |container| {
            Ok((container.vm.clone(), container.hooks.clone()))
        })?;
        let result = if exec_id.is_empty() {
            self.start_init(&vm, hooks, id).await
        } else {
            self.start_exec(&vm, id, exec_id).await
        };
        let pid = vm.machine.pid();
        match result {
            Ok(()) => {
                self.with_process(id, exec_id, |entry, _| {
                    entry.process.started();
                    self.tell(started(id, exec_id, pid));
                    Ok(())
                })?;
                self.settle(id, exec_id);
                Ok(pid)
            }
            Err(error) => {
                self.start_failed(id, exec_id);
                // A guest that does not answer a start is in no known state.
                if matches!(error, Error::Silent { .. }) && exec_id.is_empty() {
                    vm.machine.kill().await;
                }
                Err(error)
            }
        }
    }

    /// Lets the container's program run, and the host what comes after that.
    async fn start_init(&self, vm: &Vm, hooks: Hooks, id: &str) -> Result<(), Error> {
        let call = vm.agent.start_container(id);
        vm.call("starting the container", call).await?;
        let pid = vm.machine.pid();
        let after = run_hooks(&hooks, "start", move |hooks| hooks.after_start(pid)).await;
        if after.is_err() {
            // As runc has it: without them the container is not what it was to be.
            vm.machine.kill().await;
        }
        after
    }

    fn start_failed(self: &Arc<Self>, id: &str, exec_id: &str) {
        let _ = self.with(id, |container| {
            let pid = container.pid();
            let exit = container
                .entry(exec_id)?
                .process
                .start_failed(unknown_exit());
            if exec_id.is_empty() {
                // It did exist, waiting to be started.
                self.tell_exit(container, exec_id, pid, exit);
            } else {
                self.free_streams(container, exec_id);
            }
            Ok(())
        });
    }

    async fn start_exec(self: &Arc<Self>, vm: &Vm, id: &str, exec_id: &str) -> Result<(), Error> {
        let (exec, mut streams, stdio, namespace) = self.with(id, |container| {
            let Container {
                namespace,
                processes,
                ports,
                ..
            } = container;
            let entry = processes
                .get_mut(exec_id)
                .ok_or_else(|| Error::not_found(format!("process does not exist {exec_id}")))?;
            let exec = entry
                .exec
                .take()
                .ok_or_else(|| Error::state("cannot start a stopped process"))?;
            let streams = stdio::open(&exec.stdio)?;
            let stdio = assign_ports(ports, entry, &streams)?;
            Ok((exec, streams, stdio, namespace.clone()))
        })?;
        start_logger(&*vm.machine, &mut streams, &namespace, exec_id).await?;
        let held = attach(&*vm.machine, &stdio, streams).await?;
        self.with_process(id, exec_id, |entry, _| {
            entry.held = held;
            Ok(())
        })?;
        let mut request = protocol::ExecProcessRequest::new();
        request.container_id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        request.process_json =
            serde_json::to_vec(&exec.process).map_err(|source| Error::Encode { source })?;
        request.stdio = Some(stdio).into();
        vm.call("starting a process", vm.agent.exec(&request))
            .await?;
        let size = self.with_process(id, exec_id, |entry, _| Ok(entry.size.take()))?;
        if let Some((columns, rows)) = size {
            let resize = vm.agent.resize(id, exec_id, columns, rows);
            // It runs; a wrong size is no reason to say otherwise.
            if let Err(error) = vm.call("resizing a terminal", resize).await {
                tracing::warn!(%error, "could not set the size of a new terminal");
            }
        }
        Ok(())
    }

    async fn delete_exec(
        self: &Arc<Self>,
        id: &str,
        exec_id: &str,
        exit: Option<Exit>,
    ) -> Result<Exit, Error> {
        let ran = self.with_process(id, exec_id, |entry, vm| {
            Ok(entry.exec.is_none().then(|| vm.clone()))
        })?;
        if let Some(vm) = ran {
            let call = vm.agent.delete_process(id, exec_id);
            if let Err(error) = vm.call("deleting a process", call).await {
                tracing::debug!(%error, exec_id, "the guest did not forget a process");
            }
        }
        self.with(id, |container| {
            let exit = match (exit, container.entry(exec_id)) {
                (Some(exit), _) => exit,
                (None, Ok(entry)) => entry.process.end_unrun(unknown_exit()),
                (None, Err(_)) => unknown_exit(),
            };
            container.processes.remove(exec_id);
            Ok(exit)
        })
    }

    async fn delete_container(
        self: &Arc<Self>,
        id: &str,
        exit: Option<Exit>,
    ) -> Result<Exit, Error> {
        let exit = match exit {
            Some(exit) => exit,
            // It never ran, but it did exist: it ends now.
            None => self.with(id, |container| {
                let pid = container.pid();
                let exit = container.entry("")?.process.end_unrun(killed_exit());
                self.tell_exit(container, "", pid, exit);
                Ok(exit)
            })?,
        };
        let vm = self.with(id, |container| Ok(container.vm.clone()))?;
        if let Err(error) = self.resume_to_end(id).await {
            tracing::debug!(error = error.chain(), "a paused machine did not go on");
        }
        self.stop_machine(&vm).await;
        vm.machine.release().await;
        let pid = vm.machine.pid();
        *self.slot() = Slot::Empty;
        self.tell(Event::Deleted {
            container_id: id.to_owned(),
            pid,
            exit,
        });
        Ok(exit)
    }

    /// Ends the machine, in good order if the guest plays along.
    async fn stop_machine(&self, vm: &Vm) {
        let mut ended = vm.ended.clone();
        let orderly = async {
            let limit = self.timeouts.stop;
            vm.call("shutting down", vm.agent.shutdown(limit)).await?;
            end_of(&mut ended).await;
            Ok::<_, Error>(())
        };
        let outcome = tokio::time::timeout(self.timeouts.stop, orderly).await;
        if vm.ended.borrow().is_none() {
            tracing::warn!(?outcome, "the guest did not power off; killing its machine");
            vm.machine.kill().await;
            end_of(&mut vm.ended.clone()).await;
        }
    }
}

fn started(id: &str, exec_id: &str, pid: u32) -> Event {
    let container_id = id.to_owned();
    if exec_id.is_empty() {
        Event::Started { container_id, pid }
    } else {
        Event::ExecStarted {
            container_id,
            exec_id: exec_id.to_owned(),
            pid,
        }
    }
}
