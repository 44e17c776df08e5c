//! The VM in the child, as the parent's requests see it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use super::frame::Carried;
use super::message::{
    Answer, BalloonStats, Body, Boot, Console, Disk, ErrorKind, ErrorMessage, Event, Exit,
    FileIndex, Restore, ToParent, Vsock,
};
use super::outbox::Outbox;
use super::server::News;
use super::{CONTROL, describe};
use crate::devices::virtio::block::FillError;
use crate::devices::virtio::console::{
    self, ConsoleConfig, ConsoleError, PortConfig, PortEnds, PortEvent,
};
use crate::devices::virtio::vsock::VsockConfig;
use crate::devices::virtio::{FaultObserver, balloon};
use crate::hypervisor::{Ahead, Host, HypervisorError};
use crate::snapshot::{SnapshotError, SnapshotFile};
use crate::sys::ring::Rings;
use crate::sys::threads;
use crate::{DiskConfig, Error, PauseError, RestoreConfig, RunningVm, SaveError, Vm, VmConfig};

/// How long a guest may take to say how it uses its memory; what it said before is good enough.
const STATS_WAIT: Duration = Duration::from_secs(1);

/// How long a vCPU may take to come out of the guest.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);

pub(super) type Result<T> = std::result::Result<T, ErrorMessage>;

/// Waits for the guest's drivers.
pub(super) type Work = Box<dyn FnOnce() -> Result<Answer> + Send>;

/// How a request is answered.
pub(super) enum Done {
    Now(Result<Answer>),
    Later(Work),
}

/// The host's hypervisor, or why there is none.
type Opened = std::result::Result<Ahead<Host>, HypervisorError>;

/// The VM, or the place for it.
pub(super) struct Guest {
    outbox: Outbox,
    news: Sender<News>,
    /// Taken by the one VM there may be.
    hypervisor: Option<Opened>,
    rings: Rings,
    vm: Option<RunningVm>,
}

impl Guest {
    pub(super) fn new(
        outbox: Outbox,
        news: Sender<News>,
        hypervisor: Opened,
        rings: Rings,
    ) -> Self {
        Self {
            outbox,
            news,
            hypervisor: Some(hypervisor),
            rings,
            vm: None,
        }
    }

    pub(super) fn handle(&mut self, body: Body, files: Carried) -> Done {
        let Some(files) = files else {
            let text = "Too many open files in the VM's process";
            return Done::Now(Err(refuse(ErrorKind::Resource, text)));
        };
        self.try_handle(body, Files::new(files))
            .unwrap_or_else(|error| Done::Now(Err(error)))
    }

    fn try_handle(&mut self, body: Body, mut files: Files) -> Result<Done> {
        match body {
            Body::Boot(boot) => {
                let mut config = self.config(*boot, &mut files)?;
                config.rings = self.rings()?;
                self.run(|hypervisor| Vm::on(hypervisor, config))?;
            }
            Body::Restore(restore) => {
                let mut config = self.restore_config(*restore, &mut files)?;
                config.rings = self.rings()?;
                self.run(|hypervisor| Vm::restore_on(hypervisor, config))?;
            }
            Body::Snapshot { file, base } => {
                let vm = self.vm()?.clone();
                let file = File::from(files.take(file)?);
                let base = files.take_all(base)?;
                return Ok(Done::Later(Box::new(move || snapshot(&vm, &file, base))));
            }
            Body::FillDisk { disk, files: all } => {
                let vm = self.vm()?.clone();
                let files = files.take_all(all)?;
                return Ok(Done::Later(Box::new(move || {
                    vm.fill_disk(disk, files).map_err(refused_fill)?;
                    Ok(Answer::Done)
                })));
            }
            Body::Stop => match &self.vm {
                // It tells of its end.
                Some(vm) => vm.stop(),
                None => tell(&self.news),
            },
            Body::AttachPort {
                port,
                input,
                output,
            } => {
                let ends = PortEnds {
                    input: files.take_if(input)?,
                    output: files.take_if(output)?,
                };
                let attaching = self
                    .console()?
                    .begin_attach(port, ends)
                    .map_err(refused_port)?;
                return Ok(Done::Later(Box::new(move || {
                    attaching
                        .wait(console::ATTACH_LIMIT)
                        .map_err(refused_port)?;
                    Ok(Answer::Done)
                })));
            }
            Body::DetachPort { port } => self.console()?.detach(port).map_err(refused_port)?,
            Body::CloseInput { port } => {
                self.console()?.close_input(port).map_err(refused_port)?;
            }
            Body::ResizePort {
                port,
                columns,
                rows,
            } => {
                self.console()?
                    .resize(port, columns, rows)
                    .map_err(refused_port)?;
            }
            Body::Pause => self.vm()?.pause(PAUSE_LIMIT).map_err(|error| {
                let kind = match error {
                    PauseError::Ended => ErrorKind::State,
                    PauseError::Busy { .. } => ErrorKind::Internal,
                };
                refuse(kind, describe(&error))
            })?,
            Body::Resume => self.vm()?.resume(),
            Body::SetBalloon { bytes } => self
                .balloon()?
                .set_target(bytes)
                .map_err(|error| refuse(ErrorKind::Invalid, describe(&error)))?,
            Body::AwaitBalloon { milliseconds } => {
                let balloon = self.balloon()?;
                let limit = Duration::from_millis(milliseconds);
                return Ok(Done::Later(Box::new(move || {
                    let reached = balloon.wait_for_target(limit);
                    reached.map_err(|error| refuse(ErrorKind::State, describe(&error)))?;
                    Ok(Answer::Done)
                })));
            }
            Body::BalloonStats => {
                let balloon = self.balloon()?;
                return Ok(Done::Later(Box::new(move || stats(&balloon))));
            }
        }
        Ok(Done::Now(Ok(Answer::Done)))
    }

    /// What disks get their rings from, for the one VM there may be.
    fn rings(&mut self) -> Result<Rings> {
        if self.vm.is_some() {
            return Err(refuse(ErrorKind::State, "The VM has been booted already"));
        }
        Ok(std::mem::take(&mut self.rings))
    }

    /// Starts the VM that `build` makes.
    fn run(&mut self, build: impl FnOnce(Opened) -> std::result::Result<Vm, Error>) -> Result<()> {
        let hypervisor = self
            .hypervisor
            .take()
            .ok_or_else(|| refuse(ErrorKind::State, "A VM has been asked for before"))?;
        let vm = build(hypervisor)
            .and_then(Vm::start)
            .map_err(|error| refuse(kind(&error), describe(&error)))?;
        let news = self.news.clone();
        vm.on_end(move || tell(&news));
        self.vm = Some(vm);
        // All threads are there.
        threads::narrow(&CONTROL);
        Ok(())
    }

    /// Waits for the end, which is decided, and answers with it. What devices still hold back, such
    /// as half a line of log, goes with the VM.
    pub(super) fn end(self) -> Exit {
        match self.vm {
            Some(vm) => vm.wait().into(),
            None => Exit::Stopped,
        }
    }

    fn restore_config(&self, restore: Restore, files: &mut Files) -> Result<RestoreConfig> {
        let ports = restore
            .ports
            .into_iter()
            .map(|port| {
                let ends = PortEnds {
                    input: files.take_if(port.input)?,
                    output: files.take_if(port.output)?,
                };
                Ok((port.port, ends))
            })
            .collect::<Result<_>>()?;
        Ok(RestoreConfig {
            snapshot: files.take_all(restore.snapshot)?,
            verify_memory: restore.verify_memory,
            serial: files.take_if(restore.serial)?,
            disks: files.disks(restore.disks)?,
            events: self.port_events(),
            ports,
            vsock: files.vsock(restore.vsock)?,
            rings: Rings::default(),
            on_device_fault: Some(self.device_faults()),
        })
    }

    fn config(&self, boot: Boot, files: &mut Files) -> Result<VmConfig> {
        Ok(VmConfig {
            vcpus: boot.vcpus,
            memory: boot.memory,
            kernel: File::from(files.take(boot.kernel)?),
            initramfs: files.take_if(boot.initramfs)?.map(File::from),
            cmdline: boot.cmdline,
            serial: files.take_if(boot.serial)?,
            disks: files.disks(boot.disks)?,
            console: boot.console.map(|console| self.console_config(console)),
            vsock: files.vsock(boot.vsock)?,
            balloon: boot.balloon,
            rng: boot.rng,
            rings: Rings::default(),
            on_device_fault: Some(self.device_faults()),
        })
    }

    fn device_faults(&self) -> Arc<FaultObserver> {
        let outbox = self.outbox.clone();
        Arc::new(move |device, reason| {
            outbox.offer(ToParent::Event(Event::DeviceFault {
                device: device.to_owned(),
                reason: reason.to_owned(),
            }));
        })
    }

    fn console_config(&self, console: Console) -> ConsoleConfig {
        ConsoleConfig {
            ports: console
                .ports
                .into_iter()
                .map(|name| PortConfig { name })
                .collect(),
            max_ports: console.max_ports,
            events: self.port_events(),
        }
    }

    /// Events wait for the parent when too many do already: so a guest that makes them faster than
    /// its host takes them is slowed down.
    fn port_events(&self) -> Box<dyn Fn(PortEvent) + Send + Sync> {
        let outbox = self.outbox.clone();
        Box::new(move |event| {
            outbox.send(ToParent::Event(match event {
                PortEvent::Opened(port) => Event::PortOpened { port },
                PortEvent::Closed(port) => Event::PortClosed { port },
                PortEvent::InputEnded(port) => Event::InputEnded { port },
            }));
        })
    }

    fn vm(&self) -> Result<&RunningVm> {
        self.vm
            .as_ref()
            .ok_or_else(|| refuse(ErrorKind::State, "There is no VM yet"))
    }

    fn console(&self) -> Result<console::Handle> {
        let console = self.vm()?.console();
        console.ok_or_else(|| refuse(ErrorKind::State, "The VM has no console"))
    }

    fn balloon(&self) -> Result<balloon::Handle> {
        let balloon = self.vm()?.balloon();
        balloon.ok_or_else(|| refuse(ErrorKind::State, "The VM has no balloon"))
    }
}

fn stats(balloon: &balloon::Handle) -> Result<Answer> {
    let report = balloon
        .report(STATS_WAIT)
        .map_err(|error| refuse(ErrorKind::Resource, describe(&error)))?;
    let (stats, metrics) = (report.stats, balloon.metrics());
    let refused = [&metrics.not_ram, &metrics.duplicates, &metrics.not_inflated];
    Ok(Answer::BalloonStats(BalloonStats {
        target: report.target,
        actual: report.actual,
        free: stats.free,
        total: stats.total,
        available: stats.available,
        disk_caches: stats.disk_caches,
        major_faults: stats.major_faults,
        minor_faults: stats.minor_faults,
        reported: metrics.reported_bytes.get(),
        discarded: metrics.discarded_bytes.get(),
        refused_pages: refused.iter().map(|counter| counter.get()).sum(),
    }))
}

fn tell(news: &Sender<News>) {
    // Refused only where the process is about to end.
    let _ = news.send(News::Ending);
}

/// Files of a request; each is taken once.
struct Files(Vec<Option<OwnedFd>>);

impl Files {
    fn new(files: Vec<OwnedFd>) -> Self {
        Self(files.into_iter().map(Some).collect())
    }

    fn take(&mut self, place: FileIndex) -> Result<OwnedFd> {
        self.0
            .get_mut(place)
            .and_then(Option::take)
            .ok_or_else(|| refuse(ErrorKind::Invalid, format!("No file at place {place}")))
    }

    fn take_if(&mut self, place: Option<FileIndex>) -> Result<Option<OwnedFd>> {
        place.map(|place| self.take(place)).transpose()
    }

    fn take_all(&mut self, places: Vec<FileIndex>) -> Result<Vec<File>> {
        let places = places.into_iter();
        places
            .map(|place| Ok(File::from(self.take(place)?)))
            .collect()
    }

    fn disks(&mut self, disks: Vec<Disk>) -> Result<Vec<DiskConfig>> {
        let config = |disk: Disk| {
            Ok(DiskConfig {
                files: self.take_all(disk.files)?,
                read_only: disk.read_only,
                serial: disk.serial,
            })
        };
        disks.into_iter().map(config).collect()
    }

    fn vsock(&mut self, vsock: Option<Vsock>) -> Result<Option<VsockConfig>> {
        let config = |vsock: Vsock| {
            Ok(VsockConfig {
                cid: vsock.cid,
                listener: UnixListener::from(self.take(vsock.listener)?),
            })
        };
        vsock.map(config).transpose()
    }
}

fn snapshot(vm: &RunningVm, file: &File, base: Vec<File>) -> Result<Answer> {
    let open = |file| SnapshotFile::open(file);
    let base = base
        .into_iter()
        .map(open)
        .collect::<std::result::Result<Vec<_>, _>>();
    let base = base.map_err(|error| refuse(ErrorKind::Invalid, describe(&error)))?;
    let base = (!base.is_empty()).then_some(base.as_slice());
    match vm.snapshot_to(file, base) {
        Ok(_) => Ok(Answer::Done),
        Err(error) => {
            let kind = match error {
                SaveError::Running | SaveError::Ended => ErrorKind::State,
                SaveError::Snapshot(_) => ErrorKind::Resource,
                SaveError::Quiesce(_) | SaveError::Hypervisor(_) => ErrorKind::Internal,
            };
            Err(refuse(kind, describe(&error)))
        }
    }
}

fn refuse(kind: ErrorKind, text: impl Into<String>) -> ErrorMessage {
    ErrorMessage {
        kind,
        text: text.into(),
    }
}

fn refused_port(error: ConsoleError) -> ErrorMessage {
    let kind = match error {
        ConsoleError::Ports { .. } | ConsoleError::NoPort { .. } => ErrorKind::Invalid,
        ConsoleError::Busy { .. } | ConsoleError::Unanswered { .. } => ErrorKind::State,
        ConsoleError::Doorbell(_) => ErrorKind::Resource,
    };
    refuse(kind, describe(&error))
}

fn refused_fill(error: FillError) -> ErrorMessage {
    let kind = match error {
        FillError::NoDisk { .. } | FillError::Nothing { .. } | FillError::Files { .. } => {
            ErrorKind::Invalid
        }
        FillError::NotEmpty { .. } | FillError::Ended => ErrorKind::State,
        FillError::Quiesce(_) => ErrorKind::Internal,
    };
    refuse(kind, describe(&error))
}

fn kind(error: &Error) -> ErrorKind {
    match error {
        Error::KernelMissing { .. }
        | Error::KernelOpen { .. }
        | Error::Kernel(_)
        | Error::Load(_)
        | Error::Vcpus { .. }
        | Error::MemorySize { .. }
        | Error::TooManyDevices { .. } => ErrorKind::Invalid,
        Error::Hypervisor(_) => ErrorKind::Hypervisor,
        Error::Snapshot(SnapshotError::File { .. } | SnapshotError::Memory(_))
        | Error::Memory(_)
        | Error::Device { .. }
        | Error::Thread { .. }
        | Error::Entropy(_) => ErrorKind::Resource,
        Error::Snapshot(_) | Error::Restore { .. } | Error::Mismatch { .. } => ErrorKind::Invalid,
        Error::Window(_) => ErrorKind::Internal,
    }
}
