//! The interrupt controller: KVM's GICv3, or its GICv2 on a host that has no better.

mod v2;
mod v3;

use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_VGIC_V2_ADDR_TYPE_CPU, KVM_VGIC_V2_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::{DeviceFd, VmFd};
use serde::{Deserialize, Serialize};

use super::super::call;
use super::state::invalid;
use crate::arch::aarch64::{Gic, layout};
use crate::hypervisor::HypervisorError;

/// Interrupts it has; KVM wants a multiple of 32.
const INTERRUPTS: u32 = layout::INTERRUPTS.next_multiple_of(32);

/// An interrupt controller of a VM.
#[derive(Debug)]
pub(super) struct Controller {
    device: DeviceFd,
    version: Gic,
    vcpus: AtomicU32,
    /// Which shared interrupts' lines are high, 32 to a word; a GICv2 doesn't tell.
    lines: Vec<AtomicU32>,
}

/// What one holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in super::super) enum GicState {
    V2(v2::State),
    V3(v3::State),
}

impl Controller {
    /// Makes it, before any vCPU.
    pub(super) fn create(vm: &VmFd) -> Result<Self, HypervisorError> {
        let (device, version) = match device(vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3) {
            Ok(device) => (device, Gic::V3),
            Err(error) if error.errno() == libc::ENODEV => {
                let device = device(vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2);
                (device.map_err(call("KVM_CREATE_DEVICE"))?, Gic::V2)
            }
            Err(error) => return Err(call("KVM_CREATE_DEVICE")(error)),
        };
        let controller = Self {
            device,
            version,
            vcpus: AtomicU32::new(0),
            lines: shared().map(|_| AtomicU32::new(0)).collect(),
        };
        let places = match version {
            Gic::V2 => [
                (KVM_VGIC_V2_ADDR_TYPE_DIST, layout::GIC_DISTRIBUTOR),
                (KVM_VGIC_V2_ADDR_TYPE_CPU, layout::GIC_CPU),
            ],
            Gic::V3 => [
                (KVM_VGIC_V3_ADDR_TYPE_DIST, layout::GIC_DISTRIBUTOR),
                (KVM_VGIC_V3_ADDR_TYPE_REDIST, layout::GIC_REDISTRIBUTORS),
            ],
        };
        for (kind, address) in places {
            controller.set_long(KVM_DEV_ARM_VGIC_GRP_ADDR, kind.into(), address)?;
        }
        controller.set(KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, INTERRUPTS)?;
        Ok(controller)
    }

    pub(super) fn version(&self) -> Gic {
        self.version
    }

    /// There is one vCPU more.
    pub(super) fn add_vcpu(&self) {
        self.vcpus.fetch_add(1, Ordering::Relaxed);
    }

    /// All vCPUs are there: it works from now on.
    pub(super) fn init(&self) -> Result<(), HypervisorError> {
        let init = attribute(
            KVM_DEV_ARM_VGIC_GRP_CTRL,
            KVM_DEV_ARM_VGIC_CTRL_INIT.into(),
            0,
        );
        self.device
            .set_device_attr(&init)
            .map_err(call("KVM_DEV_ARM_VGIC_CTRL_INIT"))
    }

    /// Remembers the level of a shared interrupt's line.
    pub(super) fn note_line(&self, pin: u32, high: bool) {
        let Some(word) = self.lines.get(pin as usize / 32) else {
            return;
        };
        let bit = 1 << (pin % 32);
        if high {
            word.fetch_or(bit, Ordering::Relaxed);
        } else {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    /// Reads it; no vCPU is in a call of KVM's meanwhile.
    pub(super) fn save(&self) -> Result<GicState, HypervisorError> {
        Ok(match self.version {
            Gic::V2 => GicState::V2(v2::save(self)?),
            Gic::V3 => GicState::V3(v3::save(self)?),
        })
    }

    /// Writes it into one of the same version that works, and whose vCPUs have not run. What is
    /// answered are the pins whose lines are high, to be told KVM.
    pub(super) fn restore(&self, state: &GicState) -> Result<Vec<u32>, HypervisorError> {
        match (self.version, state) {
            (Gic::V2, GicState::V2(state)) => v2::restore(self, state),
            (Gic::V3, GicState::V3(state)) => v3::restore(self, state).map(|()| Vec::new()),
            (Gic::V2, GicState::V3(_)) => Err(version(2, 3)),
            (Gic::V3, GicState::V2(_)) => Err(version(3, 2)),
        }
    }

    fn vcpus(&self) -> u32 {
        self.vcpus.load(Ordering::Relaxed)
    }

    fn get(&self, group: u32, attr: u64) -> Result<u32, HypervisorError> {
        let mut value = 0u32;
        let mut attribute = attribute(group, attr, (&raw mut value).expose_provenance() as u64);
        // SAFETY: every group read here but the system registers' has words of 32 bits.
        unsafe { self.device.get_device_attr(&mut attribute) }.map_err(call(GET))?;
        Ok(value)
    }

    fn set(&self, group: u32, attr: u64, value: u32) -> Result<(), HypervisorError> {
        let attribute = attribute(group, attr, (&raw const value).expose_provenance() as u64);
        self.device.set_device_attr(&attribute).map_err(call(SET))
    }

    fn get_long(&self, group: u32, attr: u64) -> Result<u64, HypervisorError> {
        let mut value = 0u64;
        let mut attribute = attribute(group, attr, (&raw mut value).expose_provenance() as u64);
        // SAFETY: no group has words of more than 64 bits.
        unsafe { self.device.get_device_attr(&mut attribute) }.map_err(call(GET))?;
        Ok(value)
    }

    fn set_long(&self, group: u32, attr: u64, value: u64) -> Result<(), HypervisorError> {
        let attribute = attribute(group, attr, (&raw const value).expose_provenance() as u64);
        self.device.set_device_attr(&attribute).map_err(call(SET))
    }
}

const GET: &str = "KVM_GET_DEVICE_ATTR";
const SET: &str = "KVM_SET_DEVICE_ATTR";

fn device(vm: &VmFd, kind: u32) -> Result<DeviceFd, kvm_ioctls::Error> {
    vm.create_device(&mut kvm_create_device {
        type_: kind,
        ..Default::default()
    })
}

fn attribute(group: u32, attr: u64, addr: u64) -> kvm_device_attr {
    kvm_device_attr {
        group,
        attr,
        addr,
        flags: 0,
    }
}

fn version(found: u64, expected: u64) -> HypervisorError {
    HypervisorError::Unsuitable {
        what: "GIC version for this snapshot",
        found,
        expected,
    }
}

/// A register of 32 bits.
#[derive(Clone, Copy)]
struct Word {
    offset: u32,
    /// Where ones clear what the same bits set at `offset`.
    clear: Option<u32>,
}

impl Word {
    const fn plain(offset: u32) -> Self {
        Self {
            offset,
            clear: None,
        }
    }
}

/// Registers that hold some bits for each interrupt, from interrupt 0 on.
struct Bank {
    offset: u32,
    bits: u32,
    /// Offset of the registers that clear.
    clear: Option<u32>,
}

impl Bank {
    const fn plain(offset: u32, bits: u32) -> Self {
        Self {
            offset,
            bits,
            clear: None,
        }
    }

    const fn set_and_clear(set: u32, clear: u32) -> Self {
        Self {
            offset: set,
            bits: 1,
            clear: Some(clear),
        }
    }

    /// Each word with interrupts from `first` to before `end`.
    fn words(&self, first: u32, end: u32) -> impl Iterator<Item = Word> {
        let at = |interrupt| interrupt * self.bits / 8;
        (at(first)..at(end)).step_by(4).map(|place| Word {
            offset: self.offset + place,
            clear: self.clear.map(|offset| offset + place),
        })
    }
}

/// Each word of these banks with interrupts from `first` to before `end`.
fn words<'a>(
    banks: impl Iterator<Item = &'a Bank>,
    first: u32,
    end: u32,
) -> impl Iterator<Item = Word> {
    banks.flat_map(move |bank| bank.words(first, end))
}

/// First shared interrupt of each word of levels.
fn shared() -> impl Iterator<Item = u32> {
    (layout::SPI_BASE..INTERRUPTS).step_by(32)
}

/// Writes each value with `set`, where bits have to be cleared first after that.
fn write(
    words: impl Iterator<Item = Word>,
    values: &[u32],
    set: impl Fn(u32, u32) -> Result<(), HypervisorError>,
) -> Result<(), HypervisorError> {
    let mut values = values.iter();
    for word in words {
        let value = *values.next().ok_or_else(|| invalid(SET))?;
        if let Some(clear) = word.clear {
            set(clear, u32::MAX)?;
        }
        set(word.offset, value)?;
    }
    values.next().map_or(Ok(()), |_| Err(invalid(SET)))
}
