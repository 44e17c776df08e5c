//! Seccomp: which system calls a thread may make, declared beside the code that makes them.
//!
//! A process gets one [`Filter`] with all that any of its threads needs, and each thread a narrower
//! one on top when it starts, which says no more than what it takes away; the kernel asks both. What
//! one of them does not allow ends the process, after a line on standard error that says which call
//! it was.

#![allow(
    unsafe_code,
    reason = "a signal handler, and the system call numbers it is told"
)]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use seccompiler::sock_filter;

use super::filter::{EXIT_STATUS, Filter, REPORT, Seccomp, What};
use super::program::{self, Verdict, Verdicts};
use super::{Refused, step};

/// What the filters of this process do; `Off` until it is confined.
static MODE: AtomicU8 = AtomicU8::new(Seccomp::Off as u8);

/// What the filter of this process says, once it is in force.
static PROCESS: OnceLock<Verdicts> = OnceLock::new();

/// The programs of the kinds of threads that there have been.
static NARROWED: Mutex<BTreeMap<&str, Arc<[sock_filter]>>> = Mutex::new(BTreeMap::new());

fn apply(program: &[sock_filter]) -> io::Result<()> {
    seccompiler::apply_filter(program).map_err(io::Error::other)
}

impl Filter {
    /// Filters this thread's calls, and those of threads it starts, from here on. Does nothing in a
    /// process that is not confined, or whose policy says so.
    ///
    /// # Errors
    /// The kernel has no seccomp, or refuses the filter.
    pub fn install(&self) -> io::Result<()> {
        let otherwise = match mode() {
            Seccomp::Off => return Ok(()),
            Seccomp::Enforce => libc::SECCOMP_RET_TRAP,
            Seccomp::Log => libc::SECCOMP_RET_LOG,
        };
        KIND.set(self.name);
        let Some(all) = PROCESS.get() else {
            let verdicts = self.verdicts();
            apply(&program::compile(&verdicts, otherwise))?;
            PROCESS.get_or_init(|| verdicts);
            return Ok(());
        };
        let mut narrowed = NARROWED.lock().unwrap_or_else(PoisonError::into_inner);
        let program = narrowed
            .entry(self.name)
            .or_insert_with(|| program::narrow(all, &self.verdicts(), otherwise).into());
        let program = Arc::clone(program);
        drop(narrowed);
        apply(&program)
    }

    fn verdicts(&self) -> Verdicts {
        let mut verdicts = Verdicts::new();
        for rule in self.tables.iter().copied().flatten() {
            let Ok(call) = u32::try_from(rule.call) else {
                continue;
            };
            let verdict = verdicts
                .entry(call)
                .or_insert_with(|| Verdict::AllowIf(Vec::new()));
            match (rule.what, &mut *verdict) {
                (What::Absent, _) => *verdict = Verdict::Fail(libc::ENOSYS as u16),
                (_, Verdict::Fail(_) | Verdict::Allow | Verdict::Forbid) => {}
                // It outweighs conditions of another table.
                (What::Allow, _) => *verdict = Verdict::Allow,
                (What::AllowIf(conditions), Verdict::AllowIf(all)) => all.extend(conditions),
            }
        }
        verdicts
    }
}

/// Begins to filter the process, with all that its threads will ever need.
pub(super) fn begin(mode: Seccomp, filter: &Filter) -> Result<(), Refused> {
    if mode == Seccomp::Off {
        return Ok(());
    }
    handle_violations().map_err(step("install the handler of SIGSYS"))?;
    MODE.store(mode as u8, Ordering::Relaxed);
    let installed = filter.install();
    if installed.is_err() {
        MODE.store(Seccomp::Off as u8, Ordering::Relaxed);
    }
    installed.map_err(step("seccomp"))
}

fn mode() -> Seccomp {
    let mode = MODE.load(Ordering::Relaxed);
    Seccomp::ALL
        .into_iter()
        .find(|known| *known as u8 == mode)
        .unwrap_or(Seccomp::Off)
}

/// Has all threads that are to start use the C library's first heap. From another, which a thread would get by itself,
/// glibc gives memory back only after it has read in /proc whether the host overcommits, and no
/// thread may open a file.
#[cfg(target_env = "gnu")]
pub(super) fn one_heap() -> io::Result<()> {
    // SAFETY: sets a number of malloc's, under malloc's own lock.
    match unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } {
        0 => Err(io::Error::other("mallopt(M_ARENA_MAX) failed")),
        _ => Ok(()),
    }
}

/// Others have one heap.
#[cfg(not(target_env = "gnu"))]
pub(super) fn one_heap() -> io::Result<()> {
    Ok(())
}

/// The name of the call a process was ended for.
pub(crate) fn call_name(number: usize) -> &'static str {
    syscalls::Sysno::new(number).map_or("unknown", |call| call.name())
}

thread_local! {
    /// The kind of this thread, for the handler.
    static KIND: Cell<&'static str> = const { Cell::new("unknown") };
}

/// What the kernel tells of a forbidden call (sigaction(2), `_sigsys`).
#[repr(C)]
struct Violation {
    signal: [libc::c_int; 4],
    address: *const libc::c_void,
    call: libc::c_int,
    arch: libc::c_uint,
}

fn handle_violations() -> io::Result<()> {
    // SAFETY: the structure is initialised, and the handler makes nothing but system calls.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(libc::c_int, *const Violation, *const libc::c_void) = report;
        action.sa_sigaction = handler as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut())
    };
    if done == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Says what was forbidden, and ends the process.
extern "C" fn report(_: libc::c_int, violation: *const Violation, _: *const libc::c_void) {
    // SAFETY: the kernel hands the handler of SIGSYS this structure.
    let call = unsafe { (*violation).call };
    let mut line = [0; 64];
    let mut text = io::Cursor::new(&mut line[..]);
    // Formatting a number allocates nothing; what doesn't fit is left out.
    let _ = io::Write::write_fmt(&mut text, format_args!("{REPORT}{call} {}\n", KIND.get()));
    let length = usize::try_from(text.position()).unwrap_or(0);
    // SAFETY: as many bytes as were written to the buffer. Then nothing runs any more.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), length);
        libc::_exit(EXIT_STATUS);
    }
}
