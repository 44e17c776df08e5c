//! Everything KVM holds of a vCPU and of a VM, as data: read from one that stands still, written into
//! a fresh one.

use kvm_bindings::{
    KVM_REG_ARM_COPROC_MASK, KVM_REG_ARM64, KVM_REG_ARM64_SYSREG, KVM_REG_SIZE_MASK,
    KVM_REG_SIZE_SHIFT, KVM_REG_SIZE_U64, RegList, kvm_mp_state, kvm_vcpu_events,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::super::call;
use super::gic::GicState;
use crate::arch::aarch64::register_name;
use crate::hypervisor::HypervisorError;

/// Registers of a vCPU at most: what a list holds.
const MAX_REGISTERS: usize = 500;

/// `MPIDR_EL1`.
const MPIDR: u64 = system(3, 0, 0, 0, 5);
/// `KVM_REG_ARM_TIMER_CNT` of linux/kvm.h: the virtual counter.
const COUNTER: u64 = system(3, 3, 14, 3, 2);
/// Bits of `MPIDR_EL1` that say which processor it is.
const AFFINITY: u64 = 0xff_00ff_ffff;

/// How KVM calls a system register, of 64 bits.
const fn system(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    KVM_REG_ARM64
        | KVM_REG_SIZE_U64
        | KVM_REG_ARM64_SYSREG as u64
        | op0 << 14
        | op1 << 11
        | crn << 7
        | crm << 3
        | op2
}

/// A vCPU that stands still.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// By KVM's numbers, in the order of its list. The counter is the VM's, and only the first
    /// processor has it.
    registers: Vec<(u64, Vec<u8>)>,
    mp_state: kvm_mp_state,
    /// A system error that the guest hasn't taken.
    error: Option<SystemError>,
}

/// Of `struct kvm_vcpu_events`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SystemError {
    /// What it says of itself, if the processor has that.
    syndrome: Option<u64>,
}

/// What a VM has beside its vCPUs and memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    pub(super) gic: GicState,
}

pub(in super::super) fn save_vcpu(
    fd: &VcpuFd,
    _: &super::Extent,
) -> Result<VcpuState, HypervisorError> {
    let mut list = RegList::new(MAX_REGISTERS).map_err(|_| invalid("KVM_GET_REG_LIST"))?;
    fd.get_reg_list(&mut list)
        .map_err(call("KVM_GET_REG_LIST"))?;
    let first = long(fd, MPIDR)? & AFFINITY == 0;
    let kept = |id: &&u64| **id != COUNTER || first;
    let registers = list.as_slice().iter().filter(kept);
    let registers = registers.map(|&id| Ok((id, register(fd, id)?)));
    let events = fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?;
    let exception = events.exception;
    Ok(VcpuState {
        registers: registers.collect::<Result<_, HypervisorError>>()?,
        mp_state: fd.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?,
        error: (exception.serror_pending != 0).then_some(SystemError {
            syndrome: (exception.serror_has_esr != 0).then_some(exception.serror_esr),
        }),
    })
}

pub(in super::super) fn restore_vcpu(
    fd: &VcpuFd,
    state: &VcpuState,
    _: &super::Extent,
) -> Result<(), HypervisorError> {
    for (id, value) in &state.registers {
        restore_register(fd, *id, value)?;
    }
    let mut events = kvm_vcpu_events::default();
    if let Some(SystemError { syndrome }) = state.error {
        events.exception.serror_pending = 1;
        events.exception.serror_has_esr = syndrome.is_some().into();
        events.exception.serror_esr = syndrome.unwrap_or(0);
    }
    fd.set_vcpu_events(&events)
        .map_err(call("KVM_SET_VCPU_EVENTS"))?;
    fd.set_mp_state(state.mp_state)
        .map_err(call("KVM_SET_MP_STATE"))
}

fn restore_register(fd: &VcpuFd, id: u64, value: &[u8]) -> Result<(), HypervisorError> {
    if value.len() != width(id) {
        return Err(invalid("KVM_SET_ONE_REG"));
    }
    // The interrupt controller knows its processors by it.
    if id == MPIDR {
        return same(fd, id, value);
    }
    match fd.set_one_reg(id, value) {
        Ok(_) => Ok(()),
        Err(error) if error.errno() == libc::ENOENT => Err(HypervisorError::Processor {
            found: format!("has {}", name(id)),
            here: "lacks it".to_owned(),
        }),
        // What a processor is can't be written, or not so.
        Err(error) if error.errno() == libc::EINVAL => same(fd, id, value),
        Err(error) => Err(call("KVM_SET_ONE_REG")(error)),
    }
}

/// Refuses a value that is not what the register has here.
fn same(fd: &VcpuFd, id: u64, value: &[u8]) -> Result<(), HypervisorError> {
    let here = register(fd, id)?;
    if here == value {
        return Ok(());
    }
    Err(HypervisorError::Processor {
        found: format!("has {} in {}", hexadecimal(value), name(id)),
        here: format!("has {} there", hexadecimal(&here)),
    })
}

/// Reads a register.
fn register(fd: &VcpuFd, id: u64) -> Result<Vec<u8>, HypervisorError> {
    let mut value = vec![0; width(id)];
    fd.get_one_reg(id, &mut value)
        .map_err(call("KVM_GET_ONE_REG"))?;
    Ok(value)
}

/// Reads a register of 64 bits.
fn long(fd: &VcpuFd, id: u64) -> Result<u64, HypervisorError> {
    let mut value = [0; 8];
    fd.get_one_reg(id, &mut value)
        .map_err(call("KVM_GET_ONE_REG"))?;
    Ok(u64::from_le_bytes(value))
}

/// Bytes of a register: 32768 at most.
fn width(id: u64) -> usize {
    1 << ((id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT)
}

/// `S3_0_C0_C4_0`, as an assembler takes a system register; KVM's number for others.
fn name(id: u64) -> String {
    if id & u64::from(KVM_REG_ARM_COPROC_MASK) != u64::from(KVM_REG_ARM64_SYSREG) {
        return format!("register {id:#x}");
    }
    register_name(id as u32 & 0xffff)
}

fn hexadecimal(value: &[u8]) -> String {
    let digits = value.iter().rev().map(|byte| format!("{byte:02x}"));
    std::iter::once("0x".to_owned()).chain(digits).collect()
}

/// A state that nothing of this host can have.
pub(super) fn invalid(call: &'static str) -> HypervisorError {
    HypervisorError::Call {
        call,
        source: std::io::Error::from_raw_os_error(libc::EINVAL),
    }
}
