//! `hv_gic_*`: the interrupt controller.

use std::ffi::c_void;

use applevisor_sys::hv_error_t::{HV_BAD_ARGUMENT, HV_BUSY, HV_NO_DEVICE};
use applevisor_sys::{
    hv_gic_config_t, hv_gic_icc_reg_t, hv_gic_intid_t, hv_gic_state_t, hv_ipa_t, hv_return_t,
    hv_vcpu_t,
};

use crate::session::world;
use crate::vcpu::with;
use crate::vm::{SUCCESS, failed, object};

/// As the framework of macOS 15 has them.
const DISTRIBUTOR: usize = 0x1_0000;
const REDISTRIBUTOR: usize = 0x2_0000;
const REDISTRIBUTORS: usize = 0x200_0000;
const FIRST_SHARED: u32 = 32;
const SHARED: u32 = 988;

/// A configuration in the making; there is one at a time.
static CONFIG: std::sync::Mutex<(u64, u64)> = std::sync::Mutex::new((0, 0));

fn config() -> std::sync::MutexGuard<'static, (u64, u64)> {
    CONFIG
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[unsafe(no_mangle)]
extern "C" fn hv_gic_config_create() -> hv_gic_config_t {
    *config() = (0, 0);
    object(0)
}

#[unsafe(no_mangle)]
extern "C" fn hv_gic_config_set_distributor_base(_: hv_gic_config_t, at: hv_ipa_t) -> hv_return_t {
    if !at.is_multiple_of(DISTRIBUTOR as u64) {
        return failed(HV_BAD_ARGUMENT);
    }
    config().0 = at;
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn hv_gic_config_set_redistributor_base(
    _: hv_gic_config_t,
    at: hv_ipa_t,
) -> hv_return_t {
    if !at.is_multiple_of(0x1_0000) {
        return failed(HV_BAD_ARGUMENT);
    }
    config().1 = at;
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn hv_gic_create(_: hv_gic_config_t) -> hv_return_t {
    let mut world = world();
    if !world.vm {
        return failed(HV_NO_DEVICE);
    }
    // A vCPU that exists would have no redistributor.
    if world.gic.is_some() || !world.vcpus.is_empty() {
        return failed(HV_BUSY);
    }
    world.gic = Some(*config());
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn hv_gic_set_spi(interrupt: u32, level: bool) -> hv_return_t {
    let mut world = world();
    if world.gic.is_none() {
        return failed(HV_NO_DEVICE);
    }
    if !(FIRST_SHARED..FIRST_SHARED + SHARED).contains(&interrupt) {
        return failed(HV_BAD_ARGUMENT);
    }
    world.interrupts.push((interrupt, level));
    SUCCESS
}

/// Writes what a function answers.
///
/// # Safety
/// The pointer takes a value.
unsafe fn answer<T>(place: *mut T, value: T) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe { place.write(value) };
    SUCCESS
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_distributor_size(size: *mut usize) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe { answer(size, DISTRIBUTOR) }
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_redistributor_size(size: *mut usize) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe { answer(size, REDISTRIBUTOR) }
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_redistributor_region_size(size: *mut usize) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe { answer(size, REDISTRIBUTORS) }
}

/// # Safety
/// The pointers take values.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_spi_interrupt_range(
    base: *mut u32,
    count: *mut u32,
) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe {
        answer(base, FIRST_SHARED);
        answer(count, SHARED)
    }
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_intid(which: hv_gic_intid_t, number: *mut u32) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe { answer(number, which as u32) }
}

/// The blob: the levels of all interrupts that were set.
#[unsafe(no_mangle)]
extern "C" fn hv_gic_state_create() -> hv_gic_state_t {
    {
        let mut world = world();
        if world.gic.is_none() || world.vcpus.values().any(|vcpu| vcpu.running) {
            return std::ptr::null_mut();
        }
        let levels = world.interrupts.iter();
        let blob = levels.flat_map(|(number, level)| [*number as u8, u8::from(*level)]);
        world.gic_state = blob.collect();
    }
    object(1)
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_state_get_size(_: hv_gic_state_t, size: *mut usize) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe { answer(size, world().gic_state.len()) }
}

/// # Safety
/// The pointer takes as many bytes as the state has.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_state_get_data(_: hv_gic_state_t, data: *mut c_void) -> hv_return_t {
    let world = world();
    let blob = &world.gic_state;
    // SAFETY: the caller has made room for what `hv_gic_state_get_size` told.
    unsafe { std::ptr::copy_nonoverlapping(blob.as_ptr(), data.cast(), blob.len()) };
    SUCCESS
}

/// # Safety
/// The pointer has `size` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_set_state(data: *const c_void, size: usize) -> hv_return_t {
    let mut world = world();
    if !size.is_multiple_of(2) {
        return failed(HV_BAD_ARGUMENT);
    }
    if world.vcpus.is_empty() {
        // What is of nobody who is there is dropped without a word.
        return SUCCESS;
    }
    // SAFETY: the caller's word.
    let blob = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), size) };
    let pairs = blob.chunks_exact(2);
    world.interrupts = pairs
        .map(|pair| (u32::from(pair[0]), pair[1] != 0))
        .collect();
    SUCCESS
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_icc_reg(
    vcpu: hv_vcpu_t,
    register: hv_gic_icc_reg_t,
    value: *mut u64,
) -> hv_return_t {
    with(vcpu, |vcpu| {
        let found = vcpu.interface.get(&(register as u16)).copied();
        // SAFETY: the caller's word.
        unsafe { answer(value, found.unwrap_or(0)) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn hv_gic_set_icc_reg(
    vcpu: hv_vcpu_t,
    register: hv_gic_icc_reg_t,
    value: u64,
) -> hv_return_t {
    with(vcpu, |vcpu| {
        vcpu.interface.insert(register as u16, value);
        SUCCESS
    })
}
