//! Linux: the order in which the walls go up.

#![allow(
    unsafe_code,
    reason = "closing unknown descriptors is not expressible safely"
)]

use std::io;
use std::os::fd::{BorrowedFd, RawFd};

use nix::sched::{CloneFlags, unshare};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, Signal, set_dumpable_behavior,
    set_parent_process_death_signal, setrlimit,
};
use rustix::thread::{CapabilitySet, set_no_new_privs};

use super::{
    Filter, JailError, Layer, Missing, Policy, Refused, ids, landlock, root, seccomp, step,
};

/// Descriptors a VM may hold: its disks, ports and guest memory, and two per vsock connection.
const MAX_FILES: u64 = 4096;

/// Threads of all processes with the process's user id, which are its own: vCPUs, disks, a few.
const MAX_THREADS: u64 = 512;

/// The pid of a pid namespace's first process, as that process sees it.
const FIRST: u32 = 1;

/// Closes every inherited file but the standard streams, which close when another program is
/// executed.
///
/// # Errors
/// What the kernel refused.
pub fn close_inherited() -> Result<(), JailError> {
    close_from(3).map_err(|source| JailError::Step(step("close inherited files")(source)))?;
    for stream in 0..3 {
        // SAFETY: borrowed for this call, which refuses a descriptor that isn't open.
        let stream = unsafe { BorrowedFd::borrow_raw(stream) };
        // A program may be started without it.
        let _ = fcntl_setfd(stream, FdFlags::CLOEXEC);
    }
    Ok(())
}

/// Confines the calling process, and tells which layers the host lacks. Legal only while it has one
/// thread, because credentials are a thread's. Open files stay open. `filter` has the system calls
/// that any thread of the process will need.
///
/// # Errors
/// The host lacks a layer that `policy` asks for, or refuses what any host allows. The process must
/// end then: it is half confined.
pub fn enter(policy: &Policy, filter: &Filter) -> Result<Vec<Missing>, JailError> {
    enter_beside(policy, filter, false, || ())
}

/// As [`enter`]; with `own_network`, for a process that was born in a network namespace of its own.
/// Calls `begin` once the process may have threads. One that `begin` starts is in the namespaces and
/// has the ids of the process, but keeps its capabilities, which are of the user namespace, and no
/// filter holds it: it must do one thing and end.
///
/// # Errors
/// As [`enter`].
pub fn enter_beside(
    policy: &Policy,
    filter: &Filter,
    own_network: bool,
    begin: impl FnOnce(),
) -> Result<Vec<Missing>, JailError> {
    confine(policy, filter, None, own_network, begin)
}

/// What a process keeps that works on files which belong to others.
#[derive(Debug, Clone, Copy)]
pub struct Keep<'a> {
    /// Capabilities, as far as it has them. They hold for the host's files: it gets no user
    /// namespace.
    pub capabilities: CapabilitySet,
    /// Directories beneath which it may do everything but execute.
    pub beneath: &'a [BorrowedFd<'a>],
}

/// As [`enter`], for a process that keeps something, and that may outlive its parent.
///
/// # Errors
/// As [`enter`].
pub fn enter_keeping(
    policy: &Policy,
    filter: &Filter,
    keep: &Keep<'_>,
) -> Result<Vec<Missing>, JailError> {
    confine(policy, filter, Some(keep), false, || ())
}

fn confine(
    policy: &Policy,
    filter: &Filter,
    keep: Option<&Keep<'_>>,
    own_network: bool,
    begin: impl FnOnce(),
) -> Result<Vec<Missing>, JailError> {
    forbid_privileges_and_dumps().map_err(JailError::Step)?;
    let heap = seccomp::one_heap().map_err(step("share one heap"));
    heap.map_err(JailError::Step)?;
    let mut walls = Walls {
        policy,
        missing: Vec::new(),
    };
    let host_pid = ids::host_pid();
    walls.raise(Layer::Pid, own_pid_namespace())?;
    let network = if own_network {
        Ok(())
    } else {
        leave(CloneFlags::CLONE_NEWNET, "unshare(CLONE_NEWNET)")
    };
    walls.raise(Layer::Network, network)?;
    let ipc = CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWCGROUP;
    let left = leave(
        ipc,
        "unshare(CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP)",
    );
    walls.raise(Layer::Ipc, left)?;
    let mounts =
        leave(CloneFlags::CLONE_NEWNS, "unshare(CLONE_NEWNS)").and_then(|()| root::empty());
    walls.raise(Layer::Root, mounts)?;
    let own_ids = host_pid.and_then(|pid| ids::become_id(policy.first_id.saturating_add(pid)));
    if walls.raise(Layer::Ids, own_ids)? {
        // Among strangers with the same id there is no telling how many there may be.
        lower(Resource::Nproc, MAX_THREADS)
            .map_err(|errno| JailError::Step(step("limit threads")(errno)))?;
    }
    if keep.is_none() {
        walls.raise(Layer::UserNamespace, ids::enter_user_namespace())?;
    }
    begin();
    let capabilities = keep.map_or(CapabilitySet::empty(), |keep| keep.capabilities);
    ids::keep_capabilities(capabilities).map_err(JailError::Step)?;
    // After the credentials: a change of them resets both (prctl(2)).
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|errno| JailError::Step(step("forbid core dumps")(errno)))?;
    if keep.is_none() {
        follow_the_parent().map_err(JailError::Step)?;
    }
    let beneath = keep.map_or(&[][..], |keep| keep.beneath);
    walls.raise(Layer::Landlock, landlock::forbid_all_but(beneath))?;
    walls.raise(Layer::Seccomp, seccomp::begin(policy.seccomp, filter))?;
    Ok(walls.missing)
}

/// Raises wall after wall.
struct Walls<'a> {
    policy: &'a Policy,
    missing: Vec<Missing>,
}

impl Walls<'_> {
    /// Whether the layer holds now; an error if it doesn't and must.
    fn raise(&mut self, layer: Layer, result: Result<(), Refused>) -> Result<bool, JailError> {
        match result {
            Ok(()) => Ok(true),
            Err(refused) if self.policy.allow_missing.contains(&layer) => {
                let reason = format!("{}: {}", refused.step, refused.source);
                self.missing.push(Missing { layer, reason });
                Ok(false)
            }
            Err(source) => Err(JailError::Lacks { layer, source }),
        }
    }
}

fn forbid_privileges_and_dumps() -> Result<(), Refused> {
    set_no_new_privs(true).map_err(step("set no_new_privs"))?;
    // A guest's memory must not become a core file, nor go to a core handler's pipe, which a limit
    // of 0 doesn't stop (core(5)).
    for (resource, most) in [
        (Resource::Core, 0),
        (Resource::Nofile, MAX_FILES),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
    ] {
        lower(resource, most).map_err(step("lower a limit"))?;
    }
    Ok(())
}

fn follow_the_parent() -> Result<(), Refused> {
    // The second belt: the first is the end of the control socket.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("follow the parent"))
}

/// A process can't enter one itself: its parent makes it.
fn own_pid_namespace() -> Result<(), Refused> {
    if std::process::id() == FIRST {
        return Ok(());
    }
    let text = "the parent process could not make one";
    Err(step("pid namespace")(io::Error::other(text)))
}

fn leave(namespaces: CloneFlags, call: &'static str) -> Result<(), Refused> {
    unshare(namespaces).map_err(step(call))
}

/// Lowers both limits; never raises one.
fn lower(resource: Resource, most: u64) -> rustix::io::Result<()> {
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

fn close_from(first: RawFd) -> io::Result<()> {
    // SAFETY: the process is at the start of its main function and has one thread; no value of
    // Rust owns a descriptor from `first` on.
    let done = unsafe { libc::close_range(first as libc::c_uint, libc::c_uint::MAX, 0) };
    if done == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}
