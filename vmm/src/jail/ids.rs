//! Who the process is: ids of its own, no capabilities.

use std::fs;
use std::io;

use nix::sched::{CloneFlags, unshare};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_keep_capabilities,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::{Refused, step};

/// The process's id as the host counts it, which in a pid namespace `getpid` doesn't tell. Needs
/// the host's /proc.
pub(super) fn host_pid() -> Result<u32, Refused> {
    let link = fs::read_link("/proc/self").map_err(step("read /proc/self"))?;
    link.to_str()
        .and_then(|pid| pid.parse().ok())
        .ok_or_else(|| step("read /proc/self")(io::Error::from(io::ErrorKind::InvalidData)))
}

/// Becomes user and group `id`, member of no other group. Keeps its capabilities: the layers that
/// follow need them.
pub(super) fn become_id(id: u32) -> Result<(), Refused> {
    set_keep_capabilities(true).map_err(step("keep capabilities"))?;
    set_thread_groups(&[]).map_err(step("leave all groups"))?;
    let gid = Gid::from_raw(id);
    set_thread_res_gid(gid, gid, gid).map_err(step("change the group id"))?;
    let uid = Uid::from_raw(id);
    set_thread_res_uid(uid, uid, uid).map_err(step("change the user id"))?;
    let kept = capabilities(None).map_err(step("read capabilities"))?;
    let raised = CapabilitySets {
        effective: kept.permitted,
        ..kept
    };
    set_capabilities(None, raised).map_err(step("raise capabilities"))
}

/// Enters a user namespace to which no id is mapped. The other namespaces stay the host's, so that
/// a capability in this one is of no use, and a process of the host's root can join them.
pub(super) fn enter_user_namespace() -> Result<(), Refused> {
    unshare(CloneFlags::CLONE_NEWUSER).map_err(step("unshare(CLONE_NEWUSER)"))
}

/// Drops all capabilities but these.
pub(super) fn keep_capabilities(keep: CapabilitySet) -> Result<(), Refused> {
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
    let kept = capabilities(None).map_err(step("read capabilities"))?;
    let kept = CapabilitySets {
        effective: kept.effective & keep,
        permitted: kept.permitted & keep,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, kept).map_err(step("drop capabilities"))
}
