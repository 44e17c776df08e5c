//! What a VM and its vCPUs hold, for snapshots.
//!
//! The interrupt controller's state is the framework's own blob, which another version of macOS may
//! refuse; it leaves out the CPU interfaces, which go with their vCPUs. Breakpoints that a debugger
//! in the guest has set are not kept.

use applevisor::error::HypervisorError as HvError;
use applevisor::gic::GicIccReg;
use applevisor::vcpu::{Reg, SimdFpReg, SysReg, Vcpu as Raw};
use serde::{Deserialize, Serialize};

use super::registers::GENERAL;
use super::{Late, Machine, call, counter};
use crate::hypervisor::HypervisorError;

/// Beside the general ones.
const SPECIAL: [Reg; 4] = [Reg::PC, Reg::CPSR, Reg::FPCR, Reg::FPSR];

/// In the order they are written: a timer's condition before its control.
const SYSTEM: [SysReg; 37] = [
    SysReg::MDCCINT_EL1,
    SysReg::MDSCR_EL1,
    SysReg::SCTLR_EL1,
    SysReg::CPACR_EL1,
    SysReg::TTBR0_EL1,
    SysReg::TTBR1_EL1,
    SysReg::TCR_EL1,
    SysReg::APIAKEYLO_EL1,
    SysReg::APIAKEYHI_EL1,
    SysReg::APIBKEYLO_EL1,
    SysReg::APIBKEYHI_EL1,
    SysReg::APDAKEYLO_EL1,
    SysReg::APDAKEYHI_EL1,
    SysReg::APDBKEYLO_EL1,
    SysReg::APDBKEYHI_EL1,
    SysReg::APGAKEYLO_EL1,
    SysReg::APGAKEYHI_EL1,
    SysReg::SPSR_EL1,
    SysReg::ELR_EL1,
    SysReg::SP_EL0,
    SysReg::SP_EL1,
    SysReg::AFSR0_EL1,
    SysReg::AFSR1_EL1,
    SysReg::ESR_EL1,
    SysReg::FAR_EL1,
    SysReg::PAR_EL1,
    SysReg::MAIR_EL1,
    SysReg::AMAIR_EL1,
    SysReg::VBAR_EL1,
    SysReg::CONTEXTIDR_EL1,
    SysReg::TPIDR_EL1,
    SysReg::TPIDR_EL0,
    SysReg::TPIDRRO_EL0,
    SysReg::CNTKCTL_EL1,
    SysReg::CSSELR_EL1,
    SysReg::CNTV_CVAL_EL0,
    SysReg::CNTV_CTL_EL0,
];

/// The CPU interface, in the order it is written: the way to its registers first.
const INTERFACE: [GicIccReg; 9] = [
    GicIccReg::SRE_EL1,
    GicIccReg::CTLR_EL1,
    GicIccReg::PMR_EL1,
    GicIccReg::BPR0_EL1,
    GicIccReg::BPR1_EL1,
    GicIccReg::AP0R0_EL1,
    GicIccReg::AP1R0_EL1,
    GicIccReg::IGRPEN0_EL1,
    GicIccReg::IGRPEN1_EL1,
];

const VECTORS: [SimdFpReg; 32] = [
    SimdFpReg::Q0,
    SimdFpReg::Q1,
    SimdFpReg::Q2,
    SimdFpReg::Q3,
    SimdFpReg::Q4,
    SimdFpReg::Q5,
    SimdFpReg::Q6,
    SimdFpReg::Q7,
    SimdFpReg::Q8,
    SimdFpReg::Q9,
    SimdFpReg::Q10,
    SimdFpReg::Q11,
    SimdFpReg::Q12,
    SimdFpReg::Q13,
    SimdFpReg::Q14,
    SimdFpReg::Q15,
    SimdFpReg::Q16,
    SimdFpReg::Q17,
    SimdFpReg::Q18,
    SimdFpReg::Q19,
    SimdFpReg::Q20,
    SimdFpReg::Q21,
    SimdFpReg::Q22,
    SimdFpReg::Q23,
    SimdFpReg::Q24,
    SimdFpReg::Q25,
    SimdFpReg::Q26,
    SimdFpReg::Q27,
    SimdFpReg::Q28,
    SimdFpReg::Q29,
    SimdFpReg::Q30,
    SimdFpReg::Q31,
];

/// A VM's, beside memory and vCPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    /// What the guest's counter showed.
    counter: u64,
    gic: Vec<u8>,
}

/// A vCPU's. Lists are in the order of the tables above.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    on: bool,
    general: Vec<u64>,
    special: Vec<u64>,
    /// Lower and upper half.
    vectors: Vec<[u64; 2]>,
    system: Vec<u64>,
    interface: Vec<u64>,
    timer_masked: bool,
}

impl VcpuState {
    /// Whether it was switched on.
    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    #[cfg(all(test, not(target_os = "macos")))]
    pub(super) fn timer_is_masked(&self) -> bool {
        self.timer_masked
    }
}

pub(super) fn save_vm(machine: &Machine) -> Result<VmState, HypervisorError> {
    let gic = machine
        .with(|vm| {
            let mut state = vm.gic_state_create()?;
            let mut bytes = vec![0; state.size()?];
            state.get(&mut bytes)?;
            Ok(bytes)
        })
        .map_err(call("hv_gic_state_get_data"))?;
    Ok(VmState {
        counter: counter().wrapping_sub(machine.epoch()),
        gic,
    })
}

/// The counter at once; the interrupt controller when there are vCPUs.
pub(super) fn restore_vm(machine: &Machine, state: &VmState) {
    *machine
        .epoch
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner) = counter().wrapping_sub(state.counter);
    *machine.late() = Some(Late {
        gic: state.gic.clone(),
        lines: Vec::new(),
    });
}

/// All vCPUs exist, each on its thread, and none has run: the framework drops without a word what
/// the blob says of others.
pub(super) fn restore_gic(machine: &Machine) -> Result<(), HypervisorError> {
    // Who sets a line meanwhile waits.
    let mut late = machine.late();
    let Some(Late { gic, lines }) = late.take() else {
        return Ok(());
    };
    machine
        .with(|vm| vm.gic_state_create()?.set(&gic))
        .map_err(call("hv_gic_set_state"))?;
    for (interrupt, high) in lines {
        machine
            .with(|vm| vm.gic_set_spi(interrupt, high))
            .map_err(call("hv_gic_set_spi"))?;
    }
    drop(late);
    Ok(())
}

pub(super) fn save_vcpu(vcpu: &Raw, on: bool) -> Result<VcpuState, HypervisorError> {
    let read = || -> Result<VcpuState, HvError> {
        let vector = |register| {
            let value = vcpu.get_simd_fp_reg(register)?;
            Ok([value as u64, (value >> 64) as u64])
        };
        Ok(VcpuState {
            on,
            general: each(GENERAL, |register| vcpu.get_reg(register))?,
            special: each(SPECIAL, |register| vcpu.get_reg(register))?,
            vectors: each(VECTORS, vector)?,
            system: each(SYSTEM, |register| vcpu.get_sys_reg(register))?,
            interface: each(INTERFACE, |register| vcpu.get_icc_reg(register))?,
            timer_masked: vcpu.get_vtimer_mask()?,
        })
    };
    read().map_err(call("hv_vcpu_get_reg"))
}

/// After the VM's.
pub(super) fn restore_vcpu(
    vcpu: &Raw,
    state: &VcpuState,
    epoch: u64,
) -> Result<(), HypervisorError> {
    fits("general registers", &state.general, GENERAL.len())?;
    fits("special registers", &state.special, SPECIAL.len())?;
    fits("vector registers", &state.vectors, VECTORS.len())?;
    fits("system registers", &state.system, SYSTEM.len())?;
    fits("interface registers", &state.interface, INTERFACE.len())?;
    let write = || -> Result<(), HvError> {
        vcpu.set_vtimer_offset(epoch)?;
        put(GENERAL, &state.general, |reg, value| {
            vcpu.set_reg(reg, value)
        })?;
        put(SPECIAL, &state.special, |reg, value| {
            vcpu.set_reg(reg, value)
        })?;
        put(VECTORS, &state.vectors, |reg, [low, high]| {
            set_vector(vcpu, reg, u128::from(low) | u128::from(high) << 64)
        })?;
        put(SYSTEM, &state.system, |reg, value| {
            vcpu.set_sys_reg(reg, value)
        })?;
        put(INTERFACE, &state.interface, |reg, value| {
            vcpu.set_icc_reg(reg, value)
        })?;
        vcpu.set_vtimer_mask(state.timer_masked)
    };
    write().map_err(call("hv_vcpu_set_reg"))
}

fn each<R, T, const N: usize>(
    registers: [R; N],
    read: impl FnMut(R) -> Result<T, HvError>,
) -> Result<Vec<T>, HvError> {
    registers.into_iter().map(read).collect()
}

fn put<R, T: Copy, const N: usize>(
    registers: [R; N],
    values: &[T],
    mut write: impl FnMut(R, T) -> Result<(), HvError>,
) -> Result<(), HvError> {
    for (register, value) in registers.into_iter().zip(values) {
        write(register, *value)?;
    }
    Ok(())
}

/// A state out of a file can have any number of registers.
fn fits<T>(what: &'static str, values: &[T], expected: usize) -> Result<(), HypervisorError> {
    if values.len() == expected {
        return Ok(());
    }
    Err(HypervisorError::Unsuitable {
        what,
        found: values.len() as u64,
        expected: expected as u64,
    })
}

/// The framework takes the value in a vector register. The binding declares an integer, which the
/// caller would pass in two general ones.
#[cfg(target_arch = "aarch64")]
fn set_vector(vcpu: &Raw, register: SimdFpReg, value: u128) -> Result<(), HvError> {
    use std::arch::aarch64::uint8x16_t;

    use applevisor_sys::{hv_return_t, hv_simd_fp_reg_t, hv_vcpu_set_simd_fp_reg, hv_vcpu_t};

    #[allow(
        improper_ctypes_definitions,
        reason = "the compiler passes this type as the C ABI has it"
    )]
    type Set = unsafe extern "C" fn(hv_vcpu_t, hv_simd_fp_reg_t, uint8x16_t) -> hv_return_t;
    // SAFETY: this is the function's type in Hypervisor.framework's header (hv_vcpu.h).
    let set: Set = unsafe { std::mem::transmute(hv_vcpu_set_simd_fp_reg as *const ()) };
    // SAFETY: both are sixteen bytes of which every value is one.
    let value: uint8x16_t = unsafe { std::mem::transmute(value) };
    // SAFETY: the vCPU exists, and this is its thread.
    match unsafe { set(vcpu.id(), register, value) } {
        0 => Ok(()),
        code => Err(HvError::from(code)),
    }
}

#[cfg(not(target_arch = "aarch64"))]
fn set_vector(vcpu: &Raw, register: SimdFpReg, value: u128) -> Result<(), HvError> {
    vcpu.set_simd_fp_reg(register, value)
}
