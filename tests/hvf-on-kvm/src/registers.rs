//! Registers: what KVM calls them, and how it is asked for them.

use std::mem::offset_of;

use applevisor_sys::hv_sys_reg_t;
use kvm_bindings::{
    KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_ARM64_SYSREG, KVM_REG_SIZE_U32, KVM_REG_SIZE_U64,
    KVM_REG_SIZE_U128, kvm_regs, user_fpsimd_state,
};
use kvm_ioctls::VcpuFd;

use crate::world::{Answer, refused};

/// A register, as KVM's `KVM_GET_ONE_REG` takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Register(u64);

/// The general ones: X0 to X30, and the program counter after them.
pub(crate) const PC: Register = wide(offset_of!(kvm_regs, regs.pc));
pub(crate) const PSTATE: Register = wide(offset_of!(kvm_regs, regs.pstate));
pub(crate) const ELR_EL1: Register = wide(offset_of!(kvm_regs, elr_el1));
pub(crate) const SPSR_EL1: Register = wide(offset_of!(kvm_regs, spsr));

/// The virtual counter. KVM has its number and that of the timer's compare value exchanged
/// (Documentation/virt/kvm/api.rst, `KVM_REG_ARM_TIMER_CNT`).
pub(crate) const TIMER_CNT: Register = system_number(0xdf1a);
const TIMER_CVAL: Register = system_number(0xdf02);

/// One of `kvm_regs`: the offset there, in 32-bit words.
const fn core(offset: usize, size: u64) -> Register {
    Register(KVM_REG_ARM64 | size | KVM_REG_ARM_CORE as u64 | (offset / 4) as u64)
}

const fn wide(offset: usize) -> Register {
    core(offset, KVM_REG_SIZE_U64)
}

/// One of 32 bits beside the vectors.
const fn floating(offset: usize) -> Register {
    core(offset_of!(kvm_regs, fp_regs) + offset, KVM_REG_SIZE_U32)
}

/// KVM packs an encoding as the framework does.
const fn system_number(number: u16) -> Register {
    Register(KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG as u64 | number as u64)
}

/// By the framework's number: X0 to X30, PC, FPCR, FPSR, CPSR.
pub(crate) fn general(number: u32) -> Register {
    match number {
        31 => PC,
        32 => floating(offset_of!(user_fpsimd_state, fpcr)),
        33 => floating(offset_of!(user_fpsimd_state, fpsr)),
        34 => PSTATE,
        number => wide(offset_of!(kvm_regs, regs.regs) + 8 * number as usize),
    }
}

pub(crate) fn vector(number: u32) -> Register {
    let vectors = offset_of!(kvm_regs, fp_regs.vregs);
    core(vectors + 16 * number as usize, KVM_REG_SIZE_U128)
}

/// System registers; some of them are general ones to KVM.
pub(crate) fn system(register: hv_sys_reg_t) -> Register {
    match register {
        hv_sys_reg_t::SP_EL0 => wide(offset_of!(kvm_regs, regs.sp)),
        hv_sys_reg_t::SP_EL1 => wide(offset_of!(kvm_regs, sp_el1)),
        hv_sys_reg_t::ELR_EL1 => ELR_EL1,
        hv_sys_reg_t::SPSR_EL1 => SPSR_EL1,
        hv_sys_reg_t::CNTV_CVAL_EL0 => TIMER_CVAL,
        register => system_number(register as u16),
    }
}

impl Register {
    fn bytes(self) -> usize {
        kvm_ioctls::reg_size(self.0)
    }

    pub(crate) fn get(self, vcpu: &VcpuFd) -> Answer<u128> {
        let mut bytes = [0; 16];
        vcpu.get_one_reg(self.0, &mut bytes[..self.bytes()])
            .map_err(refused)?;
        Ok(u128::from_le_bytes(bytes))
    }

    pub(crate) fn set(self, vcpu: &VcpuFd, value: u128) -> Answer {
        let bytes = value.to_le_bytes();
        vcpu.set_one_reg(self.0, &bytes[..self.bytes()])
            .map(drop)
            .map_err(refused)
    }

    /// Whether the processor has it.
    pub(crate) fn exists(self, vcpu: &VcpuFd) -> bool {
        let mut bytes = [0; 16];
        let read = vcpu.get_one_reg(self.0, &mut bytes[..self.bytes()]);
        !read.is_err_and(|error| error.errno() == libc::ENOENT)
    }
}
