//! By clone3(2) with `CLONE_INTO_CGROUP`.
//!
//! The standard library has no word for that. Moved there later instead, a process waits for a grace
//! period (RCU) of the kernel's, and is accounted for elsewhere until then.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Pid, WaitOptions, waitpid};

use super::Program;

/// Of linux/sched.h; the C library's header has a number that does not fit it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What a child says before it executes its program. Some kernels, Debian's 6.1 among them, kill it
/// at its birth where the caller's cgroup has been killed before (`cgroup.kill`): they compare the
/// killings of that one with those of the child's.
const HERE: u8 = 1;

/// The first descriptor that is not of the standard three.
const PAST_STANDARD: RawFd = 3;

/// Starts `program`, with an empty environment, in the cgroup (v2) that this directory is, and as
/// the first of a pid namespace of its own. Every descriptor that isn't close-on-exec is inherited.
///
/// # Errors
/// The kernel or the cgroup does not allow this, or the program can't be executed.
pub(crate) fn into_cgroup(cgroup: &File, program: &Program<'_>) -> io::Result<u32> {
    // All of this comes before: after clone3 memory can't be allocated, as another thread may have
    // held the allocator's lock.
    let mut args: Vec<*const libc::c_char> = program.args.iter().map(|arg| arg.as_ptr()).collect();
    args.push(ptr::null());
    // Beyond those they become, so that none is overwritten before its turn.
    let beyond = |file| fcntl_dupfd_cloexec(file, PAST_STANDARD);
    let [input, output, errors] = program.standard;
    let standard = [beyond(input)?, beyond(output)?, beyond(errors)?];
    let (mut failure, failed) = io::pipe()?;
    let failed = fcntl_dupfd_cloexec(failed, PAST_STANDARD)?;

    // SAFETY: all zeros is a valid clone_args: no flags, no addresses.
    let mut request: libc::clone_args = unsafe { std::mem::zeroed() };
    request.flags = CLONE_INTO_CGROUP | libc::CLONE_NEWPID as u64;
    request.exit_signal = libc::SIGCHLD as u64;
    request.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: `request` lives and is as long as told. Without CLONE_VM the child has a copy of this
    // process's memory, in which it does nothing but `become_program`. That copy costs page tables
    // (0.2 ms in the bench, the wait 8); with CLONE_VM it would have to have a stack of its own.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            ptr::from_mut(&mut request),
            size_of::<libc::clone_args>(),
        )
    };
    if pid == 0 {
        // SAFETY: this is the child, and `args` ends with null.
        unsafe { become_program(program.path, &args, &standard, &failed) }
    }
    let child = u32::try_from(pid).map_err(|_| io::Error::last_os_error())?;
    drop(failed);
    let mut told = Vec::new();
    let errno = match failure.read_to_end(&mut told).map(|_| told.as_slice()) {
        // The other side is closed as the program is executed.
        Ok([HERE]) => return Ok(child),
        Ok([HERE, errno @ ..]) => <[u8; 4]>::try_from(errno).ok(),
        _ => None,
    };
    // It has ended, or is about to.
    let _ = waitpid(Pid::from_raw(child.cast_signed()), WaitOptions::empty());
    Err(match errno {
        Some(errno) => io::Error::from_raw_os_error(i32::from_ne_bytes(errno)),
        None => io::Error::other("the child ended before it executed anything"),
    })
}

/// What the child does: executes the program, or says why not and ends.
///
/// # Safety
/// The process is a new child and has no other thread; `args` ends with null. Everything that is
/// called here is async-signal-safe (signal-safety(7)).
unsafe fn become_program(
    path: &CStr,
    args: &[*const libc::c_char],
    standard: &[OwnedFd; 3],
    failed: &OwnedFd,
) -> ! {
    let no_environment = [ptr::null::<libc::c_char>()];
    // SAFETY: the caller's promises; what pointers point to lives until the process is another.
    unsafe {
        // As the standard library does for its children: it ignores this one for itself.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
        libc::write(failed.as_raw_fd(), [HERE].as_ptr().cast(), 1);
        let placed = (0..)
            .zip(standard)
            .all(|(place, file)| libc::dup2(file.as_raw_fd(), place) != -1);
        if placed {
            libc::execve(path.as_ptr(), args.as_ptr(), no_environment.as_ptr());
        }
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
        let told = errno.to_ne_bytes();
        libc::write(failed.as_raw_fd(), told.as_ptr().cast(), told.len());
        libc::_exit(127)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_is_no_cgroup_is_refused_and_starts_nothing() {
        let null = File::open("/dev/null").unwrap();
        let folder = File::open("/").unwrap();
        let program = Program {
            path: c"/proc/self/exe",
            args: &[c"nobody"],
            standard: [null.as_fd(), null.as_fd(), null.as_fd()],
        };
        assert!(into_cgroup(&folder, &program).is_err());
    }
}
