//! The boundary between a program and a VM in a process of its own.
//!
//! [`VmHandle::spawn`] executes this program again as a VMM process, confined before it reads its
//! first request; [`VmHandle::boot`] makes the VM in it. The two talk over one socket, the child's
//! standard input. Either side's end is the end of that socket for the other: no VM outlives its
//! parent, and no VM ends unseen.

mod birth;
mod client;
mod frame;
mod guest;
mod last_words;
mod log;
mod membership;
mod message;
mod outbox;
mod preparation;
mod server;
mod spec;
mod supervisor;

use crate::hypervisor::{KICK, SAVE_VM};
use crate::jail::{Filter, Rule, When, allow, allow_if, calls};
use crate::sys::threads;

pub use client::{ControlError, VmHandle};
pub(crate) use message::Beginning;
pub use message::{BalloonStats, ErrorKind, ErrorMessage, Event, Exit, LogLevel, VERSION};
pub use preparation::Preparation;
pub(crate) use server::{Start, give_up, serve};
pub use spec::{BootSpec, ConsoleSpec, DiskSpec, PortSpec, RestoreSpec, SpawnConfig, VsockSpec};

/// Threads that talk to the parent: frames and the files with them, the console's doors, the VM's
/// end.
pub(crate) const CONTROL: Filter = Filter {
    name: "control",
    tables: &[threads::EVERY, TALK, SAVE, SAVE_VM],
};

/// What it takes to read files that are open, kernels and snapshots, and to write a snapshot, beside
/// what the vCPUs' own threads do for it.
pub(crate) const SAVE: &[Rule] = &[
    allow(calls::SYS_pread64),
    allow(calls::SYS_pwrite64),
    allow(calls::SYS_ftruncate),
    allow(calls::SYS_lseek),
    allow(calls::SYS_fsync),
    allow(calls::SYS_fstat),
    allow_if(calls::SYS_statx, &[When::Masked(2, EMPTY_PATH, EMPTY_PATH)]),
    allow_if(
        calls::SYS_newfstatat,
        &[When::Masked(3, EMPTY_PATH, EMPTY_PATH)],
    ),
];

/// `AT_EMPTY_PATH` of linux/fcntl.h: of a file that is open.
const EMPTY_PATH: u32 = 0x1000;

/// What it takes to talk.
pub(crate) const TALK: &[Rule] = &[
    allow(calls::SYS_recvmsg),
    allow(calls::SYS_sendmsg),
    allow(calls::SYS_recvfrom),
    allow(calls::SYS_sendto),
    allow_if(
        calls::SYS_fcntl,
        &[
            When::Is(1, libc::F_SETFD as u32),
            When::Is(1, libc::F_GETFL as u32),
            When::Is(1, libc::F_SETFL as u32),
            When::Is(1, libc::F_DUPFD_CLOEXEC as u32),
        ],
    ),
    // Brings vCPUs out of the guest.
    allow_if(calls::SYS_tgkill, &[When::Is(2, KICK as u32)]),
    // The end of what a VM was made of, which may be a serial log with half a line.
    allow(calls::SYS_epoll_ctl),
    allow(calls::SYS_poll),
    allow(calls::SYS_ppoll),
];

/// `argv[0]` of a VMM process.
pub(crate) const ARG0: &str = "supermachine-vmm";

/// `argv[1]` of a VMM process. The VM's name, the log level and its [`Beginning`] follow.
pub(crate) const ARG1: &str = "vmm";

/// An error with its causes, in one line.
pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    log::clean(&text, log::MAX_LINE)
}

#[cfg(test)]
mod tests;

/// Compiles the examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
