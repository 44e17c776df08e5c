//! What a GICv3 holds (Linux, virt/kvm/devices/arm-vgic-v3.rst).

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, KVM_DEV_ARM_VGIC_GRP_DIST_REGS,
    KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
    KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT,
};
use serde::{Deserialize, Serialize};

use super::{Bank, Controller, INTERRUPTS, SET, Word, invalid, shared, words, write};
use crate::arch::aarch64::layout;
use crate::hypervisor::HypervisorError;

/// First registers of the distributor: who made it, before all that depends on that, and what is on.
const GICD: [u32; 2] = [0x8, 0x0];
/// First registers of a redistributor.
const GICR: [u32; 1] = [0x0];
/// The redistributor's second frame.
const SGI_FRAME: u32 = 0x1_0000;

/// Groups, triggers, priorities; then what is on, latched as pending, and active.
const BANKS: [Bank; 6] = [
    Bank::plain(0x080, 1),
    Bank::plain(0xc00, 2),
    Bank::plain(0x400, 8),
    Bank::set_and_clear(0x100, 0x180),
    // Written whole by us, unlike by a guest.
    Bank::plain(0x200, 1),
    Bank::set_and_clear(0x300, 0x380),
];
/// Where each goes.
const ROUTES: Bank = Bank::plain(0x6000, 64);

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

/// Words are in the order of the tables above.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in super::super::super) struct State {
    distributor: Vec<u32>,
    /// Levels of the shared interrupts' lines, 32 to a word.
    lines: Vec<u32>,
    vcpus: Vec<VcpuState>,
}

/// A vCPU's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VcpuState {
    redistributor: Vec<u32>,
    /// Levels of the private interrupts' lines.
    lines: u32,
    interface: Vec<u64>,
}

pub(super) fn save(gic: &Controller) -> Result<State, HypervisorError> {
    let distributor = distributor()
        .map(|word| gic.get(KVM_DEV_ARM_VGIC_GRP_DIST_REGS, word.offset.into()))
        .collect::<Result<_, _>>()?;
    let lines = shared()
        .map(|first| gic.get(KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, first.into()))
        .collect::<Result<_, _>>()?;
    let vcpus = affinities(gic).map(|vcpu| save_vcpu(gic, vcpu));
    Ok(State {
        distributor,
        lines,
        vcpus: vcpus.collect::<Result<_, _>>()?,
    })
}

fn save_vcpu(gic: &Controller, vcpu: u64) -> Result<VcpuState, HypervisorError> {
    let redistributor = redistributor()
        .map(|word| {
            let attr = vcpu | u64::from(word.offset);
            gic.get(KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, attr)
        })
        .collect::<Result<_, _>>()?;
    let control = gic.get_long(KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, vcpu | ICC_CTLR)?;
    let interface = interface(active_registers(control))
        .map(|register| gic.get_long(KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, vcpu | register))
        .collect::<Result<_, _>>()?;
    Ok(VcpuState {
        redistributor,
        lines: gic.get(KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, vcpu)?,
        interface,
    })
}

pub(super) fn restore(gic: &Controller, state: &State) -> Result<(), HypervisorError> {
    let set = |offset: u32, value| gic.set(KVM_DEV_ARM_VGIC_GRP_DIST_REGS, offset.into(), value);
    write(distributor(), &state.distributor, set)?;
    write(shared().map(Word::plain), &state.lines, |first, value| {
        gic.set(KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, first.into(), value)
    })?;
    let vcpus: Vec<_> = affinities(gic).collect();
    if vcpus.len() != state.vcpus.len() {
        return Err(invalid(SET));
    }
    for (vcpu, state) in vcpus.into_iter().zip(&state.vcpus) {
        restore_vcpu(gic, vcpu, state)?;
    }
    Ok(())
}

fn restore_vcpu(gic: &Controller, vcpu: u64, state: &VcpuState) -> Result<(), HypervisorError> {
    write(redistributor(), &state.redistributor, |offset, value| {
        let attr = vcpu | u64::from(offset);
        gic.set(KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, attr, value)
    })?;
    gic.set(KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, vcpu, state.lines)?;
    // What control this host has says how many active priorities there are.
    let control = gic.get_long(KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, vcpu | ICC_CTLR)?;
    let registers: Vec<_> = interface(active_registers(control)).collect();
    if registers.len() != state.interface.len() {
        return Err(invalid(SET));
    }
    for (register, value) in registers.into_iter().zip(&state.interface) {
        gic.set_long(KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, vcpu | register, *value)?;
    }
    Ok(())
}

/// The vCPUs, as attributes name them.
fn affinities(gic: &Controller) -> impl Iterator<Item = u64> + use<> {
    (0..gic.vcpus()).map(|index| layout::affinity(index) << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT)
}

/// Each word of the distributor. Banks start with the shared interrupts: the private ones are the
/// redistributors'.
fn distributor() -> impl Iterator<Item = Word> {
    let words = words(BANKS.iter().chain([&ROUTES]), layout::SPI_BASE, INTERRUPTS);
    GICD.map(Word::plain).into_iter().chain(words)
}

/// The same for a redistributor. There is no ITS, hence nothing of its tables.
fn redistributor() -> impl Iterator<Item = Word> {
    let words = words(BANKS.iter(), 0, layout::SPI_BASE).map(|word| Word {
        offset: SGI_FRAME + word.offset,
        clear: word.clear.map(|offset| SGI_FRAME + offset),
    });
    GICR.map(Word::plain).into_iter().chain(words)
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
