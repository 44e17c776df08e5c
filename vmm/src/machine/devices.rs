//! The virtio devices of a VM: made from the configuration, then attached to buses and lines.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::assembly::notify_address;
use super::board::{Port, PortState};
use super::reactors::Reactors;
use crate::arch::current::{MIN_MEMORY, layout};
use crate::config::{DiskConfig, VmConfig};
use crate::devices::bus::Bus;
use crate::devices::virtio::balloon::{self, Balloon, BalloonConfig};
use crate::devices::virtio::block::{Backend, Block, BlockConfig, Concat, FileBackend, FillError};
use crate::devices::virtio::console::{self, Console, ConsoleConfig};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::transport::mmio::{MmioParts, MmioTransport, TransportState};
use crate::devices::virtio::vsock::{Vsock, VsockConfig};
use crate::devices::virtio::{FaultObserver, QuiesceError, VirtioDevice};
use crate::error::Error;
use crate::hypervisor::{Binding, IrqLine, VmBackend};
use crate::memory::GuestMemory;
use crate::sys::reactor::ReactorHandle;
use crate::sys::ring::Rings;

/// Devices that have been made and not attached, in the order of their slots.
pub(super) struct DeviceSet {
    memory: GuestMemory,
    observer: Arc<FaultObserver>,
    reactors: Reactors,
    devices: Vec<(Box<dyn VirtioDevice>, ReactorHandle)>,
}

impl DeviceSet {
    pub(super) fn new(
        memory: GuestMemory,
        observer: Option<Arc<FaultObserver>>,
    ) -> Result<Self, Error> {
        let observer = observer.unwrap_or_else(|| Arc::new(|_, _| ()));
        Ok(Self {
            memory,
            observer,
            reactors: Reactors::new()?,
            devices: Vec::new(),
        })
    }

    /// Makes what the configuration asks for. Disks come last: beyond the pins of the interrupt
    /// controller it is they that share.
    pub(super) fn add_configured(&mut self, config: &mut VmConfig) -> Result<Handles, Error> {
        let mut handles = Handles::default();
        if let Some(console) = config.console.take() {
            self.add_console(console, &mut handles)?;
        }
        if let Some(vsock) = config.vsock.take() {
            self.add_vsock(vsock)?;
        }
        if let Some(balloon) = config.balloon {
            self.add_balloon(balloon, config.memory, &mut handles)?;
        }
        if config.rng {
            self.add_rng();
        }
        for disk in config.disks.drain(..) {
            self.add_disk(disk, &mut handles, &mut config.rings)?;
        }
        Ok(handles)
    }

    pub(super) fn add_console(
        &mut self,
        config: ConsoleConfig,
        handles: &mut Handles,
    ) -> Result<(), Error> {
        let console = Console::new(config).map_err(refused("console0"))?;
        handles.console = Some(console.handle());
        self.add(Box::new(console));
        Ok(())
    }

    pub(super) fn add_vsock(&mut self, config: VsockConfig) -> Result<(), Error> {
        self.add(Box::new(Vsock::new(config).map_err(refused("vsock0"))?));
        Ok(())
    }

    /// A balloon for a guest with `memory` bytes.
    pub(super) fn add_balloon(
        &mut self,
        balloon: BalloonConfig,
        memory: u64,
        handles: &mut Handles,
    ) -> Result<(), Error> {
        let balloon = BalloonConfig {
            floor: balloon.floor.max(balloon_floor(memory)),
            ..balloon
        };
        let balloon = Balloon::new(balloon, memory).map_err(refused("balloon0"))?;
        handles.balloon = Some(balloon.handle());
        self.add(Box::new(balloon));
        Ok(())
    }

    pub(super) fn add_rng(&mut self) {
        self.add(Box::new(Rng::of_host()));
    }

    pub(super) fn add_disk(
        &mut self,
        disk: DiskConfig,
        handles: &mut Handles,
        rings: &mut Rings,
    ) -> Result<(), Error> {
        let id = disk_id(handles.disks.len());
        handles.disks.push(DiskSlot {
            slot: self.devices.len(),
            read_only: disk.read_only,
        });
        let backend = backend(disk.files, disk.read_only).map_err(refused(&id))?;
        let block = BlockConfig {
            id: id.clone(),
            backend,
            read_only: disk.read_only,
            serial: disk.serial,
        };
        let block = Block::with_rings(block, rings);
        self.add_blocking(Box::new(block.map_err(refused(&id))?))
    }

    /// Adds a device that never blocks.
    fn add(&mut self, device: Box<dyn VirtioDevice>) {
        self.devices.push((device, self.reactors.shared()));
    }

    /// Adds a device whose backend may block: it gets a thread of its own.
    fn add_blocking(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), Error> {
        let own = self.reactors.own(device.id())?;
        self.devices.push((device, own));
        Ok(())
    }

    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.devices.len()).unwrap_or(u32::MAX)
    }

    /// Puts each device behind a transport. That takes no VM: it is done while one is made.
    pub(super) fn build<L: IrqLine>(self) -> Result<Windows<L>, Error> {
        if self.len() > layout::MAX_VIRTIO_DEVICES {
            let (asked, max) = (self.devices.len(), layout::MAX_VIRTIO_DEVICES);
            return Err(Error::TooManyDevices { asked, max });
        }
        let mut windows = Vec::with_capacity(self.devices.len());
        for (device, reactor) in self.devices {
            let line = Arc::new(OnceLock::<L>::new());
            let (raised, lowered) = (Arc::clone(&line), Arc::clone(&line));
            let id = device.id().to_owned();
            let parts = MmioParts {
                memory: self.memory.clone(),
                reactor,
                // No device works before it has its line.
                raise: Box::new(move || {
                    if let Some(line) = raised.get() {
                        line.raise();
                    }
                }),
                lower: Box::new(move || lowered.get().is_some_and(IrqLine::lower)),
                observer: Arc::clone(&self.observer),
            };
            let transport = MmioTransport::new(device, parts).map_err(refused(&id))?;
            windows.push((Arc::new(transport), line));
        }
        Ok(Windows {
            windows,
            reactors: self.reactors,
        })
    }
}

/// Devices behind transports, in the order of their slots, and the lines they will have.
pub(super) struct Windows<L> {
    windows: Vec<(Arc<MmioTransport>, Arc<OnceLock<L>>)>,
    reactors: Reactors,
}

impl<L: IrqLine> Windows<L> {
    /// Makes fresh devices what others were, slot by slot.
    pub(super) fn restore(&self, states: Vec<TransportState>) -> Result<(), Error> {
        for ((transport, _), state) in self.windows.iter().zip(states) {
            let device = state.id.clone();
            let restored = transport.restore(state);
            restored.map_err(|source| Error::Restore { device, source })?;
        }
        Ok(())
    }

    /// Gives each device its place, interrupt pin and doorbells.
    pub(super) fn attach<B: VmBackend<Line = L>>(
        self,
        backend: &B,
        mmio: &mut Bus,
        port: Option<Arc<Port>>,
    ) -> Result<Devices, Error> {
        let mut transports = Vec::with_capacity(self.windows.len());
        for (slot, (transport, line)) in (0..).zip(self.windows) {
            // Nobody else sets it.
            let _ = line.set(backend.irq_line(layout::virtio_pin(slot))?);
            for (index, doorbell) in transport.busy_doorbells() {
                if backend.bind_doorbell(notify_address(slot), index, doorbell)? == Binding::Exits {
                    break;
                }
            }
            let window: Arc<MmioTransport> = Arc::clone(&transport);
            mmio.insert(layout::virtio_address(slot), layout::VIRTIO_STRIDE, window)?;
            transports.push(transport);
        }
        Ok(Devices {
            transports,
            port,
            still: Mutex::default(),
            reactors: self.reactors,
        })
    }
}

/// How the host speaks to devices while they run.
#[derive(Clone, Debug, Default)]
pub(super) struct Handles {
    pub(super) console: Option<console::Handle>,
    pub(super) balloon: Option<balloon::Handle>,
    /// In the order the guest has them.
    pub(super) disks: Vec<DiskSlot>,
}

/// Where a disk is among the devices.
#[derive(Clone, Copy, Debug)]
pub(super) struct DiskSlot {
    slot: usize,
    read_only: bool,
}

impl Handles {
    /// Opens `files` as what disk `index` is to have.
    pub(super) fn contents(
        &self,
        index: usize,
        files: Vec<File>,
    ) -> Result<(DiskSlot, Box<dyn Backend>), FillError> {
        let device = disk_id(index);
        let Some(disk) = self.disks.get(index) else {
            return Err(FillError::NoDisk { device });
        };
        let contents =
            backend(files, disk.read_only).map_err(|source| FillError::Files { device, source })?;
        Ok((*disk, contents))
    }
}

/// The name of a disk in logs, metrics and errors.
fn disk_id(index: usize) -> String {
    format!("block{index}")
}

/// What a balloon leaves in any case: an eighth of the guest's memory, and what a kernel needs.
fn balloon_floor(memory: u64) -> u64 {
    (memory / 8).max(MIN_MEMORY)
}

/// What holds a disk's bytes: a file, or several that are only read.
fn backend(mut files: Vec<File>, read_only: bool) -> io::Result<Box<dyn Backend>> {
    match (files.len(), read_only) {
        (1, _) => Ok(Box::new(FileBackend::open(files.remove(0), read_only)?)),
        (2.., true) => Ok(Box::new(Concat::open(files)?)),
        (count, _) => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("A disk of {count} files; expected one, or several that are only read"),
        )),
    }
}

/// Names the device that could not be made.
pub(super) fn refused<E>(device: &str) -> impl Fn(E) -> Error
where
    E: std::error::Error + Send + Sync + 'static,
{
    let device = device.to_owned();
    move |error| Error::Device {
        device: device.clone(),
        source: Box::new(error),
    }
}

/// The attached devices and the threads they work on.
pub(super) struct Devices {
    transports: Vec<Arc<MmioTransport>>,
    port: Option<Arc<Port>>,
    /// Held by whoever holds devices still.
    still: Mutex<()>,
    // After the transports: a device stops its worker on its reactor.
    reactors: Reactors,
}

impl Devices {
    /// Holds all devices still. The vCPUs must be paused. When one does not come to rest, all go on.
    pub(super) fn quiesce(&self) -> Result<Quiesced<'_>, QuiesceError> {
        // Before the first: dropped, it resumes what was held.
        let quiesced = Quiesced(self, self.still());
        for transport in &self.transports {
            transport.quiesce()?;
        }
        Ok(quiesced)
    }

    /// Gives an empty disk what it has from now on.
    pub(super) fn fill(&self, disk: DiskSlot, contents: Box<dyn Backend>) -> Result<(), FillError> {
        let transport = &self.transports[disk.slot];
        let _still = self.still();
        transport.fill(contents)
    }

    /// Waits until no other holds devices still.
    fn still(&self) -> MutexGuard<'_, ()> {
        self.still.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to work, with the devices that a driver goes on with.
    pub(super) fn begin(&self) {
        for transport in &self.transports {
            transport.start_restored();
        }
        self.reactors.begin();
    }

    /// Stops all devices. The vCPUs must have stopped.
    pub(super) fn shut_down(&self) {
        for transport in &self.transports {
            transport.shut_down();
        }
    }
}

/// Devices that are held still until this is dropped.
pub(super) struct Quiesced<'a>(&'a Devices, #[expect(dead_code)] MutexGuard<'a, ()>);

impl Quiesced<'_> {
    /// What they are, in the order of their slots.
    pub(super) fn save(&self) -> Vec<TransportState> {
        let transports = self.0.transports.iter();
        transports.map(|transport| transport.save()).collect()
    }

    /// The registers of the serial port.
    pub(super) fn port(&self) -> Option<PortState> {
        self.0.port.as_ref().map(|port| port.save())
    }
}

impl Drop for Quiesced<'_> {
    fn drop(&mut self) {
        for transport in &self.0.transports {
            transport.resume();
        }
    }
}

impl fmt::Debug for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.transports).finish()
    }
}
