//! Capabilities and system call filters of the calling process.

use std::io;

use nix::libc;

/// The sets of capabilities that capset(2) changes, as bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Capabilities {
    pub(crate) effective: u64,
    pub(crate) permitted: u64,
    pub(crate) inheritable: u64,
}

/// Sets the three sets at once: one after the other, each would limit the next.
pub(crate) fn set_capabilities(sets: Capabilities) -> io::Result<()> {
    // _LINUX_CAPABILITY_VERSION_3, of this thread.
    let header: [u32; 2] = [0x2008_0522, 0];
    let half = |set: u64, shift: u32| (set >> shift) as u32;
    let words = |shift| {
        [
            half(sets.effective, shift),
            half(sets.permitted, shift),
            half(sets.inheritable, shift),
        ]
    };
    let data = [words(0), words(32)];
    // SAFETY: version 3 reads a header of two words and data of two times three.
    match unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the bounding set has a capability; an error if the kernel doesn't know it.
pub(crate) fn is_bound(capability: u8) -> io::Result<bool> {
    prctl(libc::PR_CAPBSET_READ, capability.into(), 0).map(|answer| answer == 1)
}

/// Drops a capability from the bounding set, for good.
pub(crate) fn unbind(capability: u8) -> io::Result<()> {
    prctl(libc::PR_CAPBSET_DROP, capability.into(), 0).map(drop)
}

/// Empties the ambient set.
pub(crate) fn clear_ambient() -> io::Result<()> {
    let action = libc::PR_CAP_AMBIENT_CLEAR_ALL;
    prctl(libc::PR_CAP_AMBIENT, number(action), 0).map(drop)
}

/// Adds a capability to the ambient set.
pub(crate) fn raise_ambient(capability: u8) -> io::Result<()> {
    let action = libc::PR_CAP_AMBIENT_RAISE;
    prctl(libc::PR_CAP_AMBIENT, number(action), capability.into()).map(drop)
}

fn number(value: libc::c_int) -> libc::c_ulong {
    libc::c_ulong::from(value.unsigned_abs())
}

fn prctl(option: libc::c_int, a: libc::c_ulong, b: libc::c_ulong) -> io::Result<libc::c_int> {
    let none: libc::c_ulong = 0;
    // SAFETY: the options used here take integers only.
    match unsafe { libc::prctl(option, a, b, none, none) } {
        -1 => Err(io::Error::last_os_error()),
        answer => Ok(answer),
    }
}

/// Filters this process's system calls by a classic BPF program, from now on and for good.
pub(crate) fn filter_calls(program: &[libc::sock_filter], flags: u32) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: program.len().try_into().map_err(io::Error::other)?,
        // The kernel only reads it.
        filter: program.as_ptr().cast_mut(),
    };
    let operation = libc::c_ulong::from(libc::SECCOMP_SET_MODE_FILTER);
    let flags = libc::c_ulong::from(flags);
    // SAFETY: `program` tells where the instructions are and how many, and lives past the call.
    match unsafe { libc::syscall(libc::SYS_seccomp, operation, flags, &raw const program) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
