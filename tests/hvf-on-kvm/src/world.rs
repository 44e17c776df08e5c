//! The one VM there can be, and what all functions share.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use applevisor_sys::{hv_error_t, hv_return_t};
use kvm_ioctls::VmFd;

use crate::gic::Gic;
use crate::vcpu::Remote;
use crate::vm::Piece;

pub(crate) const SUCCESS: hv_return_t = 0;

/// What a function comes to, before it is a number.
pub(crate) type Answer<T = ()> = Result<T, hv_error_t>;

pub(crate) fn code(answer: Answer) -> hv_return_t {
    answer.map_or_else(failed, |()| SUCCESS)
}

pub(crate) fn failed(error: hv_error_t) -> hv_return_t {
    error as u32 as hv_return_t
}

/// What the framework would call an error of KVM's.
#[allow(clippy::needless_pass_by_value, reason = "as `map_err` takes it")]
pub(crate) fn refused(error: kvm_ioctls::Error) -> hv_error_t {
    match error.errno() {
        libc::EINVAL | libc::EEXIST | libc::E2BIG => hv_error_t::HV_BAD_ARGUMENT,
        libc::EBUSY => hv_error_t::HV_BUSY,
        libc::ENOMEM | libc::ENOSPC => hv_error_t::HV_NO_RESOURCES,
        libc::ENODEV | libc::ENXIO => hv_error_t::HV_NO_DEVICE,
        _ => hv_error_t::HV_ERROR,
    }
}

/// A VM of KVM's.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) fd: VmFd,
    pub(crate) ipa_bits: u32,
    pub(crate) gic: Option<Gic>,
    /// By guest address.
    pub(crate) pieces: BTreeMap<u64, Piece>,
    /// How many vCPUs were made.
    pub(crate) made: u64,
    pub(crate) vcpus: BTreeMap<u64, Remote>,
    pub(crate) has_run: bool,
}

static WORLD: Mutex<Option<Machine>> = Mutex::new(None);

/// The VM, if there is one. Whoever holds it keeps all vCPUs from everything but running.
pub(crate) fn world() -> MutexGuard<'static, Option<Machine>> {
    WORLD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does something with the VM.
pub(crate) fn with_vm<T>(f: impl FnOnce(&mut Machine) -> Answer<T>) -> Answer<T> {
    world().as_mut().map_or(Err(hv_error_t::HV_NO_DEVICE), f)
}

/// What the framework hands out to be released later.
#[derive(Debug)]
pub(crate) enum Object {
    /// Bits of a guest-physical address.
    VmConfig(u32),
    /// Where distributor and redistributors are.
    GicConfig(u64, u64),
    /// What the interrupt controller held.
    GicState(Vec<u8>),
}

impl Object {
    pub(crate) fn give(self) -> *mut c_void {
        Box::into_raw(Box::new(self)).cast()
    }

    /// # Safety
    /// The pointer is one of [`Object::give`]'s, not released yet, and nobody else's now.
    pub(crate) unsafe fn at<'a>(pointer: *mut c_void) -> &'a mut Self {
        // SAFETY: the caller's word.
        unsafe { &mut *pointer.cast::<Self>() }
    }
}

/// # Safety
/// `object` is one of [`Object::give`]'s, and goes here; nothing comes of null.
#[unsafe(no_mangle)]
unsafe extern "C" fn os_release(object: *mut c_void) {
    if !object.is_null() {
        // SAFETY: made by `give` from a box of this type, and released once.
        drop(unsafe { Box::from_raw(object.cast::<Object>()) });
    }
}

/// Writes what a function answers, if it has an answer.
///
/// # Safety
/// The pointer takes a value.
pub(crate) unsafe fn write<T>(place: *mut T, answer: Answer<T>) -> hv_return_t {
    match answer {
        Ok(value) => {
            // SAFETY: the caller's word.
            unsafe { place.write(value) };
            SUCCESS
        }
        Err(error) => failed(error),
    }
}
