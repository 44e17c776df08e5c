//! Linux: descriptors, limits, capabilities.

#![allow(
    unsafe_code,
    reason = "closing unknown descriptors is not expressible safely"
)]

use std::io;
use std::os::fd::RawFd;

use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, Signal, set_dumpable_behavior,
    set_parent_process_death_signal, setrlimit,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use super::JailError;

/// Descriptors a VM may hold: its disks, ports and guest memory, and two per vsock connection.
const MAX_FILES: u64 = 4096;

/// Confines the calling process. Legal only while it has one thread, because capabilities are a
/// thread's; it keeps descriptors 0 to 2 alone.
pub(crate) fn enter() -> Result<(), JailError> {
    close_from(3).map_err(step("close inherited files"))?;
    set_no_new_privs(true).map_err(step("set no_new_privs"))?;
    // A guest's memory must not become a core file, nor go to a core handler's pipe, which a limit
    // of 0 doesn't stop (core(5)).
    limit(Resource::Core, 0).map_err(step("forbid core files"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("forbid core dumps"))?;
    limit(Resource::Nofile, MAX_FILES).map_err(step("limit open files"))?;
    drop_capabilities()?;
    // Last, as a change of credentials can clear it (prctl(2)). The second belt: the first is the
    // end of the control socket.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("follow the parent"))?;
    Ok(())
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError {
        step,
        source: source.into(),
    }
}

/// Lowers both limits; never raises one.
fn limit(resource: Resource, most: u64) -> rustix::io::Result<()> {
    let most = rustix::process::getrlimit(resource)
        .maximum
        .map_or(most, |maximum| maximum.min(most));
    setrlimit(
        resource,
        Rlimit {
            current: Some(most),
            maximum: Some(most),
        },
    )
}

fn drop_capabilities() -> Result<(), JailError> {
    for bit in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // Past the last capability this kernel knows.
            Err(Errno::INVAL) => break,
            // Without CAP_SETPCAP. Nothing is lost: under no_new_privs an execve gains nothing.
            Err(Errno::PERM) => break,
            Err(errno) => return Err(step("shrink the bounding set")(errno)),
        }
    }
    clear_ambient_capability_set().map_err(step("clear the ambient set"))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).map_err(step("drop capabilities"))
}

fn close_from(first: RawFd) -> io::Result<()> {
    // SAFETY: the process is at the start of its main function and has one thread; no value of
    // Rust owns a descriptor from `first` on.
    let done = unsafe { libc::close_range(first as libc::c_uint, libc::c_uint::MAX, 0) };
    if done == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}
