//! Entering a guest, and what it comes out for.

use std::sync::atomic::Ordering;

use applevisor_sys::hv_error_t::HV_ERROR;
use applevisor_sys::{hv_exit_reason_t, hv_sys_reg_t, hv_vcpu_exit_exception_t, hv_vcpu_exit_t};
use kvm_bindings::{KVM_EXIT_ARM_NISV, KVM_EXIT_UNKNOWN};
use kvm_ioctls::VcpuExit;

use crate::hypercall;
use crate::registers::{self, ELR_EL1, PC, PSTATE, SPSR_EL1};
use crate::vcpu::{Access, NOTHING, Vcpu};
use crate::world::{Answer, refused};

/// Bytes of an instruction.
const INSTRUCTION: u64 = 4;

/// Fields of `ESR_EL2` (Arm ARM, "ESR_EL2, Exception Syndrome Register (EL2)").
mod syndrome {
    pub(super) const HVC: u64 = 0x16 << 26;
    pub(super) const DATA: u64 = 0x24 << 26;
    /// An instruction of 32 bits.
    pub(super) const LONG: u64 = 1 << 25;
    /// The rest says what a load or store does.
    pub(super) const VALID: u64 = 1 << 24;
    /// Binary logarithm of its bytes, and its register.
    pub(super) const SIZE: u32 = 22;
    pub(super) const REGISTER: u32 = 16;
    /// The register has 64 bits.
    pub(super) const WIDE: u64 = 1 << 15;
    pub(super) const WRITE: u64 = 1 << 6;
    /// A translation fault of level 3: no memory is mapped there.
    pub(super) const UNMAPPED: u64 = 0x07;
}

/// What KVM says, before what it borrows.
enum Out {
    Interrupted,
    Access {
        address: u64,
        size: usize,
        access: Access,
    },
    /// A load or store whose syndrome does not say what it does.
    Opaque,
    /// A BRK, with its syndrome.
    Break(u32),
    Other,
}

impl Out {
    fn of(exit: Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Answer<Self> {
        Ok(match exit {
            Err(error) if error.errno() == libc::EINTR => Self::Interrupted,
            Err(error) => return Err(refused(error)),
            Ok(VcpuExit::Intr) => Self::Interrupted,
            Ok(VcpuExit::MmioRead(address, data)) => Self::Access {
                address,
                size: data.len(),
                access: Access {
                    write: false,
                    value: 0,
                },
            },
            Ok(VcpuExit::MmioWrite(address, data)) => {
                let mut value = [0; 8];
                value[..data.len()].copy_from_slice(data);
                Self::Access {
                    address,
                    size: data.len(),
                    access: Access {
                        write: true,
                        value: u64::from_le_bytes(value),
                    },
                }
            }
            Ok(VcpuExit::Unsupported(KVM_EXIT_ARM_NISV)) => Self::Opaque,
            Ok(VcpuExit::Debug(debug)) => Self::Break(debug.hsr),
            Ok(_) => Self::Other,
        })
    }
}

impl Vcpu {
    /// Runs the guest until there is something for the caller.
    pub(crate) fn run(&mut self) -> Answer {
        if self.access.take().is_some() {
            self.forget_access();
        }
        loop {
            // Whoever cancels sets the flags in the other order: either is seen below.
            self.immediate_exit().store(0, Ordering::SeqCst);
            if self.cancelled.swap(false, Ordering::SeqCst) {
                return self.leave(hv_exit_reason_t::CANCELED);
            }
            match Out::of(self.fd.run())? {
                Out::Interrupted => {}
                Out::Access {
                    address,
                    size,
                    access,
                } => {
                    self.access = Some(access);
                    let write = if access.write { syndrome::WRITE } else { 0 };
                    let what = syndrome::VALID
                        | u64::from(size.trailing_zeros()) << syndrome::SIZE
                        | u64::from(Access::REGISTER) << syndrome::REGISTER
                        | syndrome::WIDE
                        | syndrome::UNMAPPED
                        | write;
                    return self.leave_with(syndrome::DATA | what, address);
                }
                Out::Opaque => {
                    // SAFETY: the exit's reason says which part of the union it is.
                    let told = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.arm_nisv };
                    return self.leave_with(syndrome::DATA | told.esr_iss, told.fault_ipa);
                }
                Out::Break(told) if told & 0xffff == hypercall::COMMENT => {
                    // As after an HVC.
                    let pc = PC.get(&self.fd)? as u64;
                    PC.set(&self.fd, pc.wrapping_add(INSTRUCTION).into())?;
                    return self.leave_with(syndrome::HVC, 0);
                }
                Out::Break(told) => self.break_inside(told)?,
                Out::Other => return self.leave(hv_exit_reason_t::UNKNOWN),
            }
        }
    }

    fn leave(&mut self, reason: hv_exit_reason_t) -> Answer {
        *self.exit = hv_vcpu_exit_t { reason, ..NOTHING };
        Ok(())
    }

    fn leave_with(&mut self, syndrome: u64, physical_address: u64) -> Answer {
        *self.exit = hv_vcpu_exit_t {
            reason: hv_exit_reason_t::EXCEPTION,
            exception: hv_vcpu_exit_exception_t {
                syndrome: syndrome | syndrome::LONG,
                physical_address,
                ..NOTHING.exception
            },
        };
        Ok(())
    }

    /// The caller moves the program counter away from an access: past it, it has been carried out.
    pub(crate) fn leave_access(&mut self, pc: u64) -> Answer {
        let Some(access) = self.access.take() else {
            return Ok(());
        };
        let here = PC.get(&self.fd)? as u64;
        if pc != here.wrapping_add(INSTRUCTION) {
            self.forget_access();
            return PC.set(&self.fd, pc.into());
        }
        if !access.write {
            // SAFETY: KVM waits for the answer to a load there.
            let mmio = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio };
            mmio.data = access.value.to_le_bytes();
        }
        // KVM ends it on its way into the guest, and comes back before it is there.
        self.immediate_exit().store(1, Ordering::SeqCst);
        match Out::of(self.fd.run())? {
            Out::Interrupted => Ok(()),
            _ => Err(HV_ERROR),
        }
    }

    /// Has KVM not end an access: the guest does it again.
    fn forget_access(&mut self) {
        self.fd.get_kvm_run().exit_reason = KVM_EXIT_UNKNOWN;
    }

    /// A BRK of the guest's own, which is for the guest: takes the exception to EL1 (Arm ARM,
    /// "Synchronous exception types"; the registers a processor of Armv8.0 changes).
    fn break_inside(&self, told: u32) -> Answer {
        const MODE: u64 = 0x1f;
        /// EL1 with its own stack pointer, all interrupts masked.
        const HANDLER: u64 = 0x3c5;
        let pstate = PSTATE.get(&self.fd)? as u64;
        let vector = match pstate & MODE {
            0b00100 => 0x000,
            0b00101 => 0x200,
            0b00000 => 0x400,
            _ => 0x600,
        };
        let system = registers::system;
        let vectors = system(hv_sys_reg_t::VBAR_EL1).get(&self.fd)? as u64;
        system(hv_sys_reg_t::ESR_EL1).set(&self.fd, told.into())?;
        ELR_EL1.set(&self.fd, PC.get(&self.fd)?)?;
        SPSR_EL1.set(&self.fd, pstate.into())?;
        PSTATE.set(&self.fd, HANDLER.into())?;
        PC.set(&self.fd, vectors.wrapping_add(vector).into())
    }
}
