//! The descriptors attached to a port. Anything goes: FIFO, pipe, socket, terminal, file, `/dev/null`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::sys::vectored;

/// What a read brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    Blocked,
    /// Nothing ever again.
    End,
}

/// Where the guest's input comes from.
#[derive(Debug)]
pub(super) struct Input {
    fd: OwnedFd,
    /// A read is worth trying. A FIFO nobody has opened for writing yet reads as ended, so the first
    /// read waits until the poller has something to say.
    pub(super) ready: bool,
    finishing: bool,
}

impl Input {
    pub(super) fn new(fd: OwnedFd) -> Self {
        unblock(&fd);
        Self {
            fd,
            ready: false,
            finishing: false,
        }
    }

    /// From now on, nothing to read is the end.
    pub(super) fn finish(&mut self) {
        self.finishing = true;
        self.ready = true;
    }

    pub(super) fn read<B: BitmapSlice>(&mut self, slices: &[VolatileSlice<'_, B>]) -> Taken {
        match vectored::read_into(self.fd.as_fd(), slices) {
            Ok(0) => Taken::End,
            Ok(bytes) => Taken::Bytes(bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if self.finishing {
                    return Taken::End;
                }
                self.ready = false;
                Taken::Blocked
            }
            Err(error) => {
                // A terminal whose other side is closed answers EIO.
                tracing::debug!(%error, "Console input ends with an error");
                Taken::End
            }
        }
    }
}

impl AsFd for Input {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What a write did.
#[derive(Debug)]
pub(super) enum Given {
    /// So many bytes were taken.
    Bytes(usize),
    /// None, for now.
    Blocked,
    /// None, and there is no use in trying again.
    Failed(io::Error),
}

/// Where the guest's output goes.
#[derive(Debug)]
pub(super) struct Output {
    fd: OwnedFd,
    /// The last write would have blocked.
    pub(super) blocked: bool,
}

impl Output {
    pub(super) fn new(fd: OwnedFd) -> Self {
        unblock(&fd);
        Self { fd, blocked: false }
    }

    pub(super) fn write<B: BitmapSlice>(&mut self, slices: &[VolatileSlice<'_, B>]) -> Given {
        match vectored::write_from(self.fd.as_fd(), slices) {
            Ok(bytes) => Given::Bytes(bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.blocked = true;
                Given::Blocked
            }
            Err(error) => Given::Failed(error),
        }
    }
}

impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Makes reads and writes answer instead of waiting. What can't be changed (a descriptor opened with
/// O_PATH, say) fails at its first use instead.
fn unblock(fd: &OwnedFd) {
    let changed = fcntl(fd, FcntlArg::F_GETFL)
        .map(OFlag::from_bits_retain)
        .and_then(|flags| fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)));
    if let Err(error) = changed {
        tracing::warn!(%error, "Console port's descriptor stays blocking");
    }
}
