//! A VM that goes on from a snapshot.

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::assembly::{Assembly, VcpuOf};
use super::board::Serial;
use super::devices::{DeviceSet, Handles};
use super::run::Begin;
use super::save::MachineState;
use crate::arch::VcpuSetup;
use crate::arch::current::{MAX_VCPUS, layout};
use crate::config::DiskConfig;
use crate::devices::virtio::console::{
    ConsoleConfig, ConsoleState, PortConfig, PortEnds, PortEvent,
};
use crate::devices::virtio::transport::mmio::TransportState;
use crate::devices::virtio::vsock::VsockConfig;
use crate::devices::virtio::{DeviceState, FaultObserver};
use crate::error::Error;
use crate::hypervisor::{Hypervisor, Vcpu, VcpuSeed, VmBackend};
use crate::snapshot::{Kind, SnapshotFile, image};
use crate::sys::ring::Rings;

/// What a VM goes on from, and with. Its shape is the snapshot's; what its devices are connected to
/// is given anew.
pub struct RestoreConfig {
    /// A full snapshot and the diffs on it, oldest first. The files must not get shorter while the
    /// VM lives.
    pub snapshot: Vec<File>,
    /// Whether to read all guest RAM first and compare its checksums. Without, damage of RAM is not
    /// found; that of everything else always is.
    pub verify_memory: bool,
    /// Where the kernel's log on the serial port goes, if it has one.
    pub serial: Option<OwnedFd>,
    /// The disks, as many as the snapshot has, in its order. One may be of another size, such as one
    /// that was empty: the guest is told.
    pub disks: Vec<DiskConfig>,
    /// Hears of the console's ports; see [`ConsoleConfig::events`].
    pub events: Box<dyn Fn(PortEvent) + Send + Sync>,
    /// What ports are connected to. Those left out are closed to the guest.
    pub ports: Vec<(u32, PortEnds)>,
    /// The socket into the guest, if the snapshot has one. The guest's connections have ended.
    pub vsock: Option<VsockConfig>,
    /// Where disks get their rings.
    pub(crate) rings: Rings,
    /// Hears of each device that faults, by id and reason.
    pub on_device_fault: Option<Arc<FaultObserver>>,
}

impl RestoreConfig {
    /// Of a full snapshot, whose RAM is verified, with nothing connected.
    pub fn new(snapshot: File) -> Self {
        Self {
            snapshot: vec![snapshot],
            verify_memory: true,
            serial: None,
            disks: Vec::new(),
            events: Box::new(|_| ()),
            ports: Vec::new(),
            vsock: None,
            rings: Rings::default(),
            on_device_fault: None,
        }
    }
}

impl fmt::Debug for RestoreConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RestoreConfig")
            .field("snapshot", &self.snapshot)
            .field("verify_memory", &self.verify_memory)
            .field("disks", &self.disks)
            .field("ports", &self.ports)
            .field("vsock", &self.vsock)
            .finish_non_exhaustive()
    }
}

impl<B> Assembly<B>
where
    B: VmBackend<Seed: VcpuSeed<Vcpu: Vcpu<Setup = VcpuSetup>>>,
{
    /// Builds a VM that is what the snapshot has. Nothing of it runs, and no device works, before
    /// [`start`](Self::start).
    pub(super) fn restore<H: Hypervisor<Vm = B>>(
        hypervisor: &H,
        mut config: RestoreConfig,
    ) -> Result<Self, Error> {
        let files = std::mem::take(&mut config.snapshot);
        let chain: Vec<_> = files
            .into_iter()
            .map(SnapshotFile::open)
            .collect::<Result<_, _>>()?;
        let Some(newest) = chain.last() else {
            return Err(mismatch("one file at least", "none"));
        };
        let machine: MachineState = newest.state(Kind::Machine, 0)?;
        check(&machine, hypervisor.caps().max_vcpus)?;
        let devices: Vec<TransportState> = newest.state(Kind::Devices, 0)?;
        let vm: B::State = newest.state(Kind::Vm, 0)?;
        let vcpus = (0..machine.vcpus)
            .map(|index| newest.state(Kind::Vcpu, index))
            .collect::<Result<Vec<<VcpuOf<B> as Vcpu>::State>, _>>()?;
        if config.verify_memory {
            for file in &chain {
                file.verify_memory()?;
            }
        }
        let memory = image::map(&chain)?;
        let ranges = memory.host_ranges().map(|(start, _, len)| (start, len));
        if ranges.ne(layout::ram_ranges(machine.memory)) {
            let given = format!("RAM that is no {} bytes of it", machine.memory);
            return Err(mismatch("the layout of this machine", given));
        }

        let mut set = DeviceSet::new(memory.clone(), config.on_device_fault.take())?;
        let handles = add_devices(&mut set, &devices, &machine, &mut config)?;
        // What is left over goes while the VM is made.
        drop(std::mem::take(&mut config.rings));
        let serial = machine.serial.map(|state| Serial {
            sink: config.serial.take(),
            state: Some(state),
        });
        let windows = set.build()?;
        windows.restore(devices)?;
        let backend = hypervisor.create_vm()?;
        let states = std::cell::RefCell::new(vcpus.into_iter());
        let begin = |_| match states.borrow_mut().next() {
            Some(state) => Ok(Begin::Restore(Box::new(state))),
            None => Err(mismatch("fewer vCPUs", "more")),
        };
        let count = machine.vcpus;
        let assembly =
            Self::put_together(backend, memory, windows, handles, serial, (count, begin))?;
        assembly.backend().restore(&vm)?;
        // The ports know by now what the guest has open.
        for (port, ends) in config.ports {
            assembly.attach(port, ends)?;
        }
        Ok(assembly)
    }
}

fn check(machine: &MachineState, max_vcpus: u32) -> Result<(), Error> {
    if machine.arch != std::env::consts::ARCH {
        let given = format!("a host of {}", std::env::consts::ARCH);
        return Err(mismatch(format!("a machine of {}", machine.arch), given));
    }
    let max = max_vcpus.min(MAX_VCPUS);
    if machine.vcpus == 0 || machine.vcpus > max {
        let asked = machine.vcpus;
        return Err(Error::Vcpus { asked, max });
    }
    Ok(())
}

/// Makes the devices that the snapshot has, with what they are connected to now.
fn add_devices(
    set: &mut DeviceSet,
    states: &[TransportState],
    machine: &MachineState,
    config: &mut RestoreConfig,
) -> Result<Handles, Error> {
    if states.len() > layout::MAX_VIRTIO_DEVICES as usize {
        let (asked, max) = (states.len(), layout::MAX_VIRTIO_DEVICES);
        return Err(Error::TooManyDevices { asked, max });
    }
    let slots = states.iter();
    let slots = slots.filter(|state| matches!(state.device, DeviceState::Block(_)));
    let (slots, given) = (slots.count(), config.disks.len());
    if slots != given {
        return Err(mismatch(format!("{slots} disks"), given.to_string()));
    }
    let mut disks = std::mem::take(&mut config.disks).into_iter();
    let mut handles = Handles::default();
    for state in states {
        match &state.device {
            DeviceState::Console(state) if handles.console.is_none() => {
                set.add_console(console(state, config), &mut handles)?;
            }
            DeviceState::Vsock(_) => {
                let vsock = config.vsock.take();
                set.add_vsock(vsock.ok_or_else(|| mismatch("a vsock device", "no socket"))?)?;
            }
            DeviceState::Balloon(state) if handles.balloon.is_none() => {
                set.add_balloon(state.offers, machine.memory, &mut handles)?;
            }
            DeviceState::Rng => set.add_rng(),
            DeviceState::Block(_) => {
                if let Some(disk) = disks.next() {
                    set.add_disk(disk, &mut handles, &mut config.rings)?;
                }
            }
            DeviceState::Console(_) | DeviceState::Balloon(_) => {
                return Err(mismatch(format!("a second {}", state.device.name()), "one"));
            }
        }
    }
    if handles.console.is_none() && !config.ports.is_empty() {
        return Err(mismatch("no console", format!("{:?}", config.ports)));
    }
    if config.vsock.is_some() {
        return Err(mismatch("no vsock device", "a socket"));
    }
    Ok(handles)
}

/// A console with as many ports.
fn console(state: &ConsoleState, config: &mut RestoreConfig) -> ConsoleConfig {
    let events = std::mem::replace(&mut config.events, Box::new(|_| ()));
    let names = state.ports.iter().map(|port| port.name.clone());
    ConsoleConfig {
        ports: names.map(|name| PortConfig { name }).collect(),
        max_ports: u32::try_from(state.ports.len()).unwrap_or(u32::MAX),
        events,
    }
}

fn mismatch(has: impl Into<String>, given: impl Into<String>) -> Error {
    Error::Mismatch {
        has: has.into(),
        given: given.into(),
    }
}
