//! What a VMM process is denied, tried out: a child of this program goes the way of a VMM process
//! into its jail, as far as its kind of thread goes, and then does what only an intruder would.
//!
//! Each attempt is made three times over: in no jail, where it must work, or the attempt itself is
//! wrong; behind the walls alone; and under the filter of each kind of thread.

use std::ffi::{CStr, c_long};
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, ExitStatus};

use libtest_mimic::{Completion, Failed, Trial};
use nix::sched::{CloneFlags, unshare};
use supermachine_vmm::child::filters;
use supermachine_vmm::jail::{self, Filter, Policy, Seccomp};

use crate::support::{Outcome, check, check_eq};

const PROBE: &str = "--probe";

/// In the place of an attempt: what every thread does anyway.
const MEMORY: &str = "memory";

/// Exit status of an attempt that was no error.
const WORKED: u8 = 0;

pub(crate) fn tests() -> Vec<Trial> {
    let mut tests = vec![
        trial("denied::nothing_without_a_jail", nothing_without),
        trial("denied::by_the_walls", by_the_walls),
        trial("denied::what_is_for_others", what_is_for_others),
        trial("denied::but_not_to_give_memory_back", memory_goes_back),
    ];
    tests.extend(filters().map(|filter| {
        let name = format!("denied::to_a_{}_thread", filter.name);
        trial(&name, move || by_seccomp(filter))
    }));
    tests
}

/// Without privileges there is no jail to look at.
fn trial(name: &str, run: impl Fn() -> Outcome + Send + 'static) -> Trial {
    Trial::ignorable_test(name, move || {
        if !rustix::process::geteuid().is_root() {
            return Ok(Completion::ignored_with("only as root"));
        }
        run().map(|()| Completion::Completed)
    })
}

/// Something an intruder would try.
struct Attempt {
    name: &'static str,
    /// The system call that its filter meets first.
    call: c_long,
    /// Whether root outside of any jail can do it; if not, only the filter is tried.
    free: bool,
    /// Whether it fails without a filter too.
    walled: bool,
    run: fn() -> io::Result<()>,
}

const fn attempt(
    name: &'static str,
    call: c_long,
    (free, walled): (bool, bool),
    run: fn() -> io::Result<()>,
) -> Attempt {
    Attempt {
        name,
        call,
        free,
        walled,
        run,
    }
}

const BOTH: (bool, bool) = (true, true);
/// Harmless by itself, and denied because nothing needs it.
const FILTER: (bool, bool) = (true, false);
/// Not to be tried on a host.
const DANGEROUS: (bool, bool) = (false, false);

const ATTEMPTS: &[Attempt] = &[
    attempt("open /etc/passwd", libc::SYS_openat, BOTH, || {
        open(c"/etc/passwd")
    }),
    attempt("open /proc/self/mem", libc::SYS_openat, BOTH, || {
        open(c"/proc/self/mem")
    }),
    attempt("list the root", libc::SYS_openat, BOTH, || open(c"/")),
    attempt("execute a shell", libc::SYS_execve, BOTH, execute),
    attempt("connect by TCP", libc::SYS_socket, BOTH, connect),
    attempt(
        "connect a socket it has",
        libc::SYS_connect,
        DANGEROUS,
        || call(libc::SYS_connect, [0, 0, 0]),
    ),
    attempt("ptrace its parent", libc::SYS_ptrace, DANGEROUS, || {
        call(libc::SYS_ptrace, [c_long::from(libc::PTRACE_ATTACH), 1, 0])
    }),
    attempt("signal the host's init", libc::SYS_kill, DANGEROUS, || {
        call(libc::SYS_kill, [1, 0, 0])
    }),
    attempt("become root", libc::SYS_setuid, BOTH, || {
        call(libc::SYS_setuid, [0, 0, 0])
    }),
    attempt("mount", libc::SYS_mount, DANGEROUS, || {
        call(libc::SYS_mount, [0, c"/".as_ptr() as c_long, 0])
    }),
    attempt(
        "enter a new user namespace",
        libc::SYS_unshare,
        BOTH,
        || call(libc::SYS_unshare, [c_long::from(libc::CLONE_NEWUSER), 0, 0]),
    ),
    attempt("change the root", libc::SYS_chroot, BOTH, || {
        call(libc::SYS_chroot, [c".".as_ptr() as c_long, 0, 0])
    }),
    attempt("fork", libc::SYS_clone, FILTER, fork),
    attempt("map code", libc::SYS_mmap, FILTER, || {
        map(libc::PROT_READ | libc::PROT_EXEC).map(drop)
    }),
    attempt("make data code", libc::SYS_mprotect, FILTER, || {
        let page = map(libc::PROT_READ)?;
        call(
            libc::SYS_mprotect,
            [page, 4096, c_long::from(libc::PROT_READ | libc::PROT_EXEC)],
        )
    }),
    attempt("type into a terminal", libc::SYS_ioctl, DANGEROUS, || {
        call(libc::SYS_ioctl, [0, libc::TIOCSTI as c_long, 0])
    }),
    attempt(
        "make a file in memory",
        libc::SYS_memfd_create,
        FILTER,
        || call(libc::SYS_memfd_create, [c"x".as_ptr() as c_long, 0, 0]),
    ),
    attempt("io_uring", libc::SYS_io_uring_setup, DANGEROUS, || {
        call(libc::SYS_io_uring_setup, [1, 0, 0])
    }),
    attempt(
        "memory of io_uring",
        libc::SYS_io_uring_register,
        DANGEROUS,
        || call(libc::SYS_io_uring_register, [-1, 0, 0]),
    ),
    attempt("bpf", libc::SYS_bpf, DANGEROUS, || {
        call(libc::SYS_bpf, [0, 0, 0])
    }),
    attempt("keys", libc::SYS_keyctl, DANGEROUS, || {
        call(libc::SYS_keyctl, [0, 0, 0])
    }),
    attempt(
        "read another's memory",
        libc::SYS_process_vm_readv,
        DANGEROUS,
        || call(libc::SYS_process_vm_readv, [1, 0, 0]),
    ),
    attempt("a pidfd of another", libc::SYS_pidfd_open, FILTER, || {
        call(libc::SYS_pidfd_open, [1, 0, 0])
    }),
    attempt("join a namespace", libc::SYS_setns, DANGEROUS, || {
        call(libc::SYS_setns, [0, 0, 0])
    }),
    attempt(
        "handle signals anew",
        libc::SYS_rt_sigaction,
        DANGEROUS,
        || call(libc::SYS_rt_sigaction, [libc::SIGSYS.into(), 8, 0]),
    ),
];

/// What one kind of thread does and another must not.
const FOREIGN: &[(&str, c_long, [c_long; 3])] = &[
    ("control", libc::SYS_ioctl, [0, 0xae80, 0]),
    ("control", libc::SYS_accept4, [0, 0, 0]),
    ("control", libc::SYS_preadv, [0, 0, 0]),
    ("control", libc::SYS_clone, [0, 0, 0]),
    ("device", libc::SYS_ioctl, [0, 0xae80, 0]),
    ("device", libc::SYS_fallocate, [0, 0, 0]),
    ("device", libc::SYS_recvmsg, [0, 0, 0]),
    ("disk", libc::SYS_accept4, [0, 0, 0]),
    ("disk", libc::SYS_sendto, [0, 0, 0]),
    ("disk", libc::SYS_sendmsg, [0, 0, 0]),
    // KVM_CREATE_VM.
    ("vcpu", libc::SYS_ioctl, [0, 0xae01, 0]),
    ("vcpu", libc::SYS_recvmsg, [0, 0, 0]),
    ("vcpu", libc::SYS_pwritev, [0, 0, 0]),
    ("vcpu", libc::SYS_accept4, [0, 0, 0]),
];

fn call(number: c_long, [a, b, c]: [c_long; 3]) -> io::Result<()> {
    // SAFETY: the process does nothing after it but end, and pointers are null or of constants.
    match unsafe { libc::syscall(number, a, b, c, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn open(path: &CStr) -> io::Result<()> {
    let path = path.as_ptr() as c_long;
    call(libc::SYS_openat, [libc::AT_FDCWD.into(), path, 0])
}

fn execute() -> io::Result<()> {
    let path = c"/bin/true".as_ptr();
    let arguments = [path, std::ptr::null()];
    call(
        libc::SYS_execve,
        [path as c_long, arguments.as_ptr() as c_long, 0],
    )
}

/// To a socket of its own that listens, which only a network without interfaces hinders.
fn connect() -> io::Result<()> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    std::net::TcpStream::connect(listener.local_addr()?).map(drop)
}

fn fork() -> io::Result<()> {
    // SAFETY: the child ends at once.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: ends the process.
        0 => unsafe { libc::_exit(0) },
        _ => Ok(()),
    }
}

fn map(protection: libc::c_int) -> io::Result<c_long> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(page as c_long)
}

/// Plays the intruder: `--probe JAIL KIND ATTEMPT`. Its status is the error number it met.
pub(crate) fn child() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    if arguments.next()? != PROBE {
        return None;
    }
    let (jail, kind, place) = (arguments.next()?, arguments.next()?, arguments.next()?);
    if jail != "none" {
        jail::close_inherited().unwrap();
        let policy = Policy {
            seccomp: if jail == "seccomp" {
                Seccomp::Enforce
            } else {
                Seccomp::Off
            },
            ..Policy::default()
        };
        let [process, ..] = filters();
        jail::enter(&policy, process).unwrap();
    }
    let result = if place == MEMORY {
        // A thread of its own, as only the first one has the first heap anyway.
        let thread = std::thread::spawn(move || {
            become_a(&kind);
            use_memory();
        });
        thread.join().unwrap();
        Ok(())
    } else {
        become_a(&kind);
        attempt_at(place.parse().unwrap())
    };
    let status = match result {
        Ok(()) => WORKED,
        Err(error) => u8::try_from(error.raw_os_error().unwrap_or(255)).unwrap_or(255),
    };
    Some(ExitCode::from(status))
}

/// Leaves this thread what one of the kind has; the first kind's filter is the process's.
fn become_a(kind: &str) {
    let [_, narrower @ ..] = filters();
    if let Some(filter) = narrower.into_iter().find(|filter| filter.name == kind) {
        filter.install().unwrap();
    }
}

fn attempt_at(place: usize) -> io::Result<()> {
    match ATTEMPTS.get(place) {
        Some(attempt) => (attempt.run)(),
        None => {
            let (_, number, arguments) = FOREIGN[place - ATTEMPTS.len()];
            call(number, arguments)
        }
    }
}

/// In pieces too small for mappings of their own: a heap grows by them, and shrinks when they go.
fn use_memory() {
    let pieces: Vec<_> = (0..64).map(|_| vec![1u8; 64 << 10]).collect();
    drop(std::hint::black_box(pieces));
}

/// Starts an intruder in a pid namespace of its own, as VMM processes are.
fn intrude(jail: &str, kind: &str, place: &str) -> Result<(ExitStatus, String), Failed> {
    let arguments = [PROBE, jail, kind, place].map(str::to_owned);
    let apart = jail != "none";
    // For this thread alone: the test's others keep their namespace.
    let output = std::thread::spawn(move || {
        if apart {
            unshare(CloneFlags::CLONE_NEWPID)?;
        }
        Command::new("/proc/self/exe").args(arguments).output()
    });
    let output = output
        .join()
        .map_err(|_| "the starting thread panicked")??;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok((output.status, said))
}

fn nothing_without() -> Outcome {
    for (place, attempt) in ATTEMPTS.iter().enumerate() {
        if attempt.free {
            let (status, said) = intrude("none", "none", &place.to_string())?;
            check(
                status.success(),
                format!("{}: {status} {said}", attempt.name),
            )?;
        }
    }
    Ok(())
}

fn by_the_walls() -> Outcome {
    for (place, attempt) in ATTEMPTS.iter().enumerate() {
        if attempt.walled {
            let (status, said) = intrude("walls", "none", &place.to_string())?;
            let denied = status.code().is_some_and(|code| code != i32::from(WORKED));
            // Said by a panic, if it didn't come as far as the attempt.
            check(
                denied && said.is_empty(),
                format!("{}: {status} {said}", attempt.name),
            )?;
        }
    }
    Ok(())
}

fn by_seccomp(filter: &Filter) -> Outcome {
    for (place, attempt) in ATTEMPTS.iter().enumerate() {
        ended_by_filter(filter.name, place, attempt.call).map_err(|error| {
            format!("{}: {}", attempt.name, error.message().unwrap_or_default())
        })?;
    }
    Ok(())
}

fn what_is_for_others() -> Outcome {
    for (index, (kind, number, _)) in FOREIGN.iter().enumerate() {
        ended_by_filter(kind, ATTEMPTS.len() + index, *number)
            .map_err(|error| format!("{kind}: {}", error.message().unwrap_or_default()))?;
    }
    Ok(())
}

/// The C library must not ask the host for anything when a thread frees memory.
fn memory_goes_back() -> Outcome {
    for filter in filters() {
        let (status, said) = intrude("seccomp", filter.name, MEMORY)?;
        check(
            status.success(),
            format!("{}: {status} {said}", filter.name),
        )?;
    }
    Ok(())
}

fn ended_by_filter(kind: &str, place: usize, number: c_long) -> Outcome {
    let (status, said) = intrude("seccomp", kind, &place.to_string())?;
    check(status.signal().is_none(), format!("{status} {said}"))?;
    check_eq(
        (status.code(), said),
        (
            Some(jail::SECCOMP_EXIT_STATUS),
            format!("{}{number} {kind}\n", jail::SECCOMP_REPORT),
        ),
    )
}
