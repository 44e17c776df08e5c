//! Creating a container: from a request to a machine whose agent holds it.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use supermachine_protocol as protocol;
use tokio::sync::watch;

use super::machine::{Launched, Machine};
use super::pause::Pause;
use super::ports::Ports;
use super::process::Process;
use super::pump::{Progress, said};
use super::vm::blocking;
use super::{Container, Entry, Error, Event, Inner, Kind, Sandbox, Slot, Vm};
use crate::acquire::stdio::{self, Held, Streams};
use crate::agent::Agent;
use crate::hooks::{self, Hooks};
use crate::request;

impl Sandbox {
    /// Boots a machine with the container in it, whose program does not run yet. Answers the pid
    /// that stands for it.
    ///
    /// When this fails nothing of the container is left and the id is free again. It is finished
    /// or undone even if the returned future is dropped.
    ///
    /// # Errors
    ///
    /// `AlreadyExists` for an id that is taken, `Unimplemented` for a second container, and all
    /// that planning, acquiring, booting and the guest's agent can meet.
    pub async fn create(&self, request: request::Create) -> Result<u32, Error> {
        self.inner.reserve(request.id.as_str())?;
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.create(request).await }).await
    }
}

/// Runs `work` to its end even if the caller goes away.
pub(super) async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    tokio::spawn(work).await.unwrap_or_else(|error| {
        Err(Error::Machine {
            what: "a task was cut short",
            source: error.into(),
        })
    })
}

impl Inner {
    /// Keeps the sandbox's place for `id`.
    fn reserve(&self, id: &str) -> Result<(), Error> {
        let mut slot = self.slot();
        let taken = match &*slot {
            Slot::Empty => {
                *slot = Slot::Reserved(id.to_owned());
                self.creating.send_replace(true);
                return Ok(());
            }
            Slot::Reserved(taken) => taken,
            Slot::Taken(container) => &container.id,
        };
        Err(if taken == id {
            Error::refused(
                Kind::AlreadyExists,
                format!("container {id} already exists"),
            )
        } else {
            Error::refused(
                Kind::Unimplemented,
                format!(
                    "this sandbox runs container {taken}; several in one are not supported yet"
                ),
            )
        })
    }

    async fn create(self: Arc<Self>, request: request::Create) -> Result<u32, Error> {
        let result = self.launch(request).await;
        if result.is_err() {
            *self.slot() = Slot::Empty;
        }
        self.creating.send_replace(false);
        result
    }

    async fn launch(self: &Arc<Self>, request: request::Create) -> Result<u32, Error> {
        let streams = stdio::open(&request.stdio)?;
        let launched = self.launcher.launch(&request).await?;
        let machine = Arc::clone(&launched.machine);
        let mut ending = self.ending.subscribe();
        let result = tokio::select! {
            result = self.populate(request, launched, streams) => result,
            _ = ending.wait_for(|ending| *ending) => {
                Err(Error::state("the shim was told to end"))
            }
        };
        if result.is_err() {
            machine.kill().await;
            machine.release().await;
        }
        result
    }

    /// Brings the container into a machine that has just begun to run.
    async fn populate(
        self: &Arc<Self>,
        request: request::Create,
        launched: Launched,
        mut streams: Streams,
    ) -> Result<u32, Error> {
        let Launched {
            machine,
            events,
            guest,
            hooks,
        } = launched;
        let mut progress = self.watch_machine(Arc::clone(&machine), events);
        let (first, last) = self.stdio_ports;
        let mut ports = Ports::new(first, last);
        let mut init = Entry::new(Process::init(request.stdio.clone()), None);
        let stdio = assign_ports(&mut ports, &mut init, &streams)?;
        let (namespace, id) = (request.namespace.to_string(), request.id.to_string());
        start_logger(&*machine, &mut streams, &namespace, &id).await?;
        init.held = attach(&*machine, &stdio, streams).await?;
        let pid = machine.pid();
        run_hooks(&hooks, "create", move |hooks| hooks.before_create(pid)).await?;
        progress
            .agent_listens(&*machine, self.timeouts.boot)
            .await?;
        let connected = during("connecting to the agent", &mut progress.ended, async {
            let stream = machine.dial_agent().await?;
            Agent::connect(stream, &guest.hostname, self.timeouts.call).await
        });
        let (agent, agent_events) = connected.await?;

        let mut create = protocol::CreateContainerRequest::new();
        create.container_id = request.id.to_string();
        create.rootfs = Some(guest.rootfs).into();
        create.spec_json = guest.spec_json;
        create.stdio = Some(stdio).into();
        create.files = guest.files;
        let vm = Vm {
            machine,
            agent,
            ended: progress.ended,
        };
        // In place before the guest has it: what the guest reports from now on finds it here.
        *self.slot() = Slot::Taken(Box::new(Container {
            namespace,
            id: id.clone(),
            bundle: request.bundle,
            rootfs: request.rootfs,
            hooks,
            vm: vm.clone(),
            processes: [(String::new(), init)].into(),
            ports,
            pause: Pause::default(),
            stats: None,
        }));
        self.watch_agent(vm.clone(), agent_events);
        vm.call("creating the container", vm.agent.create_container(&create))
            .await?;
        self.created(&id)?;
        Ok(pid)
    }

    fn created(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        self.with(id, |container| {
            let pid = container.pid();
            let init = container
                .processes
                .get_mut("")
                .ok_or_else(|| Error::not_found("container not created"))?;
            init.process.created();
            self.tell(Event::Created {
                container_id: container.id.clone(),
                bundle: container.bundle.clone(),
                rootfs: container.rootfs.clone(),
                stdio: init.process.stdio.clone(),
                pid,
            });
            Ok(())
        })?;
        self.settle(id, "");
        Ok(())
    }
}

/// Runs hooks in a thread of their own: they take as long as they like.
pub(super) async fn run_hooks(
    hooks: &Hooks,
    during: &'static str,
    run: impl FnOnce(&Hooks) -> Result<(), hooks::Error> + Send + 'static,
) -> Result<(), Error> {
    if hooks.is_empty() {
        return Ok(());
    }
    let hooks = hooks.clone();
    blocking("running hooks for it", move || {
        run(&hooks).map_err(|source| Error::Hook { during, source })
    })
    .await
}

/// Takes a port for each stream that is there.
pub(super) fn assign_ports(
    ports: &mut Ports,
    entry: &mut Entry,
    streams: &Streams,
) -> Result<protocol::Stdio, Error> {
    let mut stdio = protocol::Stdio::new();
    stdio.terminal = entry.process.stdio.terminal;
    let mut take = |wanted: bool| -> Result<u32, Error> {
        if !wanted {
            return Ok(0);
        }
        let port = ports.take()?;
        entry.ports.push(port);
        Ok(port)
    };
    stdio.stdin_port = take(streams.stdin.is_some())?;
    stdio.stdout_port = take(streams.stdout.is_some())?;
    stdio.stderr_port = take(streams.stderr.is_some())?;
    let outputs = [stdio.stdout_port, stdio.stderr_port];
    let outputs = outputs.into_iter().filter(|port| *port != 0);
    entry.process.expect_output(outputs);
    Ok(stdio)
}

/// Starts the program that reads the output, if that is to be one, and waits until it is ready.
pub(super) async fn start_logger(
    machine: &dyn Machine,
    streams: &mut Streams,
    namespace: &str,
    id: &str,
) -> Result<(), Error> {
    let Some(logger) = streams.logger.take() else {
        return Ok(());
    };
    let logger = logger.start(namespace, id)?;
    if let Some(pid) = logger.pid()
        && let Err(error) = machine.adopt(pid)
    {
        logger.kill();
        return Err(error);
    }
    Ok(logger.ready().await?)
}

/// Hands the files over. The ends the host holds stay with the caller, in the entry.
pub(super) async fn attach(
    machine: &dyn Machine,
    plan: &protocol::Stdio,
    streams: Streams,
) -> Result<Held, Error> {
    if let Some(input) = streams.stdin {
        machine.attach(plan.stdin_port, Some(input), None).await?;
    }
    if let Some(output) = streams.stdout {
        machine.attach(plan.stdout_port, None, Some(output)).await?;
    }
    if let Some(output) = streams.stderr {
        machine.attach(plan.stderr_port, None, Some(output)).await?;
    }
    Ok(streams.held)
}

/// Waits for `work`, but not beyond the machine's end.
pub(super) async fn during<T>(
    what: &'static str,
    ended: &mut watch::Receiver<Option<String>>,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    /// How long a broken connection may be the first sign of the machine's end.
    const GRACE: Duration = Duration::from_secs(1);
    let gone = |reason: Option<String>| Error::MachineEnded {
        during: what,
        reason: reason.unwrap_or_else(|| "nobody knows why".to_owned()),
    };
    let result = tokio::select! {
        result = work => result,
        reason = end_of(ended) => return Err(gone(reason)),
    };
    match result {
        Err(Error::Connection { .. }) => match tokio::time::timeout(GRACE, end_of(ended)).await {
            Ok(reason) => Err(gone(reason)),
            Err(_) => result,
        },
        result => result,
    }
}

/// Resolves at the machine's end with its reason.
pub(super) async fn end_of(ended: &mut watch::Receiver<Option<String>>) -> Option<String> {
    match ended.wait_for(Option::is_some).await {
        Ok(reason) => reason.clone(),
        Err(_) => None,
    }
}

impl Vm {
    /// Waits for the guest's answer, but not beyond the machine's end.
    pub(super) async fn call<T>(
        &self,
        what: &'static str,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        during(what, &mut self.ended.clone(), work).await
    }
}

impl Progress {
    /// Waits for the agent to listen.
    async fn agent_listens(&mut self, machine: &dyn Machine, limit: Duration) -> Result<(), Error> {
        let Self { listening, ended } = self;
        let result = tokio::select! {
            // The sender goes with the machine only, and the other branch sees that.
            Ok(_) = listening.wait_for(|listening| *listening) => return Ok(()),
            reason = end_of(ended) => Err(reason),
            () = tokio::time::sleep(limit) => Ok(()),
        };
        Err(match result {
            Err(reason) => Error::MachineEnded {
                during: "before its agent listened",
                reason: reason.unwrap_or_default(),
            },
            Ok(()) => Error::Silent {
                limit,
                last: format!(
                    "its processors run, but its agent does not listen; {}",
                    said(machine)
                ),
            },
        })
    }
}
