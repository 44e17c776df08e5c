//! Threads of the VMM.

use std::io;
use std::thread::{self, JoinHandle};

use crate::jail::{Filter, Rule, When, absent, allow, allow_if, calls};

/// Bytes of stack. Less than a huge page: a stack of 2 MiB may get one at its first touch, which
/// costs that memory and the time to clear it.
const STACK: usize = 512 << 10;

/// A thread to be: named, with a stack that suits the VMM.
pub(crate) fn builder(name: impl Into<String>) -> thread::Builder {
    thread::Builder::new().name(name.into()).stack_size(STACK)
}

/// What every thread does, whatever else it is for: memory, locks, the clock, its own end.
pub const EVERY: &[Rule] = &[
    allow(calls::SYS_brk),
    allow_if(calls::SYS_mmap, &[When::Masked(2, EXEC, 0)]),
    allow_if(calls::SYS_mprotect, &[When::Masked(2, EXEC, 0)]),
    allow(calls::SYS_munmap),
    allow(calls::SYS_mremap),
    allow(calls::SYS_madvise),
    allow(calls::SYS_futex),
    allow(calls::SYS_sched_yield),
    allow(calls::SYS_clock_gettime),
    allow(calls::SYS_gettimeofday),
    allow(calls::SYS_getrandom),
    allow(calls::SYS_restart_syscall),
    // Whose thread is this; malloc's arenas ask for the number of processors.
    allow(calls::SYS_getpid),
    allow(calls::SYS_gettid),
    allow(calls::SYS_sched_getaffinity),
    // Doorbells and pipes; the last line of a thread that is stopped here.
    allow(calls::SYS_read),
    allow(calls::SYS_write),
    allow(calls::SYS_close),
    // With debug assertions the standard library looks first whether the file is open.
    allow_if(calls::SYS_fcntl, &[When::Is(1, libc::F_GETFD as u32)]),
    // Signals of its own, and their stacks, which a thread has until it ends.
    allow(calls::SYS_rt_sigreturn),
    allow(calls::SYS_rt_sigprocmask),
    allow(calls::SYS_sigaltstack),
    allow_if(calls::SYS_tgkill, &[When::Is(2, libc::SIGABRT as u32)]),
    allow(calls::SYS_rseq),
    allow(calls::SYS_exit),
    allow(calls::SYS_exit_group),
];

/// What a thread does that starts others, and what those do before they have a filter.
pub(crate) const STARTING: &[Rule] = &[
    // A thread of this process, in no new namespace.
    allow_if(
        calls::SYS_clone,
        &[When::Masked(0, NO_PROCESS, CLONE_THREAD)],
    ),
    // Its arguments are in memory, where no filter can look; without it the C library uses clone.
    absent(calls::SYS_clone3),
    allow(calls::SYS_set_robust_list),
    // The standard library looks whether a stack overflow would be told; the C library takes a
    // signal of its own (SIGSETXID) before the first thread.
    allow_if(calls::SYS_rt_sigaction, &[When::Is(1, 0), When::Is(0, 33)]),
    allow_if(
        calls::SYS_prctl,
        &[
            When::Is(0, PR_SET_NAME),
            // malloc names its mappings where the kernel can.
            When::Is(0, PR_SET_VMA),
            When::Is(0, PR_SET_NO_NEW_PRIVS),
        ],
    ),
    allow_if(calls::SYS_seccomp, &[When::Is(0, SECCOMP_SET_MODE_FILTER)]),
];

const EXEC: u32 = libc::PROT_EXEC as u32;

// Of linux/prctl.h and linux/seccomp.h.
const PR_SET_NAME: u32 = 15;
const PR_SET_VMA: u32 = 0x5356_4d41;
const PR_SET_NO_NEW_PRIVS: u32 = 38;
const SECCOMP_SET_MODE_FILTER: u32 = 1;

/// Of linux/sched.h.
const CLONE_THREAD: u32 = 0x0001_0000;
/// The flags of clone that tell a thread from a process, and a namespace from none: namespaces of
/// mounts, cgroups, names, ipc, users, pids and networks, and both that concern tracing.
const NO_PROCESS: u32 = CLONE_THREAD
    | 0x0002_0000
    | 0x0200_0000
    | 0x0400_0000
    | 0x0800_0000
    | 0x1000_0000
    | 0x2000_0000
    | 0x4000_0000
    | 0x0000_2000
    | 0x0080_0000;

/// Starts a thread that makes the system calls of `filter` alone.
///
/// # Errors
/// The host refuses another thread.
pub(crate) fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    filter: &'static Filter,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    builder(name).spawn(move || {
        narrow(filter);
        work()
    })
}

/// Leaves this thread the system calls of `filter` alone, if the process is confined.
pub(crate) fn narrow(filter: &Filter) {
    if let Err(error) = filter.install() {
        // The process has had one filter already, so there is no going on without.
        panic!("No seccomp filter for a {} thread: {error}", filter.name);
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_c_library() {
        let flags = CLONE_THREAD as i32
            | libc::CLONE_NEWNS
            | libc::CLONE_NEWCGROUP
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUSER
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNET
            | libc::CLONE_PTRACE
            | libc::CLONE_UNTRACED;
        assert_eq!(NO_PROCESS as i32, flags);
        assert_eq!(CLONE_THREAD as i32, libc::CLONE_THREAD);
        assert_eq!(PR_SET_NAME as i32, libc::PR_SET_NAME);
        assert_eq!(PR_SET_VMA as i32, libc::PR_SET_VMA);
        assert_eq!(PR_SET_NO_NEW_PRIVS as i32, libc::PR_SET_NO_NEW_PRIVS);
        assert_eq!(SECCOMP_SET_MODE_FILTER, libc::SECCOMP_SET_MODE_FILTER);
    }
}
