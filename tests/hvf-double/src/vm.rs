//! `hv_vm_*`: the VM and its memory.

use std::ffi::c_void;

use applevisor_sys::hv_error_t::{
    HV_BAD_ARGUMENT, HV_BUSY, HV_DENIED, HV_NO_DEVICE, HV_NO_RESOURCES, HV_UNSUPPORTED,
};
use applevisor_sys::{
    HV_MEMORY_EXEC, HV_MEMORY_READ, HV_MEMORY_WRITE, PAGE_SIZE, hv_error_t, hv_ipa_t,
    hv_memory_flags_t, hv_return_t, hv_vm_config_t,
};

use crate::session::{MemoryCall, VCPUS, world};

/// Bits of a guest-physical address: the default, and the most.
const DEFAULT_IPA: u32 = 36;
const MAX_IPA: u32 = 40;

pub(crate) const SUCCESS: hv_return_t = 0;

pub(crate) fn failed(error: hv_error_t) -> hv_return_t {
    error as u32 as hv_return_t
}

/// An object of the framework's: a number in memory of its own.
pub(crate) fn object(kind: u32) -> *mut c_void {
    world().objects += 1;
    Box::into_raw(Box::new(kind)).cast()
}

/// # Safety
/// `object` is one of [`object`]'s, and goes here; nothing comes of null.
#[unsafe(no_mangle)]
unsafe extern "C" fn os_release(object: *mut c_void) {
    if object.is_null() {
        return;
    }
    world().objects -= 1;
    // SAFETY: made by `object` from a box of this type, and released once.
    drop(unsafe { Box::from_raw(object.cast::<u32>()) });
}

#[unsafe(no_mangle)]
extern "C" fn hv_vm_config_create() -> hv_vm_config_t {
    object(DEFAULT_IPA)
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vm_config_get_max_ipa_size(bits: *mut u32) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe { bits.write(MAX_IPA) };
    SUCCESS
}

/// # Safety
/// `config` exists.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vm_config_set_ipa_size(config: hv_vm_config_t, bits: u32) -> hv_return_t {
    if bits > MAX_IPA {
        return failed(HV_UNSUPPORTED);
    }
    // SAFETY: an object of `hv_vm_config_create`.
    unsafe { config.cast::<u32>().write(bits) };
    SUCCESS
}

/// # Safety
/// `config` exists, or is null.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vm_create(config: hv_vm_config_t) -> hv_return_t {
    let mut world = world();
    if world.denied {
        return failed(HV_DENIED);
    }
    if world.vm {
        return failed(HV_BUSY);
    }
    world.vm = true;
    world.ipa_bits = if config.is_null() {
        DEFAULT_IPA
    } else {
        // SAFETY: an object of `hv_vm_config_create`.
        unsafe { config.cast::<u32>().read() }
    };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn hv_vm_destroy() -> hv_return_t {
    let mut world = world();
    if !world.vm {
        return failed(HV_NO_DEVICE);
    }
    if !world.vcpus.is_empty() {
        return failed(HV_BUSY);
    }
    world.vm = false;
    world.gic = None;
    SUCCESS
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vm_get_max_vcpu_count(count: *mut u32) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe { count.write(VCPUS) };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn hv_vm_map(
    address: *const c_void,
    guest: hv_ipa_t,
    size: usize,
    flags: hv_memory_flags_t,
) -> hv_return_t {
    let mut world = world();
    if !world.vm {
        return failed(HV_NO_DEVICE);
    }
    if world.full {
        return failed(HV_NO_RESOURCES);
    }
    let page = PAGE_SIZE as u64;
    let aligned = (address as u64).is_multiple_of(page)
        && guest.is_multiple_of(page)
        && size.is_multiple_of(PAGE_SIZE)
        && size > 0;
    let known = HV_MEMORY_READ | HV_MEMORY_WRITE | HV_MEMORY_EXEC;
    let Some(end) = guest.checked_add(size as u64) else {
        return failed(HV_BAD_ARGUMENT);
    };
    if !aligned || flags & !known != 0 || end > 1 << world.ipa_bits {
        return failed(HV_BAD_ARGUMENT);
    }
    let before = world.mapped.range(..end).next_back();
    if before.is_some_and(|(at, (len, _))| at + *len as u64 > guest) {
        return failed(HV_BAD_ARGUMENT);
    }
    world.mapped.insert(guest, (size, address as usize));
    world.memory_calls.push(MemoryCall::Map(guest));
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn hv_vm_unmap(guest: hv_ipa_t, size: usize) -> hv_return_t {
    let mut world = world();
    match world.mapped.get(&guest) {
        Some((len, _)) if *len == size => {
            world.mapped.remove(&guest);
            world.memory_calls.push(MemoryCall::Unmap(guest));
            SUCCESS
        }
        _ => failed(HV_BAD_ARGUMENT),
    }
}
