//! The interrupt controller: KVM's GICv3, or its GICv2 on a host that has no better (Linux,
//! virt/kvm/devices/arm-vgic-v3.rst and arm-vgic.rst).

use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS,
    KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
    KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT, KVM_VGIC_V2_ADDR_TYPE_CPU, KVM_VGIC_V2_ADDR_TYPE_DIST,
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

/// First registers of the distributor: who made it, before all that depends on that, and what is on.
const GICD: [u32; 2] = [0x8, 0x0];
/// First registers of a redistributor.
const GICR: [u32; 1] = [0x0];
/// The redistributor's second frame.
const SGI_FRAME: u32 = 0x1_0000;

/// Registers that hold some bits for each interrupt, from interrupt 0 on.
struct Bank {
    offset: u32,
    bits: u32,
    /// Ones set what the same bits clear this far from here.
    clear: Option<u32>,
}

/// Groups, triggers, priorities; then what is on, latched as pending, and active.
const BANKS: [Bank; 6] = [
    Bank::plain(0x080, 1),
    Bank::plain(0xc00, 2),
    Bank::plain(0x400, 8),
    Bank::set_and_clear(0x100),
    // Written whole by us, unlike by a guest.
    Bank::plain(0x200, 1),
    Bank::set_and_clear(0x300),
];
/// Where each goes.
const ROUTES: Bank = Bank::plain(0x6000, 64);

impl Bank {
    const fn plain(offset: u32, bits: u32) -> Self {
        Self {
            offset,
            bits,
            clear: None,
        }
    }

    const fn set_and_clear(offset: u32) -> Self {
        Self {
            offset,
            bits: 1,
            clear: Some(0x80),
        }
    }

    /// Offset of each word with interrupts from `first` to before `end`.
    fn words(&self, first: u32, end: u32) -> impl Iterator<Item = u32> {
        let at = |interrupt| self.offset + interrupt * self.bits / 8;
        (at(first)..at(end)).step_by(4)
    }
}

/// Op0, op1, CRn, CRm and op2 of a system register, as an instruction has them.
const fn system(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
}

const ICC_CTLR: u64 = system(3, 0, 12, 12, 4);
/// The CPU interface, in the order it is written: ICC_SRE, _CTLR, _PMR, _BPR0, _BPR1, _IGRPEN0,
/// _IGRPEN1.
const INTERFACE: [u64; 7] = [
    system(3, 0, 12, 12, 5),
    ICC_CTLR,
    system(3, 0, 4, 6, 0),
    system(3, 0, 12, 8, 3),
    system(3, 0, 12, 12, 3),
    system(3, 0, 12, 12, 6),
    system(3, 0, 12, 12, 7),
];
/// First of the active priorities of group 0, and of group 1.
const ACTIVE: [u64; 2] = [system(3, 0, 12, 8, 4), system(3, 0, 12, 9, 0)];

/// An interrupt controller of a VM.
#[derive(Debug)]
pub(super) struct Controller {
    device: DeviceFd,
    version: Gic,
    vcpus: AtomicU32,
}

/// What it holds. Words are in the order of the tables above.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in super::super) struct GicState {
    distributor: Vec<u32>,
    /// Levels of the shared interrupts' lines, 32 to a word.
    lines: Vec<u32>,
    vcpus: Vec<GicVcpuState>,
}

/// A vCPU's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GicVcpuState {
    redistributor: Vec<u32>,
    /// Levels of the private interrupts' lines.
    lines: u32,
    interface: Vec<u64>,
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

    /// Reads it; no vCPU is in a call of KVM's meanwhile.
    pub(super) fn save(&self) -> Result<GicState, HypervisorError> {
        self.check_version()?;
        let distributor = distributor()
            .map(|(offset, _)| self.get(KVM_DEV_ARM_VGIC_GRP_DIST_REGS, offset.into()))
            .collect::<Result<_, _>>()?;
        let lines = shared()
            .map(|first| self.get(KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, first.into()))
            .collect::<Result<_, _>>()?;
        let vcpus = self.affinities().map(|vcpu| self.save_vcpu(vcpu));
        Ok(GicState {
            distributor,
            lines,
            vcpus: vcpus.collect::<Result<_, _>>()?,
        })
    }

    fn save_vcpu(&self, vcpu: u64) -> Result<GicVcpuState, HypervisorError> {
        let redistributor = redistributor()
            .map(|(offset, _)| self.get(KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, vcpu | u64::from(offset)))
            .collect::<Result<_, _>>()?;
        let control = self.get_long(KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, vcpu | ICC_CTLR)?;
        let interface = interface(active_registers(control))
            .map(|register| self.get_long(KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, vcpu | register))
            .collect::<Result<_, _>>()?;
        Ok(GicVcpuState {
            redistributor,
            lines: self.get(KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, vcpu)?,
            interface,
        })
    }

    /// Writes it into one that works, and whose vCPUs have not run.
    pub(super) fn restore(&self, state: &GicState) -> Result<(), HypervisorError> {
        self.check_version()?;
        let set =
            |offset: u32, value| self.set(KVM_DEV_ARM_VGIC_GRP_DIST_REGS, offset.into(), value);
        write(distributor(), &state.distributor, set)?;
        let shared = shared().map(|first| (first, None));
        write(shared, &state.lines, |first, value| {
            self.set(KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, first.into(), value)
        })?;
        let vcpus: Vec<_> = self.affinities().collect();
        if vcpus.len() != state.vcpus.len() {
            return Err(invalid(SET));
        }
        for (vcpu, state) in vcpus.into_iter().zip(&state.vcpus) {
            self.restore_vcpu(vcpu, state)?;
        }
        Ok(())
    }

    fn restore_vcpu(&self, vcpu: u64, state: &GicVcpuState) -> Result<(), HypervisorError> {
        write(redistributor(), &state.redistributor, |offset, value| {
            let attr = vcpu | u64::from(offset);
            self.set(KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, attr, value)
        })?;
        self.set(KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, vcpu, state.lines)?;
        // What control this host has says how many active priorities there are.
        let control = self.get_long(KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, vcpu | ICC_CTLR)?;
        let registers: Vec<_> = interface(active_registers(control)).collect();
        if registers.len() != state.interface.len() {
            return Err(invalid(SET));
        }
        for (register, value) in registers.into_iter().zip(&state.interface) {
            self.set_long(KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, vcpu | register, *value)?;
        }
        Ok(())
    }

    fn check_version(&self) -> Result<(), HypervisorError> {
        match self.version {
            Gic::V3 => Ok(()),
            Gic::V2 => Err(HypervisorError::Unsuitable {
                what: "GIC version for a snapshot",
                found: 2,
                expected: 3,
            }),
        }
    }

    /// The vCPUs, as attributes name them.
    fn affinities(&self) -> impl Iterator<Item = u64> {
        let vcpus = self.vcpus.load(Ordering::Relaxed);
        (0..vcpus).map(|index| layout::affinity(index) << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT)
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

/// Offset of each word of the distributor; of those that only set, how far it is to the word that
/// clears. Each starts with the shared interrupts: the private ones are the redistributors'.
fn distributor() -> impl Iterator<Item = (u32, Option<u32>)> {
    let banks = BANKS.iter().chain([&ROUTES]).flat_map(|bank| {
        let words = bank.words(layout::SPI_BASE, INTERRUPTS);
        words.map(|offset| (offset, bank.clear))
    });
    GICD.map(|offset| (offset, None)).into_iter().chain(banks)
}

/// The same for a redistributor. There is no ITS, hence nothing of its tables.
fn redistributor() -> impl Iterator<Item = (u32, Option<u32>)> {
    let banks = BANKS.iter().flat_map(|bank| {
        let words = bank.words(0, layout::SPI_BASE);
        words.map(|offset| (SGI_FRAME + offset, bank.clear))
    });
    GICR.map(|offset| (offset, None)).into_iter().chain(banks)
}

/// First shared interrupt of each word of levels.
fn shared() -> impl Iterator<Item = u32> {
    (layout::SPI_BASE..INTERRUPTS).step_by(32)
}

/// How many registers of active priorities each group has, by `ICC_CTLR_EL1.PRIbits` (Arm IHI 0069,
/// ICC_AP0R<n>_EL1).
fn active_registers(control: u64) -> u64 {
    match (control >> 8 & 7) + 1 {
        ..=5 => 1,
        6 => 2,
        _ => 4,
    }
}

fn interface(active: u64) -> impl Iterator<Item = u64> {
    let active = ACTIVE.map(|first| first..first + active);
    INTERFACE.into_iter().chain(active.into_iter().flatten())
}

/// Writes each value with `set`, where bits have to be cleared first after that.
fn write(
    words: impl Iterator<Item = (u32, Option<u32>)>,
    values: &[u32],
    set: impl Fn(u32, u32) -> Result<(), HypervisorError>,
) -> Result<(), HypervisorError> {
    let mut values = values.iter();
    for (offset, clear) in words {
        let value = *values.next().ok_or_else(|| invalid(SET))?;
        if let Some(clear) = clear {
            set(offset + clear, u32::MAX)?;
        }
        set(offset, value)?;
    }
    values.next().map_or(Ok(()), |_| Err(invalid(SET)))
}
