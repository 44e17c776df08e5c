//! The system calls for which no safe wrapper exists. All `unsafe` of the agent is here and below.
#![allow(unsafe_code)]

pub(crate) mod bpf;
pub(crate) mod partition;
pub(crate) mod privilege;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::libc;
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

mod ioctls {
    use nix::libc;

    nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);
    // linux/random.h: RNDADDENTROPY = _IOW('R', 0x03, int[2]), RNDRESEEDCRNG = _IO('R', 0x07).
    nix::ioctl_write_ptr_bad!(
        add_entropy,
        nix::request_code_write!(b'R', 0x03, 8),
        libc::c_int
    );
    nix::ioctl_none!(reseed, b'R', 0x07);
    nix::ioctl_write_ptr_bad!(set_interface_flags, libc::SIOCSIFFLAGS, libc::ifreq);
    // The kernel hands the flags over as an integer argument.
    nix::ioctl_write_int_bad!(open_pty_peer, libc::TIOCGPTPEER);
}

/// Sets the size of the terminal behind either end of a pty, in characters.
pub(crate) fn set_window_size(terminal: &impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the descriptor is open for the call and `size` is the struct TIOCSWINSZ reads.
    unsafe { ioctls::set_window_size(terminal.as_fd().as_raw_fd(), &size) }?;
    Ok(())
}

/// Opens the other end of a pty by its master, without any path.
pub(crate) fn open_pty_peer(master: &impl AsFd) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags by value and returns a new descriptor, which nothing
    // else owns.
    let peer =
        unsafe { OwnedFd::from_raw_fd(ioctls::open_pty_peer(master.as_fd().as_raw_fd(), flags)?) };
    Ok(peer)
}

/// Credits `bytes` to the kernel's entropy pool and makes the generator use them at once.
pub(crate) fn add_entropy(random: &File, bytes: &[u8]) -> io::Result<()> {
    // struct rand_pool_info: bits of entropy, bytes of data, data in words.
    let words = bytes.len().div_ceil(4);
    let mut info: Vec<libc::c_int> = Vec::with_capacity(words + 2);
    let length = libc::c_int::try_from(bytes.len()).map_err(io::Error::other)?;
    info.push(
        length
            .checked_mul(8)
            .ok_or_else(|| io::Error::other("too much entropy"))?,
    );
    info.push(length);
    for chunk in bytes.chunks(4) {
        let mut word = [0_u8; 4];
        for (to, from) in word.iter_mut().zip(chunk) {
            *to = *from;
        }
        info.push(libc::c_int::from_ne_bytes(word));
    }
    // SAFETY: `info` holds the two header words and `length` bytes of data, which is what the
    // kernel reads.
    unsafe { ioctls::add_entropy(random.as_raw_fd(), info.as_ptr()) }?;
    // SAFETY: takes no argument.
    unsafe { ioctls::reseed(random.as_raw_fd()) }?;
    Ok(())
}

/// Sets the loopback interface up; `socket` is any internet socket.
pub(crate) fn set_loopback_up(socket: &impl AsFd) -> io::Result<()> {
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(b"lo") {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    let flags =
        libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).map_err(io::Error::other)?;
    let request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    };
    // SAFETY: `request` is the struct SIOCSIFFLAGS reads, with its name terminated.
    unsafe { ioctls::set_interface_flags(socket.as_fd().as_raw_fd(), &request) }?;
    Ok(())
}

/// Takes over a stream socket that the parent process left open under this number.
///
/// # Errors
///
/// `fd` is not open.
pub(crate) fn inherited_socket(fd: RawFd) -> io::Result<UnixStream> {
    // SAFETY: only asks whether the number is open.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and the parent left it to this process alone.
    Ok(unsafe { UnixStream::from_raw_fd(fd) })
}

/// Takes ownership of a descriptor that a control message has just brought.
pub(crate) fn received(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel made the descriptor for this process while the message was received, and
    // the caller asks only once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Sends any signal that the kernel knows, real-time ones too, which nix has no names for.
pub(crate) fn kill(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: takes two integers.
    match unsafe { libc::kill(pid.as_raw(), signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Locks a mutex. What a panicking thread left behind is as good here as what any other did: the
/// agent's locks are held for single statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets the current runtime say when something can be read.
pub(crate) fn readable<T: AsRawFd + AsFd>(owner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: what is passed here owns its descriptor (an OwnedFd, or a type around one) and gives
    // the same number for as long as it lives.
    Ok(unsafe { AsyncFd::register_with_interest(owner, Interest::READABLE) }?)
}

/// Reaps one child that has ended, without waiting for any: its number, and its exit code or 128 +
/// the signal's number. (nix's `waitpid` fails for real-time signals, which would lose the exit.)
pub(crate) fn reap_any() -> io::Result<Option<(Pid, u32)>> {
    let mut status = 0;
    // SAFETY: `status` is where the kernel puts one int.
    match unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) } {
        0 => Ok(None),
        pid if pid > 0 => {
            let code = if libc::WIFSIGNALED(status) {
                128 + libc::WTERMSIG(status)
            } else {
                libc::WEXITSTATUS(status)
            };
            Ok(Some((Pid::from_raw(pid), code.unsigned_abs())))
        }
        _ => Err(io::Error::last_os_error()),
    }
}
