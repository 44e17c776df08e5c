//! Guests of a few instructions, and the image of a kernel that is only that. For the tests of
//! control, and for those of the machine in the library.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub(crate) use aarch64::*;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::*;

/// How [`SAY_HI`] ends: an exception without a handler is an end of its own on x86_64 alone.
pub(crate) const CRASHES: bool = cfg!(target_arch = "x86_64");
