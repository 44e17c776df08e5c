//! Containers and their processes.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use oci_spec::runtime::{LinuxCapabilities, LinuxResources, Process as OciProcess, Spec};
use supermachine_protocol::{CreateContainerRequest, ExecProcessRequest, StatsResponse};
use tokio::sync::oneshot;

use crate::bundle::{self, Bundle};
use crate::cgroup::Cgroup;
use crate::changes::Changes;
use crate::engine::run::{Made, Making, Order};
use crate::error::Error;
use crate::events::Events;
use crate::oom;
use crate::platform::Platform;
use crate::process::{Phase, Process, check_signal};
use crate::pump::Pump;
use crate::reaper::{ExitStatus, Reaper};
use crate::rootfs::Layers;
use crate::stdio::Ports;
use crate::sys::lock;

/// Everything that containers are made with.
pub(crate) struct Workshop {
    pub(crate) platform: Box<dyn Platform>,
    pub(crate) reaper: Arc<Reaper>,
    pub(crate) pump: Pump,
    pub(crate) events: Arc<Events>,
    pub(crate) layers: Layers,
    /// One directory per container, with its config and root file system.
    pub(crate) containers: PathBuf,
    /// libcontainer's own state.
    pub(crate) state: PathBuf,
    /// Sockets through which terminals come.
    pub(crate) consoles: PathBuf,
    /// How many there have been.
    pub(crate) consoles_made: AtomicU64,
}

impl Workshop {
    /// A path for a terminal's socket. Not by the process's names, which are too long: the path of a
    /// socket has 107 bytes, and with Docker two names have 128.
    fn console(&self) -> PathBuf {
        let number = self.consoles_made.fetch_add(1, Ordering::Relaxed);
        self.consoles.join(number.to_string())
    }
}

/// A container that was created and not yet deleted.
pub(crate) struct Container {
    id: String,
    cgroup: Cgroup,
    oom: Arc<oom::Watch>,
    init: Arc<Process>,
    /// The init process's, for exec'd processes that say nothing of theirs.
    capabilities: LinuxCapabilities,
    execs: Mutex<HashMap<String, Exec>>,
    bundle: Bundle,
    workshop: Arc<Workshop>,
}

enum Exec {
    /// Its name is taken.
    Making,
    Made(Arc<Process>),
}

impl Container {
    /// Creates a container; its init process waits for [`Container::start`].
    pub(crate) async fn create(
        workshop: Arc<Workshop>,
        request: CreateContainerRequest,
    ) -> Result<Arc<Self>, Error> {
        let id = request.container_id.as_str();
        let mut spec: Spec = serde_json::from_slice(&request.spec_json)
            .map_err(|error| Error::invalid("spec_json", error.to_string()))?;
        let stdio = request.stdio.clone().unwrap_or_default();
        let process = spec
            .process_mut()
            .as_mut()
            .ok_or_else(|| Error::invalid("spec_json", "it has no process"))?;
        let owner = bundle::check_process(process, &stdio)?;
        let withheld = bundle::withhold(process, None);
        let capabilities = withheld.capabilities.clone();
        let resources = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref());
        let devices = resources.and_then(|resources| resources.devices().clone());

        let mut bundle = Bundle::make(workshop.clone(), id)?;
        bundle.assemble(&request.rootfs).await?;
        let mounts = spec.mounts_mut().as_deref_mut().unwrap_or_default();
        bundle.write_files(&request.files, mounts)?;
        bundle.write_config(spec, &withheld.cwd)?;

        let ports = Ports::open(&*workshop.platform, &stdio).await?;
        let (ends, mut streams, terminal) = ports.connect(&workshop.pump, owner)?;
        let console = terminal.is_some().then(|| workshop.console());
        let order = Order {
            container_id: id,
            state: &workshop.state,
            bundle: bundle.path(),
            process: None,
            console: console.as_deref(),
            withheld,
        };
        let mut making = Making::start(&order, ends, &workshop.reaper)?;
        let console = making.console.take();
        let Made { pid, exit, waiting } = making.made(&workshop.reaper).await?;
        if let (Some(ports), Some(console)) = (terminal, console) {
            streams.attach_terminal(&workshop.pump, ports, console.terminal().await?, owner)?;
        }
        let cgroup = Cgroup::of(id);
        if let Err(error) = cgroup.restrict_devices(&devices.unwrap_or_default()) {
            cgroup.remove().await?;
            return Err(error);
        }
        let container = Arc::new(Self {
            id: id.to_owned(),
            bundle,
            oom: oom::Watch::start(id, cgroup.clone(), workshop.events.clone()),
            cgroup,
            init: Arc::new(Process::new(pid, streams, Some(waiting))),
            capabilities,
            execs: Mutex::default(),
            workshop,
        });
        tokio::spawn(
            container
                .clone()
                .follow(container.init.clone(), String::new(), exit),
        );
        Ok(container)
    }

    /// Lets the init process run its program.
    pub(crate) async fn start(&self) -> Result<(), Error> {
        let waiting = self.init.take_waiting()?;
        let engine = |error: libcontainer::error::LibcontainerError| Error::Engine {
            action: "start the container",
            reason: error.to_string(),
        };
        let directory = self.workshop.state.join(&self.id);
        let mut container = libcontainer::container::Container::load(directory).map_err(engine)?;
        container.start().map_err(engine)?;
        waiting.run().await?;
        self.init.set_running();
        Ok(())
    }

    /// Creates and starts a further process.
    pub(crate) async fn exec(
        self: Arc<Self>,
        request: ExecProcessRequest,
    ) -> Result<Arc<Process>, Error> {
        let exec_id = request.exec_id.as_str();
        if self.init.phase() != Phase::Running {
            let reason = format!("Container {:?} is not running", self.id);
            return Err(Error::State(reason));
        }
        let mut process: OciProcess = serde_json::from_slice(&request.process_json)
            .map_err(|error| Error::invalid("process_json", error.to_string()))?;
        let stdio = request.stdio.clone().unwrap_or_default();
        let owner = bundle::check_process(&process, &stdio)?;
        let withheld = bundle::withhold(&mut process, Some(self.capabilities.clone()));
        let name = Reserved::exec(&self, exec_id)?;

        let file = self.bundle.path().join(format!("exec-{exec_id}.json"));
        bundle::write_json(&file, &process)?;
        let workshop = &self.workshop;
        let ports = Ports::open(&*workshop.platform, &stdio).await?;
        let (ends, mut streams, terminal) = ports.connect(&workshop.pump, owner)?;
        let console = terminal.is_some().then(|| workshop.console());
        let order = Order {
            container_id: &self.id,
            state: &workshop.state,
            bundle: self.bundle.path(),
            process: Some(&file),
            console: console.as_deref(),
            withheld,
        };
        let mut making = Making::start(&order, ends, &workshop.reaper)?;
        if let (Some(ports), Some(console)) = (terminal, making.console.take())
            && making.ready().await
        {
            let master = console.terminal().await?;
            streams.attach_terminal(&workshop.pump, ports, master, owner)?;
        }
        making.go().await;
        let made = making.made(&workshop.reaper).await;
        let _ = fs::remove_file(&file);
        let Made { pid, exit, .. } = made?;
        let process = Arc::new(Process::new(pid, streams, None));
        process.set_running();
        name.keep(process.clone());
        tokio::spawn(
            self.clone()
                .follow(process.clone(), exec_id.to_owned(), exit),
        );
        Ok(process)
    }

    /// Waits for a process's end, tells the host, and finishes its streams.
    async fn follow(
        self: Arc<Self>,
        process: Arc<Process>,
        exec_id: String,
        exit: oneshot::Receiver<ExitStatus>,
    ) {
        // The reaper never forgets whom it watches.
        let Ok(status) = exit.await else { return };
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        self.oom.check(&self.workshop.events);
        process.set_exited();
        let now = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
        let changes = exec_id.is_empty() && {
            // What runs on without an init process would write on.
            self.cgroup.kill().await;
            self.bundle.write_out().await;
            self.bundle.changes().is_some_and(|changes| changes.exist())
        };
        let events = &self.workshop.events;
        events.exit(&self.id, &exec_id, status, now, changes);
        process.drain().await;
    }

    /// The process `exec_id`, or the init process if that is empty.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        match lock(&self.execs).get(exec_id) {
            Some(Exec::Made(process)) => Ok(process.clone()),
            Some(Exec::Making) => Err(Error::State(format!(
                "Process {exec_id:?} is still being created"
            ))),
            None => Err(Error::not_found("process", exec_id)),
        }
    }

    /// Sends a signal to every process of the container.
    pub(crate) fn signal_all(&self, signal: u32) -> Result<(), Error> {
        self.cgroup.signal(check_signal(signal)?);
        Ok(())
    }

    /// What was written to its root file system, once nobody writes any more.
    pub(crate) fn changes(&self) -> Result<Changes, Error> {
        if !self.has_exited() {
            return Err(Error::State(format!("Container {:?} is running", self.id)));
        }
        let changes = self.bundle.changes();
        changes.ok_or_else(|| Error::not_found("changes of container", &self.id))
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        self.cgroup.pids()
    }

    pub(crate) fn stats(&self) -> StatsResponse {
        self.cgroup.stats()
    }

    /// Changes its limits to those of an OCI `linux.resources` object.
    pub(crate) fn update(&self, resources_json: &[u8]) -> Result<(), Error> {
        let resources: LinuxResources = serde_json::from_slice(resources_json)
            .map_err(|error| Error::invalid("resources_json", error.to_string()))?;
        self.cgroup.update(&resources)
    }

    /// Forgets an exec'd process that has exited.
    pub(crate) fn delete_process(&self, exec_id: &str) -> Result<(), Error> {
        let process = self.process(exec_id)?;
        if process.phase() < Phase::Exited {
            return Err(Error::State(format!(
                "Process {exec_id:?} is still running"
            )));
        }
        lock(&self.execs).remove(exec_id);
        process.forget();
        Ok(())
    }

    /// Whether the init process has exited.
    pub(crate) fn has_exited(&self) -> bool {
        self.init.phase() >= Phase::Exited
    }

    /// Removes all that is left of a container. Kills what still runs.
    pub(crate) async fn delete(&self) -> Result<(), Error> {
        self.cgroup.remove().await?;
        self.init.exited().await;
        let execs = std::mem::take(&mut *lock(&self.execs));
        for process in execs.into_values() {
            if let Exec::Made(process) = process {
                process.exited().await;
                process.forget();
            }
        }
        self.init.forget();
        self.bundle.remove().await;
        Ok(())
    }
}

/// The name of an exec'd process, taken until it exists or cannot be made.
struct Reserved<'a> {
    container: &'a Container,
    exec_id: &'a str,
}

impl<'a> Reserved<'a> {
    fn exec(container: &'a Container, exec_id: &'a str) -> Result<Self, Error> {
        bundle::check_id("exec_id", exec_id)?;
        let mut execs = lock(&container.execs);
        if execs.contains_key(exec_id) {
            return Err(Error::Exists {
                kind: "process",
                name: exec_id.to_owned(),
            });
        }
        execs.insert(exec_id.to_owned(), Exec::Making);
        drop(execs);
        Ok(Self { container, exec_id })
    }

    fn keep(&self, process: Arc<Process>) {
        lock(&self.container.execs).insert(self.exec_id.to_owned(), Exec::Made(process));
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let mut execs = lock(&self.container.execs);
        if matches!(execs.get(self.exec_id), Some(Exec::Making)) {
            execs.remove(self.exec_id);
        }
    }
}
