//! `hv_vcpu_*`: vCPUs of KVM's, each its thread's.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, Ordering};
use std::sync::{Arc, Once};

use applevisor_sys::hv_error_t::{HV_BAD_ARGUMENT, HV_BUSY, HV_DENIED, HV_NO_DEVICE};
use applevisor_sys::{
    hv_exit_reason_t, hv_reg_t, hv_return_t, hv_simd_fp_reg_t, hv_simd_fp_uchar16_t, hv_sys_reg_t,
    hv_vcpu_config_t, hv_vcpu_exit_exception_t, hv_vcpu_exit_t, hv_vcpu_t,
};
use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug, kvm_vcpu_init};
use kvm_ioctls::VcpuFd;

use crate::hypercall;
use crate::registers::{self, TIMER_CNT};
use crate::world::{Answer, Machine, code, refused, with_vm, world, write};

/// What brings a thread out of the guest: a signal that nobody else here uses.
const KICK: i32 = 41;
/// `MPIDR_EL1`'s affinities 0 to 2.
const AFFINITY: u64 = 0xff_ffff;

pub(crate) const NOTHING: hv_vcpu_exit_t = hv_vcpu_exit_t {
    reason: hv_exit_reason_t::UNKNOWN,
    exception: hv_vcpu_exit_exception_t {
        syndrome: 0,
        virtual_address: 0,
        physical_address: 0,
    },
};

/// A vCPU, for its own thread.
#[derive(Debug)]
pub(crate) struct Vcpu {
    id: hv_vcpu_t,
    pub(crate) fd: VcpuFd,
    /// What `hv_vcpu_create` handed out a pointer to.
    pub(crate) exit: Box<hv_vcpu_exit_t>,
    /// What it came out of the guest for, until it is ended or done again.
    pub(crate) access: Option<Access>,
    pub(crate) cancelled: Arc<AtomicBool>,
    timer_masked: bool,
}

/// A load or store that KVM waits with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub(crate) write: bool,
    /// What the stand-in for its register holds.
    pub(crate) value: u64,
}

impl Access {
    /// The register that stands in for the real one, by its number.
    pub(crate) const REGISTER: u32 = 17;
}

/// A vCPU, for other threads.
#[derive(Debug)]
pub(crate) struct Remote {
    thread: libc::pthread_t,
    cancelled: Arc<AtomicBool>,
    /// KVM's `immediate_exit`, which is there as long as this is.
    immediate_exit: AtomicPtr<u8>,
    pub(crate) affinity: u64,
}

thread_local! {
    static HERE: RefCell<Option<Vcpu>> = const { RefCell::new(None) };
}

/// Does something with a vCPU, on its own thread alone.
pub(crate) fn with<T>(
    id: hv_vcpu_t,
    f: impl FnOnce(&mut Machine, &mut Vcpu) -> Answer<T>,
) -> Answer<T> {
    with_vm(|vm| {
        HERE.with_borrow_mut(|here| match here {
            Some(vcpu) if vcpu.id == id => f(vm, vcpu),
            _ if vm.vcpus.contains_key(&id) => Err(HV_DENIED),
            _ => Err(HV_NO_DEVICE),
        })
    })
}

/// The signal has come, and the guest has been left: that is all it is for.
extern "C" fn kicked(_: i32) {}

fn handle_kicks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: all zeroes is a `sigaction` with an empty mask, and the handler does nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = kicked as *const () as libc::sighandler_t;
            libc::sigaction(KICK, &raw const action, std::ptr::null_mut());
        }
    });
}

impl Machine {
    fn create_vcpu(&mut self) -> Answer<Vcpu> {
        if self.gic_is_ready() {
            return Err(HV_BUSY);
        }
        let id = self.made;
        let mut fd = self.fd.create_vcpu(id).map_err(refused)?;
        self.made += 1;
        // Without KVM's PSCI: a call that slips through finds none.
        let mut target = kvm_vcpu_init::default();
        self.fd.get_preferred_target(&mut target).map_err(refused)?;
        fd.vcpu_init(&target).map_err(refused)?;
        let debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP,
            ..Default::default()
        };
        fd.set_guest_debug(&debug).map_err(refused)?;
        let affinity = registers::system(hv_sys_reg_t::MPIDR_EL1).get(&fd)? as u64 & AFFINITY;
        let cancelled = Arc::new(AtomicBool::new(false));
        let remote = Remote {
            // SAFETY: always succeeds.
            thread: unsafe { libc::pthread_self() },
            cancelled: Arc::clone(&cancelled),
            immediate_exit: AtomicPtr::new(&raw mut fd.get_kvm_run().immediate_exit),
            affinity,
        };
        self.vcpus.insert(id, remote);
        Ok(Vcpu {
            id,
            fd,
            exit: Box::new(NOTHING),
            access: None,
            cancelled,
            timer_masked: false,
        })
    }

    pub(crate) fn affinity(&self, id: hv_vcpu_t) -> Answer<u64> {
        let vcpu = self.vcpus.get(&id).ok_or(HV_NO_DEVICE)?;
        Ok(vcpu.affinity)
    }

    /// A vCPU is about to run.
    fn begin(&mut self) -> Answer {
        if self.gic.is_some() {
            self.ready_gic()?;
        }
        if !self.has_run {
            self.pieces.values().try_for_each(hypercall::replace)?;
            self.has_run = true;
        }
        Ok(())
    }
}

impl Vcpu {
    /// KVM's flag that it leaves the guest at once, which other threads set.
    pub(crate) fn immediate_exit(&mut self) -> &AtomicU8 {
        let flag = &raw mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: it is there as long as the vCPU.
        unsafe { AtomicU8::from_ptr(flag) }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // No other thread's after this.
        if let Some(vm) = &mut *world() {
            vm.vcpus.remove(&self.id);
        }
    }
}

/// # Safety
/// The pointers take values.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpu_create(
    id: *mut hv_vcpu_t,
    exit: *mut *const hv_vcpu_exit_t,
    _: hv_vcpu_config_t,
) -> hv_return_t {
    handle_kicks();
    code(with_vm(|vm| {
        HERE.with_borrow_mut(|here| {
            if here.is_some() {
                return Err(HV_BUSY);
            }
            let vcpu = here.insert(vm.create_vcpu()?);
            // SAFETY: the caller's word; the box stays where it is until the vCPU is destroyed.
            unsafe {
                id.write(vcpu.id);
                exit.write(&raw const *vcpu.exit);
            }
            Ok(())
        })
    }))
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_destroy(id: hv_vcpu_t) -> hv_return_t {
    let done = with(id, |_, _| Ok(()));
    if done.is_ok() {
        drop(HERE.take());
    }
    code(done)
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_run(id: hv_vcpu_t) -> hv_return_t {
    let run = || {
        with(id, |vm, _| vm.begin())?;
        HERE.with_borrow_mut(|here| here.as_mut().map_or(Err(HV_NO_DEVICE), Vcpu::run))
    };
    code(run())
}

/// One that is not in its guest comes out at once the next time.
///
/// # Safety
/// The pointer has `count` numbers.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpus_exit(ids: *const hv_vcpu_t, count: u32) -> hv_return_t {
    // SAFETY: the caller's word.
    let ids = unsafe { std::slice::from_raw_parts(ids, count as usize) };
    code(with_vm(|vm| {
        ids.iter().try_for_each(|id| {
            let vcpu = vm.vcpus.get(id).ok_or(HV_BAD_ARGUMENT)?;
            // In this order: see `Vcpu::run`.
            vcpu.cancelled.store(true, Ordering::SeqCst);
            // SAFETY: the vCPU is there, as it could not go without the lock, and so is its thread.
            unsafe {
                AtomicU8::from_ptr(vcpu.immediate_exit.load(Ordering::SeqCst))
                    .store(1, Ordering::SeqCst);
                libc::pthread_kill(vcpu.thread, KICK);
            }
            Ok(())
        })
    }))
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpu_get_reg(
    id: hv_vcpu_t,
    register: hv_reg_t,
    value: *mut u64,
) -> hv_return_t {
    let found = with(id, |_, vcpu| match vcpu.access {
        Some(access) if register as u32 == Access::REGISTER => Ok(access.value),
        _ => Ok(registers::general(register as u32).get(&vcpu.fd)? as u64),
    });
    // SAFETY: the caller's word.
    unsafe { write(value, found) }
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_set_reg(id: hv_vcpu_t, register: hv_reg_t, value: u64) -> hv_return_t {
    code(with(id, |_, vcpu| {
        match &mut vcpu.access {
            Some(access) if register as u32 == Access::REGISTER => {
                access.value = value;
                return Ok(());
            }
            Some(_) if register == hv_reg_t::PC => return vcpu.leave_access(value),
            _ => {}
        }
        registers::general(register as u32).set(&vcpu.fd, value.into())
    }))
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpu_get_simd_fp_reg(
    id: hv_vcpu_t,
    register: hv_simd_fp_reg_t,
    value: *mut hv_simd_fp_uchar16_t,
) -> hv_return_t {
    let found = with(id, |_, vcpu| {
        registers::vector(register as u32).get(&vcpu.fd)
    });
    // SAFETY: the caller's word.
    unsafe { write(value, found) }
}

/// The value is in a vector register, as in the framework's header (hv_vcpu.h, Procedure Call
/// Standard for the Arm 64-bit Architecture).
#[unsafe(no_mangle)]
#[allow(
    improper_ctypes_definitions,
    reason = "the compiler passes this type as the C ABI has it"
)]
extern "C" fn hv_vcpu_set_simd_fp_reg(
    id: hv_vcpu_t,
    register: hv_simd_fp_reg_t,
    value: std::arch::aarch64::uint8x16_t,
) -> hv_return_t {
    // SAFETY: both are sixteen bytes of which every value is one.
    let value: u128 = unsafe { std::mem::transmute(value) };
    code(with(id, |_, vcpu| {
        registers::vector(register as u32).set(&vcpu.fd, value)
    }))
}

/// One that the processor has not is zero: Linux's KVM runs on processors of which Apple has none.
///
/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpu_get_sys_reg(
    id: hv_vcpu_t,
    register: hv_sys_reg_t,
    value: *mut u64,
) -> hv_return_t {
    let register = registers::system(register);
    let found = with(id, |_, vcpu| {
        if register.exists(&vcpu.fd) {
            Ok(register.get(&vcpu.fd)? as u64)
        } else {
            Ok(0)
        }
    });
    // SAFETY: the caller's word.
    unsafe { write(value, found) }
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_set_sys_reg(
    id: hv_vcpu_t,
    register: hv_sys_reg_t,
    value: u64,
) -> hv_return_t {
    let name = registers::system(register);
    code(with(id, |vm, vcpu| {
        if value == 0 && !name.exists(&vcpu.fd) {
            return Ok(());
        }
        name.set(&vcpu.fd, value.into())?;
        if register == hv_sys_reg_t::MPIDR_EL1
            && let Some(remote) = vm.vcpus.get_mut(&id)
        {
            remote.affinity = value & AFFINITY;
        }
        Ok(())
    }))
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpu_get_vtimer_mask(id: hv_vcpu_t, masked: *mut bool) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe { write(masked, with(id, |_, vcpu| Ok(vcpu.timer_masked))) }
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_set_vtimer_mask(id: hv_vcpu_t, masked: bool) -> hv_return_t {
    code(with(id, |_, vcpu| {
        vcpu.timer_masked = masked;
        Ok(())
    }))
}

/// KVM is told what the counter is to show, and works out the offset: for all vCPUs of a VM, and
/// anew for each that is made.
#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_set_vtimer_offset(id: hv_vcpu_t, offset: u64) -> hv_return_t {
    code(with(id, |_, vcpu| {
        let now = counter().wrapping_sub(offset);
        TIMER_CNT.set(&vcpu.fd, now.into())
    }))
}

/// The host's counter.
fn counter() -> u64 {
    let count: u64;
    // SAFETY: reads a register that every process may read.
    unsafe {
        std::arch::asm!("isb", "mrs {}, cntvct_el0", out(reg) count, options(nomem, nostack));
    }
    count
}
