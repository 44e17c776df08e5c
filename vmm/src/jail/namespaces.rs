//! Namespaces that a process is born in, as its parent makes them.
//!
//! A thread has its own, and those of its children are its own: the other threads stay where they
//! are.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, Command};

use nix::sched::{CloneFlags, setns, unshare};

/// The network namespace of the thread that opens it.
const NETWORK: &str = "/proc/thread-self/ns/net";

/// Makes a network namespace, and has the calling thread stay in it.
///
/// # Errors
/// The kernel has none, or does not allow it.
pub fn new_network() -> io::Result<OwnedFd> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    Ok(File::open(NETWORK)?.into())
}

/// A thread in another network namespace. It leaves that when this is dropped.
#[derive(Debug)]
pub struct Inside {
    home: File,
}

/// Has the calling thread, and what it starts, be in this network namespace.
///
/// # Errors
/// The kernel does not allow it.
pub fn enter_network(network: OwnedFd) -> io::Result<Inside> {
    let home = File::open(NETWORK)?;
    setns(network, CloneFlags::CLONE_NEWNET)?;
    Ok(Inside { home })
}

impl Drop for Inside {
    fn drop(&mut self) {
        if let Err(errno) = setns(&self.home, CloneFlags::CLONE_NEWNET) {
            tracing::warn!(%errno, "a thread stays in its last child's network namespace");
        }
    }
}

/// Starts a child that is the first process of a pid namespace, or, where the kernel forbids that,
/// of the caller's: [`enter`](super::enter) finds out which.
///
/// # Errors
/// The child can't be started.
pub fn spawn_apart(command: &mut Command) -> io::Result<Child> {
    let home = File::open("/proc/self/ns/pid")?;
    // A thread's own affair: the other threads' children stay where they are.
    if let Err(errno) = unshare(CloneFlags::CLONE_NEWPID) {
        tracing::debug!(%errno, "no pid namespace for a child");
        return command.spawn();
    }
    let child = command.spawn();
    // Until then the thread could start no other thread (clone(2), EINVAL).
    if let Err(errno) = setns(home, CloneFlags::CLONE_NEWPID) {
        tracing::warn!(%errno, "children of this thread stay in its last child's pid namespace");
    }
    child
}
