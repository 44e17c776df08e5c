//! Threads of the VMM.

use std::io;
use std::thread::{self, JoinHandle};

use crate::jail::{Filter, Rule, When, absent, allow, allow_if};

/// Bytes of stack. Less than a huge page: a stack of 2 MiB may get one at its first touch, which
/// costs that memory and the time to clear it.
const STACK: usize = 512 << 10;

/// A thread to be: named, with a stack that suits the VMM.
pub(crate) fn builder(name: impl Into<String>) -> thread::Builder {
    thread::Builder::new().name(name.into()).stack_size(STACK)
}

/// What every thread does, whatever else it is for: memory, locks, the clock, its own end.
pub(crate) const EVERY: &[Rule] = &[
    allow(libc::SYS_brk),
    allow_if(libc::SYS_mmap, &[When::Masked(2, EXEC, 0)]),
    allow_if(libc::SYS_mprotect, &[When::Masked(2, EXEC, 0)]),
    allow(libc::SYS_munmap),
    allow(libc::SYS_mremap),
    allow(libc::SYS_madvise),
    allow(libc::SYS_futex),
    allow(libc::SYS_sched_yield),
    allow(libc::SYS_clock_gettime),
    allow(libc::SYS_gettimeofday),
    allow(libc::SYS_getrandom),
    allow(libc::SYS_restart_syscall),
    // Whose thread is this; malloc's arenas ask for the number of processors.
    allow(libc::SYS_getpid),
    allow(libc::SYS_gettid),
    allow(libc::SYS_sched_getaffinity),
    // Doorbells and pipes; the last line of a thread that is stopped here.
    allow(libc::SYS_read),
    allow(libc::SYS_write),
    allow(libc::SYS_close),
    // With debug assertions the standard library looks first whether the file is open.
    allow_if(libc::SYS_fcntl, &[When::Is(1, libc::F_GETFD as u32)]),
    // Signals of its own, and their stacks, which a thread has until it ends.
    allow(libc::SYS_rt_sigreturn),
    allow(libc::SYS_rt_sigprocmask),
    allow(libc::SYS_sigaltstack),
    allow_if(libc::SYS_tgkill, &[When::Is(2, libc::SIGABRT as u32)]),
    allow(libc::SYS_rseq),
    allow(libc::SYS_exit),
    allow(libc::SYS_exit_group),
];

/// What a thread does that starts others, and what those do before they have a filter.
pub(crate) const STARTING: &[Rule] = &[
    // A thread of this process, in no new namespace.
    allow_if(
        libc::SYS_clone,
        &[When::Masked(0, NO_PROCESS, libc::CLONE_THREAD as u32)],
    ),
    // Its arguments are in memory, where no filter can look; without it the C library uses clone.
    absent(libc::SYS_clone3),
    allow(libc::SYS_set_robust_list),
    // The standard library looks whether a stack overflow would be told; the C library takes a
    // signal of its own (SIGSETXID) before the first thread.
    allow_if(libc::SYS_rt_sigaction, &[When::Is(1, 0), When::Is(0, 33)]),
    allow_if(
        libc::SYS_prctl,
        &[
            When::Is(0, libc::PR_SET_NAME as u32),
            // malloc names its mappings where the kernel can.
            When::Is(0, libc::PR_SET_VMA as u32),
            When::Is(0, libc::PR_SET_NO_NEW_PRIVS as u32),
        ],
    ),
    allow_if(
        libc::SYS_seccomp,
        &[When::Is(0, libc::SECCOMP_SET_MODE_FILTER)],
    ),
];

const EXEC: u32 = libc::PROT_EXEC as u32;

/// The flags of clone that tell a thread from a process, and a namespace from none.
const NO_PROCESS: u32 = (libc::CLONE_THREAD
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_PTRACE
    | libc::CLONE_UNTRACED) as u32;

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
