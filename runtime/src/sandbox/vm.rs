//! The real machine: a VMM process of our own, with everything acquired for it.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use supermachine_protocol as protocol;
use supermachine_vmm::control::{
    BootSpec, ConsoleSpec, ControlError, DiskSpec, Event as VmEvent, Exit as VmExit, LogLevel,
    Preparation, SpawnConfig, VmHandle, VsockSpec,
};
use supermachine_vmm::devices::virtio::balloon::BalloonConfig;
use supermachine_vmm::devices::virtio::console::MAX_PORTS;
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::sync::watch;

use super::changes::Saving;
use super::error::Error;
use super::guest_log::GuestLog;
use super::machine::{Ending, Event, GuestContainer, Launched, Launcher, Machine, Timeouts};
use super::{Inner, Sandbox, Slot};
use crate::acquire::limits::HostCgroup;
use crate::acquire::{self, Resources};
use crate::agent;
use crate::config::{Level, MemorySize, Ports, Resolved};
use crate::hooks::Hooks;
use crate::images;
use crate::ledger::{self, Entry, Ledger};
use crate::mounted;
use crate::plan::{self, HostFacts, MachineSize, Plan};
use crate::request::Create;
use crate::virtualization::Virtualization;

/// The guest's address on its vsock. Every guest has its own device, so all have the same.
const GUEST_CID: u32 = 3;

/// Where the guest's vsock is reached, in the sandbox's directory.
const VSOCK: &str = "vsock";

/// Requests to the machine's process that may wait for its answer at one time. They wait in threads,
/// of which one must be left to kill a process that doesn't answer.
const REQUESTS: usize = 2;

/// Where KVM is.
const KVM: &str = "/dev/kvm";

impl Sandbox {
    /// An empty sandbox. What happens in it is told through `events`.
    pub fn new(config: Resolved, events: UnboundedSender<crate::events::Event>) -> Self {
        let timeouts = Timeouts {
            boot: config.timeouts.boot.0,
            call: config.timeouts.call.0,
            stop: config.timeouts.stop.0,
            drain: config.timeouts.drain.0,
        };
        let stdio_ports = (protocol::FIRST_STDIO_PORT, last_port(&config));
        let inner = Inner {
            launcher: Box::new(VmLauncher {
                config,
                preparation: Mutex::new(Some(Preparation::begin())),
            }),
            timeouts,
            stdio_ports,
            events,
            slot: Mutex::new(Slot::Empty),
            creating: watch::Sender::default(),
            ending: watch::Sender::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }
}

/// Undoes whatever the shim of container `id`, which is gone, had acquired. Answers the pid that
/// stood for the container, if it came that far.
///
/// # Errors
/// The ledger cannot be read, or something on it cannot be undone.
pub fn clean_up(
    config: &Resolved,
    namespace: &str,
    id: &str,
) -> Result<Option<u32>, ledger::Error> {
    images::sweep(&config.images.directory.0);
    let ledger = match Ledger::open(&directory(config, namespace, id)) {
        Err(ledger::Error::NotFound { .. }) => return Ok(None),
        ledger => ledger?,
    };
    let pid = ledger.entries().iter().find_map(|entry| match entry {
        Entry::Child { pid, .. } => Some(*pid),
        _ => None,
    });
    ledger.undo()?;
    Ok(pid)
}

fn directory(config: &Resolved, namespace: &str, id: &str) -> PathBuf {
    config.state.directory.0.join(namespace).join(id)
}

/// The console's highest port: port 0 is the agent's, the others carry stdio.
fn last_port(config: &Resolved) -> u32 {
    const { assert!(Ports::MAX == MAX_PORTS - 1) };
    config.console.ports.0
}

struct VmLauncher {
    config: Resolved,
    /// For the one machine it launches.
    preparation: Mutex<Option<Preparation>>,
}

impl VmLauncher {
    fn take_preparation(&self) -> Option<Preparation> {
        let mut preparation = self
            .preparation
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        preparation.take()
    }
}

#[async_trait]
impl Launcher for VmLauncher {
    async fn launch(&self, request: &Create) -> Result<Launched, Error> {
        if !self.config.vm.allow_emulated_kvm {
            refuse_emulation()?;
        }
        let (sender, events) = mpsc::unbounded_channel();
        let name = format!("{}/{}", request.namespace, request.id);
        let (config, create) = (self.config.clone(), request.clone());
        let planned = blocking("planning it", move || Planned::new(&create, &config));
        let Planned {
            plan,
            hooks,
            mut ledger,
            cgroup,
        } = planned.await?;
        let spawn = SpawnConfig {
            exe: self.config.vm.program.0.clone(),
            log_level: log_level(self.config.log.level),
            jail: self.config.jail.policy(),
            cgroups: cgroup
                .as_ref()
                .map(|cgroup| cgroup.directories().to_vec())
                .unwrap_or_default(),
            disks: plan.disks.len(),
            ..SpawnConfig::new(name)
        };
        let preparation = self.take_preparation();
        let plan = Arc::new(plan);
        let (config, needed) = (self.config.clone(), Arc::clone(&plan));
        // The process starts while images are made or looked up.
        let (process, resources) = tokio::join!(
            blocking("starting its process", move || {
                VmHandle::spawn_prepared(
                    spawn,
                    preparation,
                    Box::new(move |event| report(&sender, event)),
                )
                .map_err(|error| machine_error("starting its process", error))
            }),
            blocking("preparing it", move || {
                Ok(acquire::acquire(&needed, &config)?)
            }),
        );
        // Whatever fails from here on, the process goes before the ledger is undone.
        let process = process?;
        let mut resources = resources?;
        let vsock = add_process(&mut ledger, process.pid())?;
        let socket = ledger.directory().join(VSOCK);
        let guest = guest_container(&plan, &mut resources)?;
        let changes = plan.changes.clone();
        let saving = changes.map(|changes| Saving::new(changes, request, &self.config));
        let (log, serial, agent_log) = GuestLog::start()?;
        let limit = self.config.timeouts.boot.0;
        let max_ports = last_port(&self.config) + 1;
        let overhead = self.config.vm.memory_overhead.0;
        let machine = blocking("booting it", move || {
            let size = MachineSize {
                memory: plan.memory,
                overhead,
                least: MemorySize::MIN,
            };
            let spec = boot_spec(&plan, resources, serial, vsock, max_ports);
            let booted = process.boot(&spec, limit).and_then(|()| {
                process.attach_port(protocol::AGENT_CONSOLE_PORT, None, Some(agent_log))
            });
            booted.map_err(|error| machine_error("booting it", error))?;
            Ok(Vmm {
                process: Arc::new(process),
                ledger: Mutex::new(Some(ledger)),
                socket,
                log,
                requests: Semaphore::new(REQUESTS),
                size,
                cgroup: cgroup.map(Arc::new),
                saving,
            })
        });
        Ok(Launched {
            machine: Arc::new(machine.await?),
            events,
            guest,
            hooks,
        })
    }
}

/// Before anything is done, as a guest that boots for minutes only ever ends in a timeout.
fn refuse_emulation() -> Result<(), Error> {
    match Virtualization::of_host() {
        // Without the device there is something else to tell, and opening it does.
        Virtualization::Emulated(reason) if Path::new(KVM).exists() => {
            Err(Error::EmulatedKvm { reason })
        }
        _ => Ok(()),
    }
}

/// A machine that can be started.
struct Planned {
    plan: Plan,
    hooks: Hooks,
    ledger: Ledger,
    /// Where the host accounts for it; `None` if there is no such place.
    cgroup: Option<HostCgroup>,
}

impl Planned {
    fn new(request: &Create, config: &Resolved) -> Result<Self, Error> {
        let spec = request.load_spec()?;
        let request = &mounted::with_root(request, &spec)?;
        let plan = plan::plan(request, &spec, &HostFacts::read(request, &spec), config)?;
        let hooks = Hooks::new(plan.hooks.clone(), request, &spec);
        let directory = directory(config, request.namespace.as_str(), request.id.as_str());
        let mut ledger = match Ledger::create(&directory) {
            // Left by a shim that was killed and never cleaned up after; one that lives is in use.
            Err(ledger::Error::Exists { .. }) => {
                Ledger::open(&directory)?.undo()?;
                Ledger::create(&directory)?
            }
            ledger => ledger?,
        };
        if let Some(poststop) = hooks.poststop() {
            ledger.record(Entry::Poststop(poststop))?;
        }
        let cgroup = match &plan.cgroup {
            Some(path) => HostCgroup::create(path, &plan.cpuset, &mut ledger)?,
            None => None,
        };
        Ok(Self {
            plan,
            hooks,
            ledger,
            cgroup,
        })
    }
}

/// Books the machine's process and opens its way in.
fn add_process(ledger: &mut Ledger, pid: u32) -> Result<UnixListener, Error> {
    if let Some(start_time) = ledger::start_time(pid) {
        ledger.record(Entry::Child { pid, start_time })?;
    }
    let path = ledger.directory().join(VSOCK);
    ledger.record(Entry::File { path: path.clone() })?;
    UnixListener::bind(&path).map_err(|source| Error::Machine {
        what: "opening the socket of its vsock",
        source: source.into(),
    })
}

fn guest_container(plan: &Plan, resources: &mut Resources) -> Result<GuestContainer, Error> {
    let spec_json =
        serde_json::to_vec(&plan.guest_spec).map_err(|source| Error::Encode { source })?;
    let mut rootfs = protocol::Rootfs::from(&plan.rootfs);
    for disk in &resources.disks {
        rootfs.partitions.extend(disk.partitions.iter().cloned());
    }
    Ok(GuestContainer {
        rootfs,
        spec_json,
        files: std::mem::take(&mut resources.files),
        hostname: plan.hostname.clone().unwrap_or_default(),
    })
}

fn boot_spec(
    plan: &Plan,
    resources: Resources,
    serial: OwnedFd,
    vsock: UnixListener,
    max_ports: u32,
) -> BootSpec {
    let disks = resources.disks.into_iter().map(|disk| DiskSpec {
        files: disk.files,
        read_only: disk.read_only,
        serial: disk.serial,
    });
    BootSpec {
        vcpus: plan.vcpus,
        memory: plan.memory,
        kernel: resources.kernel,
        initramfs: Some(resources.initramfs),
        cmdline: plan.cmdline.clone(),
        serial: Some(serial),
        disks: disks.collect(),
        console: Some(ConsoleSpec {
            // The others appear when they are attached.
            ports: vec![protocol::console_port_name(protocol::AGENT_CONSOLE_PORT)],
            max_ports,
        }),
        vsock: Some(VsockSpec {
            cid: GUEST_CID,
            listener: vsock,
        }),
        balloon: Some(BalloonConfig::default()),
        rng: true,
    }
}

/// A machine that runs in a process of its own.
pub(super) struct Vmm {
    process: Arc<VmHandle>,
    /// Undone at release; by its drop if it never comes to that.
    ledger: Mutex<Option<Ledger>>,
    socket: PathBuf,
    log: GuestLog,
    requests: Semaphore,
    size: MachineSize,
    cgroup: Option<Arc<HostCgroup>>,
    /// None if nothing that the container writes is to be kept.
    saving: Option<Saving>,
}

impl Vmm {
    /// Where its vsock is reached.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Writes down what is about to be acquired for it.
    pub(super) fn record(&self, entry: Entry) -> Result<(), Error> {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        match ledger.as_mut() {
            Some(ledger) => Ok(ledger.record(entry)?),
            // It was released.
            None => Err(machine_error("recording", io::Error::other("it is gone"))),
        }
    }

    /// Books a process of ours that works for it and ends by itself.
    pub(super) fn adopt_child(&self, pid: u32) -> Result<(), Error> {
        if let Some(cgroup) = &self.cgroup {
            cgroup.add(pid);
        }
        self.adopt(pid)
    }

    /// Makes a request of the process, when it is its turn.
    async fn request(
        &self,
        what: &'static str,
        request: impl FnOnce(&VmHandle) -> Result<(), ControlError> + Send + 'static,
    ) -> Result<(), Error> {
        // The semaphore is never closed.
        let _turn = self.requests.acquire().await;
        let process = Arc::clone(&self.process);
        blocking(what, move || {
            request(&process).map_err(|error| machine_error(what, error))
        })
        .await
    }
}

impl fmt::Debug for Vmm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vmm")
            .field("process", &self.process)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Machine for Vmm {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    async fn attach(
        &self,
        port: u32,
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
    ) -> Result<(), Error> {
        self.request("attaching a stream", move |process| {
            process.attach_port(port, input, output)
        })
        .await
    }

    async fn detach(&self, port: u32) {
        let detached = self.request("detaching a stream", move |process| {
            process.detach_port(port)
        });
        if let Err(error) = detached.await {
            tracing::debug!(port, error = error.chain(), "could not detach a port");
        }
    }

    async fn dial_agent(&self) -> Result<UnixStream, Error> {
        connect(&self.socket)
            .await
            .map_err(|source| Error::Connection {
                during: "connecting to it",
                text: source.to_string(),
            })
    }

    async fn save_changes(&self, container_id: &str) -> Result<(), Error> {
        match self.saving.clone() {
            Some(saving) => saving.save(self, container_id).await,
            None => Ok(()),
        }
    }

    fn size(&self) -> MachineSize {
        self.size
    }

    async fn pause(&self) -> Result<(), Error> {
        self.request("pausing it", VmHandle::pause).await
    }

    async fn resume(&self) -> Result<(), Error> {
        self.request("resuming it", VmHandle::resume).await
    }

    async fn set_balloon(&self, bytes: u64) -> Result<(), Error> {
        self.request("setting its balloon", move |process| {
            process.set_balloon(bytes)
        })
        .await
    }

    async fn set_cpuset(&self, cpuset: String) -> Result<(), Error> {
        const WHAT: &str = "changing its CPU set";
        let Some(cgroup) = self.cgroup.clone() else {
            return Err(machine_error(WHAT, io::Error::other("it has no cgroup")));
        };
        blocking(WHAT, move || {
            let set = cgroup.set_cpuset(&cpuset);
            set.map_err(|error| machine_error(WHAT, error))
        })
        .await
    }

    fn adopt(&self, pid: u32) -> Result<(), Error> {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(ledger), Some(start_time)) = (ledger.as_mut(), ledger::start_time(pid)) {
            ledger.record(Entry::Logger { pid, start_time })?;
        }
        Ok(())
    }

    async fn kill(&self) {
        let process = Arc::clone(&self.process);
        let killed = blocking("killing it", move || {
            process.kill();
            Ok(())
        });
        if let Err(error) = killed.await {
            tracing::warn!(error = error.chain(), "could not kill a machine");
        }
    }

    async fn release(&self) {
        let ledger = self
            .ledger
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(ledger) = ledger else { return };
        let undone = blocking("giving back what it used", move || Ok(ledger.undo()?));
        if let Err(error) = undone.await {
            tracing::error!(error = error.chain(), "something is left behind");
        }
    }

    fn last_words(&self) -> String {
        self.log.last_words()
    }

    async fn log_ended(&self) {
        self.log.ended().await;
    }
}

async fn connect(socket: &Path) -> io::Result<UnixStream> {
    agent::dial(socket, protocol::AGENT_VSOCK_PORT).await
}

/// Runs `work`, which blocks, beside the event loop.
pub(super) async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(machine_error(what, error)))
}

pub(super) fn machine_error(
    what: &'static str,
    source: impl std::error::Error + Send + Sync + 'static,
) -> Error {
    Error::Machine {
        what,
        source: Box::new(source),
    }
}

/// Passes on what matters to the sandbox, and logs the rest.
fn report(sender: &UnboundedSender<Event>, event: VmEvent) {
    let event = match event {
        VmEvent::PortOpened { port } => Event::PortOpened(port),
        VmEvent::PortClosed { port } => Event::PortClosed(port),
        VmEvent::Ended(exit) => Event::Ended {
            reason: exit.to_string(),
            how: match exit {
                VmExit::PowerOff | VmExit::Stopped => Ending::Orderly,
                VmExit::Killed { .. } => Ending::Killed,
                // A reset is how a guest ends whose kernel panicked: nobody asks it for one.
                VmExit::Reset
                | VmExit::TripleFault
                | VmExit::Fault(_)
                | VmExit::Vanished { .. } => Ending::Failed,
            },
        },
        VmEvent::InputEnded { .. } => return,
        VmEvent::DeviceFault { device, reason } => {
            tracing::warn!(
                device,
                reason,
                "the guest broke a device's rules; the device stopped"
            );
            return;
        }
        VmEvent::Log {
            level,
            target,
            text,
        } => {
            match level {
                LogLevel::Error => tracing::error!(target, "vmm: {text}"),
                LogLevel::Warn => tracing::warn!(target, "vmm: {text}"),
                LogLevel::Info => tracing::info!(target, "vmm: {text}"),
                LogLevel::Debug => tracing::debug!(target, "vmm: {text}"),
                LogLevel::Trace => tracing::trace!(target, "vmm: {text}"),
            }
            return;
        }
    };
    // Nobody listens any more when the sandbox is gone.
    let _ = sender.send(event);
}

fn log_level(level: Level) -> LogLevel {
    match level {
        Level::Off | Level::Error => LogLevel::Error,
        Level::Warn => LogLevel::Warn,
        Level::Info => LogLevel::Info,
        Level::Debug => LogLevel::Debug,
        Level::Trace => LogLevel::Trace,
    }
}
