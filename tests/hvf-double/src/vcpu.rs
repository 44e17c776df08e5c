//! `hv_vcpu_*`: vCPUs that play scripts.

use std::thread;

use applevisor_sys::hv_error_t::{HV_BAD_ARGUMENT, HV_BUSY, HV_DENIED, HV_NO_DEVICE};
use applevisor_sys::{
    hv_exit_reason_t, hv_reg_t, hv_return_t, hv_simd_fp_reg_t, hv_simd_fp_uchar16_t, hv_sys_reg_t,
    hv_vcpu_config_t, hv_vcpu_exit_exception_t, hv_vcpu_exit_t, hv_vcpu_t,
};

use crate::session::{CHANGED, REGISTERS, Step, VCPUS, Vcpu, world};
use crate::vm::{SUCCESS, failed};

/// `SCTLR_EL1` of a new vCPU: MMU off.
const FIRST_SCTLR: u64 = 0x30d0_0980;

const NOTHING: hv_vcpu_exit_t = hv_vcpu_exit_t {
    reason: hv_exit_reason_t::UNKNOWN,
    exception: hv_vcpu_exit_exception_t {
        syndrome: 0,
        virtual_address: 0,
        physical_address: 0,
    },
};

/// Does something with a vCPU, on its own thread alone.
pub(crate) fn with(id: hv_vcpu_t, f: impl FnOnce(&mut Vcpu) -> hv_return_t) -> hv_return_t {
    let mut world = world();
    match world.vcpus.get_mut(&id) {
        Some(vcpu) if vcpu.thread == Some(thread::current().id()) => f(vcpu),
        Some(_) => failed(HV_DENIED),
        None => failed(HV_NO_DEVICE),
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
    let mut world = world();
    let here = Some(thread::current().id());
    if !world.vm {
        return failed(HV_NO_DEVICE);
    }
    let taken = world.vcpus.values().any(|vcpu| vcpu.thread == here);
    if taken || world.vcpus.len() >= VCPUS as usize {
        return failed(HV_BUSY);
    }
    let sctlr = (hv_sys_reg_t::SCTLR_EL1 as u16, FIRST_SCTLR);
    let sme = (hv_sys_reg_t::ID_AA64PFR1_EL1 as u16, 1 << 24);
    let vcpu = Vcpu {
        thread: here,
        exit: Some(Box::new(NOTHING)),
        registers: vec![0; REGISTERS],
        vectors: vec![0; 32],
        system: [sctlr, sme].into(),
        ..Vcpu::default()
    };
    let number = world.next;
    world.next += 1;
    // SAFETY: the caller's word; the box stays where it is until the vCPU is destroyed.
    unsafe {
        id.write(number);
        exit.write(vcpu.exit.as_deref().map_or(std::ptr::null(), |exit| exit));
    }
    world.vcpus.insert(number, vcpu);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_destroy(id: hv_vcpu_t) -> hv_return_t {
    let done = with(id, |_| SUCCESS);
    if done == SUCCESS {
        let mut world = world();
        if let Some(vcpu) = world.vcpus.remove(&id) {
            let affinity = vcpu.affinity();
            world
                .entries
                .entry(affinity)
                .or_default()
                .extend(vcpu.entries);
        }
    }
    done
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_run(id: hv_vcpu_t) -> hv_return_t {
    let done = with(id, |vcpu| {
        vcpu.entries.push(vcpu.registers.clone());
        SUCCESS
    });
    if done != SUCCESS {
        return done;
    }
    let mut world = world();
    loop {
        let Some(vcpu) = world.vcpus.get_mut(&id) else {
            return failed(HV_NO_DEVICE);
        };
        vcpu.running = false;
        if std::mem::take(&mut vcpu.cancelled) {
            return leave(vcpu, hv_exit_reason_t::CANCELED);
        }
        let affinity = vcpu.affinity();
        let step = world
            .scripts
            .get_mut(&affinity)
            .and_then(std::collections::VecDeque::pop_front);
        let Some(vcpu) = world.vcpus.get_mut(&id) else {
            return failed(HV_NO_DEVICE);
        };
        match step {
            Some(Step::Set { register, value }) => {
                if let Some(place) = vcpu.registers.get_mut(register as usize) {
                    *place = value;
                }
            }
            Some(Step::Exception { syndrome, address }) => {
                leave(vcpu, hv_exit_reason_t::EXCEPTION);
                if let Some(exit) = &mut vcpu.exit {
                    exit.exception.syndrome = syndrome;
                    exit.exception.physical_address = address;
                }
                return SUCCESS;
            }
            Some(Step::Timer) => {
                vcpu.timer_masked = true;
                return leave(vcpu, hv_exit_reason_t::VTIMER_ACTIVATED);
            }
            Some(Step::Cancelled) => return leave(vcpu, hv_exit_reason_t::CANCELED),
            Some(Step::Unknown) => return leave(vcpu, hv_exit_reason_t::UNKNOWN),
            Some(Step::Fails(code)) => return code,
            None => {
                vcpu.running = true;
                CHANGED.notify_all();
                world = world.wait();
            }
        }
    }
}

fn leave(vcpu: &mut Vcpu, reason: hv_exit_reason_t) -> hv_return_t {
    if let Some(exit) = &mut vcpu.exit {
        **exit = hv_vcpu_exit_t { reason, ..NOTHING };
    }
    SUCCESS
}

/// One that is not in its guest does not notice.
///
/// # Safety
/// The pointer has `count` numbers.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpus_exit(ids: *const hv_vcpu_t, count: u32) -> hv_return_t {
    // SAFETY: the caller's word.
    let ids = unsafe { std::slice::from_raw_parts(ids, count as usize) };
    let mut world = world();
    for id in ids {
        match world.vcpus.get_mut(id) {
            Some(vcpu) if vcpu.running => vcpu.cancelled = true,
            Some(_) => {}
            None => return failed(HV_BAD_ARGUMENT),
        }
    }
    CHANGED.notify_all();
    SUCCESS
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpu_get_reg(
    id: hv_vcpu_t,
    register: hv_reg_t,
    value: *mut u64,
) -> hv_return_t {
    with(id, |vcpu| {
        // SAFETY: the caller's word.
        unsafe { value.write(vcpu.registers[register as usize]) };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_set_reg(id: hv_vcpu_t, register: hv_reg_t, value: u64) -> hv_return_t {
    with(id, |vcpu| {
        vcpu.registers[register as usize] = value;
        SUCCESS
    })
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpu_get_simd_fp_reg(
    id: hv_vcpu_t,
    register: hv_simd_fp_reg_t,
    value: *mut hv_simd_fp_uchar16_t,
) -> hv_return_t {
    with(id, |vcpu| {
        // SAFETY: the caller's word.
        unsafe { value.write(vcpu.vectors[register as usize]) };
        SUCCESS
    })
}

/// What the header's `simd_uchar16_t` is as an argument: a vector in a vector register, where there
/// are those (hv_vcpu.h, Procedure Call Standard for the Arm 64-bit Architecture).
#[cfg(target_arch = "aarch64")]
type Vector = std::arch::aarch64::uint8x16_t;
#[cfg(not(target_arch = "aarch64"))]
type Vector = hv_simd_fp_uchar16_t;

#[unsafe(no_mangle)]
#[allow(
    improper_ctypes_definitions,
    reason = "the compiler passes this type as the C ABI has it"
)]
extern "C" fn hv_vcpu_set_simd_fp_reg(
    id: hv_vcpu_t,
    register: hv_simd_fp_reg_t,
    value: Vector,
) -> hv_return_t {
    // SAFETY: both are sixteen bytes of which every value is one.
    #[allow(clippy::useless_transmute, reason = "where it is no vector")]
    let value = unsafe { std::mem::transmute::<Vector, hv_simd_fp_uchar16_t>(value) };
    with(id, |vcpu| {
        vcpu.vectors[register as usize] = value;
        SUCCESS
    })
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpu_get_sys_reg(
    id: hv_vcpu_t,
    register: hv_sys_reg_t,
    value: *mut u64,
) -> hv_return_t {
    with(id, |vcpu| {
        let found = vcpu.system.get(&(register as u16)).copied();
        // SAFETY: the caller's word.
        unsafe { value.write(found.unwrap_or(0)) };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_set_sys_reg(
    id: hv_vcpu_t,
    register: hv_sys_reg_t,
    value: u64,
) -> hv_return_t {
    with(id, |vcpu| {
        vcpu.system.insert(register as u16, value);
        SUCCESS
    })
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpu_get_vtimer_mask(id: hv_vcpu_t, masked: *mut bool) -> hv_return_t {
    with(id, |vcpu| {
        // SAFETY: the caller's word.
        unsafe { masked.write(vcpu.timer_masked) };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_set_vtimer_mask(id: hv_vcpu_t, masked: bool) -> hv_return_t {
    with(id, |vcpu| {
        vcpu.timer_masked = masked;
        SUCCESS
    })
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_set_vtimer_offset(id: hv_vcpu_t, offset: u64) -> hv_return_t {
    with(id, |vcpu| {
        vcpu.timer_offset = offset;
        SUCCESS
    })
}
