//! What a GICv2 holds (Linux, virt/kvm/devices/arm-vgic.rst).

use std::sync::atomic::Ordering;

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CPUID_SHIFT, KVM_DEV_ARM_VGIC_GRP_CPU_REGS, KVM_DEV_ARM_VGIC_GRP_DIST_REGS,
};
use serde::{Deserialize, Serialize};

use super::{Bank, Controller, INTERRUPTS, SET, Word, invalid, words, write};
use crate::arch::aarch64::layout;
use crate::hypervisor::HypervisorError;

/// First registers of the distributor: who made it, after which groups can be written, and what is
/// on.
const GICD: [u32; 2] = [0x8, 0x0];

/// Groups, triggers, priorities; then what is on, pending, and active.
const BANKS: [Bank; 6] = [
    Bank::plain(0x080, 1),
    Bank::plain(0xc00, 2),
    Bank::plain(0x400, 8),
    Bank::set_and_clear(0x100, 0x180),
    Bank::set_and_clear(0x200, 0x280),
    Bank::set_and_clear(0x300, 0x380),
];
/// Which processors each shared interrupt is for.
const TARGETS: Bank = Bank::plain(0x800, 8);
/// Which processors have sent each interrupt that software makes. After what is pending: KVM takes
/// those for sent by their own processor.
const SENDERS: Bank = Bank {
    offset: 0xf20,
    bits: 8,
    clear: Some(0xf10),
};
/// Interrupts that software makes.
const SGIS: u32 = 16;

/// The CPU interface: GICC_CTLR, _PMR, _BPR, _ABPR, and the active priorities.
const INTERFACE: [u32; 8] = [0x0, 0x4, 0x8, 0x1c, 0xd0, 0xd4, 0xd8, 0xdc];

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
    /// Its own of the distributor's registers.
    distributor: Vec<u32>,
    interface: Vec<u32>,
}

pub(super) fn save(gic: &Controller) -> Result<State, HypervisorError> {
    let get = |word: Word| gic.get(KVM_DEV_ARM_VGIC_GRP_DIST_REGS, word.offset.into());
    let lines = gic.lines.iter().map(|word| word.load(Ordering::Relaxed));
    let vcpus = vcpus(gic).map(|vcpu| save_vcpu(gic, vcpu));
    Ok(State {
        distributor: distributor().map(get).collect::<Result<_, _>>()?,
        lines: lines.collect(),
        vcpus: vcpus.collect::<Result<_, _>>()?,
    })
}

fn save_vcpu(gic: &Controller, vcpu: u64) -> Result<VcpuState, HypervisorError> {
    let get = |group: u32, word: Word| gic.get(group, vcpu | u64::from(word.offset));
    let distributor = private().map(|word| get(KVM_DEV_ARM_VGIC_GRP_DIST_REGS, word));
    let interface = interface().map(|word| get(KVM_DEV_ARM_VGIC_GRP_CPU_REGS, word));
    Ok(VcpuState {
        distributor: distributor.collect::<Result<_, _>>()?,
        interface: interface.collect::<Result<_, _>>()?,
    })
}

/// Answers the pins whose lines are high.
pub(super) fn restore(gic: &Controller, state: &State) -> Result<Vec<u32>, HypervisorError> {
    if state.lines.len() != gic.lines.len() || state.vcpus.len() != gic.vcpus() as usize {
        return Err(invalid(SET));
    }
    let set = |offset: u32, value| gic.set(KVM_DEV_ARM_VGIC_GRP_DIST_REGS, offset.into(), value);
    write(distributor(), &state.distributor, set)?;
    for (vcpu, state) in vcpus(gic).zip(&state.vcpus) {
        let set = |group: u32, offset: u32, value| gic.set(group, vcpu | u64::from(offset), value);
        write(private(), &state.distributor, |offset, value| {
            set(KVM_DEV_ARM_VGIC_GRP_DIST_REGS, offset, value)
        })?;
        write(interface(), &state.interface, |offset, value| {
            set(KVM_DEV_ARM_VGIC_GRP_CPU_REGS, offset, value)
        })?;
    }
    let high = |pin: &u32| state.lines[*pin as usize / 32] >> (pin % 32) & 1 == 1;
    Ok((0..INTERRUPTS - layout::SPI_BASE).filter(high).collect())
}

/// The vCPUs, as attributes name them.
fn vcpus(gic: &Controller) -> impl Iterator<Item = u64> + use<> {
    (0..gic.vcpus()).map(|index| u64::from(index) << KVM_DEV_ARM_VGIC_CPUID_SHIFT)
}

/// Each word of the distributor that all vCPUs share.
fn distributor() -> impl Iterator<Item = Word> {
    let words = words(BANKS.iter().chain([&TARGETS]), layout::SPI_BASE, INTERRUPTS);
    GICD.map(Word::plain).into_iter().chain(words)
}

/// Each word of it that a vCPU has for itself.
fn private() -> impl Iterator<Item = Word> {
    words(BANKS.iter(), 0, layout::SPI_BASE).chain(SENDERS.words(0, SGIS))
}

fn interface() -> impl Iterator<Item = Word> {
    INTERFACE.map(Word::plain).into_iter()
}
