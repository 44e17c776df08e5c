//! The virtio devices of a VM: made from the configuration, then attached to buses and lines.

use std::fmt;
use std::sync::Arc;

use super::assembly::notify_address;
use crate::arch::current::layout;
use crate::config::VmConfig;
use crate::devices::bus::Bus;
use crate::devices::virtio::transport::mmio::{MmioParts, MmioTransport};
use crate::devices::virtio::{FaultObserver, VirtioDevice};
use crate::error::Error;
use crate::hypervisor::{Binding, IrqLine, VmBackend};
use crate::memory::GuestMemory;
use crate::sys::reactor::{Reactor, ReactorHandle};

/// Devices that have been made and not attached, in the order of their slots.
pub(super) struct DeviceSet {
    memory: GuestMemory,
    observer: Arc<FaultObserver>,
    /// Runs every device that never blocks.
    shared: Reactor,
    /// One for each device whose backend blocks.
    own: Vec<Reactor>,
    devices: Vec<(Box<dyn VirtioDevice>, ReactorHandle)>,
}

impl DeviceSet {
    pub(super) fn new(
        memory: GuestMemory,
        observer: Option<Arc<FaultObserver>>,
    ) -> Result<Self, Error> {
        let shared = reactor("devices")?;
        let observer = observer.unwrap_or_else(|| Arc::new(|_, _| ()));
        Ok(Self { memory, observer, shared, own: Vec::new(), devices: Vec::new() })
    }

    /// Makes what the configuration asks for.
    pub(super) fn add_configured(&mut self, _config: &mut VmConfig) -> Result<(), Error> {
        Ok(())
    }

    /// Adds a device that never blocks.
    pub(super) fn add(&mut self, device: Box<dyn VirtioDevice>) {
        self.devices.push((device, self.shared.handle()));
    }

    /// Adds a device whose backend may block: it gets a thread of its own.
    pub(super) fn add_blocking(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), Error> {
        let own = reactor(device.id())?;
        self.devices.push((device, own.handle()));
        self.own.push(own);
        Ok(())
    }

    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.devices.len()).unwrap_or(u32::MAX)
    }

    /// Gives each device its window, interrupt pin and doorbells.
    pub(super) fn attach<B: VmBackend>(
        self,
        backend: &B,
        mmio: &mut Bus,
    ) -> Result<Devices, Error> {
        if self.len() > layout::MAX_VIRTIO_DEVICES {
            let (asked, max) = (self.devices.len(), layout::MAX_VIRTIO_DEVICES);
            return Err(Error::TooManyDevices { asked, max });
        }
        let mut transports = Vec::with_capacity(self.devices.len());
        for (slot, (device, reactor)) in (0..).zip(self.devices) {
            let line = backend.irq_line(layout::virtio_pin(slot))?;
            let id = device.id().to_owned();
            let parts = MmioParts {
                memory: self.memory.clone(),
                reactor,
                raise: Box::new(move || line.pulse()),
                observer: Arc::clone(&self.observer),
            };
            let transport = MmioTransport::new(device, parts)
                .map_err(|source| Error::Device { device: id, source })?;
            for (index, doorbell) in (0..).zip(transport.doorbells()) {
                if backend.bind_doorbell(notify_address(slot), index, doorbell)? == Binding::Exits {
                    break;
                }
            }
            let transport = Arc::new(transport);
            let window: Arc<MmioTransport> = Arc::clone(&transport);
            mmio.insert(layout::virtio_address(slot), layout::VIRTIO_STRIDE, window)?;
            transports.push(transport);
        }
        Ok(Devices { transports, _reactors: (self.shared, self.own) })
    }
}

fn reactor(name: &str) -> Result<Reactor, Error> {
    Reactor::new(name).map_err(|source| Error::Thread { name: name.into(), source })
}

/// The attached devices and the threads they work on.
pub(super) struct Devices {
    transports: Vec<Arc<MmioTransport>>,
    // After the transports: a device stops its worker on its reactor.
    _reactors: (Reactor, Vec<Reactor>),
}

impl Devices {
    /// Stops all devices. The vCPUs must have stopped.
    pub(super) fn shut_down(&self) {
        for transport in &self.transports {
            transport.shut_down();
        }
    }
}

impl fmt::Debug for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.transports).finish()
    }
}
