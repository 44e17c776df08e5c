//! Child processes that are born where they belong: in a cgroup and a pid namespace, on Linux.
//! Elsewhere there is neither, and the standard library starts them.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(not(target_os = "linux"))]
mod none;

use std::ffi::CStr;
use std::os::fd::BorrowedFd;

#[cfg(target_os = "linux")]
pub(crate) use linux::into_cgroup;
#[cfg(not(target_os = "linux"))]
pub(crate) use none::into_cgroup;

/// What a child becomes.
#[derive(Debug)]
#[cfg_attr(
    not(target_os = "linux"),
    expect(dead_code, reason = "nothing becomes it")
)]
pub(crate) struct Program<'a> {
    pub(crate) path: &'a CStr,
    /// Its name for itself comes first.
    pub(crate) args: &'a [&'a CStr],
    /// Standard input, output and error.
    pub(crate) standard: [BorrowedFd<'a>; 3],
}
