//! The socket that programs of the host connect to.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

#[derive(Debug)]
pub(super) struct Listener {
    socket: UnixListener,
    /// What is given up to turn a program away when there is no descriptor left for it.
    spare: Option<OwnedFd>,
}

impl Listener {
    pub(super) fn new(socket: UnixListener) -> Self {
        let spare = socket.as_fd().try_clone_to_owned().ok();
        Self { socket, spare }
    }

    /// The next program, if one waits.
    ///
    /// # Errors
    /// The program has gone, or there is no descriptor left. Then it finds its connection closed: it
    /// would wait for ever, and so would this be ready.
    pub(super) fn accept(&mut self) -> io::Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => {
                if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
                    self.turn_away();
                }
                Err(error)
            }
        }
    }

    fn turn_away(&mut self) {
        drop(self.spare.take());
        drop(self.socket.accept());
        self.spare = self.socket.as_fd().try_clone_to_owned().ok();
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
