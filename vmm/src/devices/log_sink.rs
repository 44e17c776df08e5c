//! Where a serial port's output goes.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Bytes kept until the line ends: one system call for a line instead of one for a byte.
const LINE: usize = 256;

/// Where the log goes. A reader that does not keep up loses lines; it never stops the vCPU.
pub(super) struct LogSink {
    /// Without one, what is written is gone.
    file: Option<File>,
    line: Vec<u8>,
    lost_some: bool,
}

impl LogSink {
    pub(super) fn new(sink: Option<OwnedFd>) -> Self {
        Self {
            file: sink.map(File::from),
            line: Vec::with_capacity(LINE),
            lost_some: false,
        }
    }

    fn send(&mut self) {
        let Some(file) = &mut self.file else {
            self.line.clear();
            return;
        };
        // A pipe that polls writable takes a page at least; files always do.
        let mut poll_fd = [PollFd::new(file.as_fd(), PollFlags::POLLOUT)];
        let ready = poll(&mut poll_fd, PollTimeout::ZERO).is_ok_and(|count| count > 0)
            && poll_fd[0]
                .revents()
                .is_some_and(|events| events.contains(PollFlags::POLLOUT));
        if !ready || file.write_all(&self.line).is_err() {
            if !self.lost_some {
                tracing::warn!("Serial log loses output: its reader does not keep up");
            }
            self.lost_some = true;
        }
        self.line.clear();
    }
}

impl Write for LogSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.line.push(byte);
            if byte == b'\n' || self.line.len() == LINE {
                self.send();
            }
        }
        Ok(bytes.len())
    }

    /// The UART flushes after each byte, which is what the line buffer is there to avoid.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LogSink {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            self.send();
        }
    }
}
