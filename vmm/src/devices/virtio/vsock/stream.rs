//! The host's side of a connection: a unix socket, its greeting, and what it has not taken yet.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{RecvFlags, recv};
use vm_memory::VolatileSlice;

use crate::devices::virtio::queue::Reader;
use crate::sys::vectored;

/// `CONNECT `, ten digits and a newline, with some room for leading zeroes.
const MAX_GREETING: usize = 32;

/// How far a host program has got with its greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// More of it has to come.
    Unfinished,
    /// It wants this port of the guest.
    Connect(u32),
    /// It is not one, or the program has gone.
    Bad,
}

#[derive(Debug)]
pub(super) struct Stream {
    socket: UnixStream,
    greeting: Vec<u8>,
    /// Bytes for the host that its socket has not taken: our answer to the greeting, then the
    /// guest's; of these at most the connection's credit.
    backlog: VecDeque<u8>,
    /// How many at the front of the backlog are ours.
    own: usize,
    /// The host takes no more; what the guest sends is thrown away.
    deaf: bool,
    /// The socket's writing side is to be closed, or has been.
    finishing: bool,
    finished: bool,
}

impl Stream {
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            greeting: Vec::new(),
            backlog: VecDeque::new(),
            own: 0,
            deaf: false,
            finishing: false,
            finished: false,
        })
    }

    /// Reads the greeting and no more, for what follows it is the guest's.
    pub(super) fn greet(&mut self) -> Greeting {
        let mut bytes = [0; MAX_GREETING];
        while self.greeting.len() < MAX_GREETING {
            let room = MAX_GREETING - self.greeting.len();
            match self.take_line(&mut bytes[..room]) {
                Ok([]) => return Greeting::Bad,
                Ok([line @ .., b'\n']) => {
                    self.greeting.extend(line);
                    return parse_greeting(&self.greeting);
                }
                Ok(part) => self.greeting.extend(part),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Greeting::Unfinished;
                }
                Err(_) => return Greeting::Bad,
            }
        }
        Greeting::Bad
    }

    /// What is there of a line and fits; nothing at the end.
    fn take_line<'a>(&mut self, bytes: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let seen = recv(&self.socket, &mut *bytes, RecvFlags::PEEK)?.0;
        let end = bytes[..seen].iter().position(|byte| *byte == b'\n');
        let line = &mut bytes[..end.map_or(seen, |end| end + 1)];
        // Nobody else reads from it.
        self.socket.read_exact(line)?;
        Ok(line)
    }

    /// Answers the greeting.
    pub(super) fn accepted(&mut self, host_port: u32) {
        let answer = format!("OK {host_port}\n");
        self.own += answer.len();
        self.backlog.extend(answer.as_bytes());
    }

    pub(super) fn read(&mut self, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        vectored::read_into(self.socket.as_fd(), slices)
    }

    /// Takes the rest of `payload` for the host; returns how many of the guest's bytes are done with.
    pub(super) fn write(&mut self, mut payload: Reader<'_>, len: u32) -> u32 {
        let mut left = u64::from(len);
        if !self.deaf && self.backlog.is_empty() {
            let written = match payload.slices(left) {
                Ok(slices) => vectored::write_from(self.socket.as_fd(), &slices),
                Err(error) => Err(io::Error::other(error)),
            };
            let written = self.outcome(written) as u64;
            // As many as the chain has.
            let _ = payload.skip(written);
            left -= written;
        }
        let done = u64::from(len) - left;
        if self.deaf {
            return len;
        }
        let mut chunk = [0; 4096];
        while left > 0 {
            let here = left.min(chunk.len() as u64) as usize;
            if payload.read_exact(&mut chunk[..here]).is_err() {
                // The chain was checked to have them and to lie in guest RAM.
                break;
            }
            self.backlog.extend(&chunk[..here]);
            left -= here as u64;
        }
        // At most `len`.
        done as u32
    }

    /// Writes what the socket takes of the backlog; returns how many of the guest's bytes are done
    /// with.
    pub(super) fn flush(&mut self) -> u32 {
        let mut done = 0;
        while !self.backlog.is_empty() {
            let written = self.socket.write(self.backlog.as_slices().0);
            let mut written = match self.outcome(written) {
                0 if self.deaf => self.backlog.len(),
                0 => break,
                written => written,
            };
            self.backlog.drain(..written);
            let own = written.min(self.own);
            self.own -= own;
            written -= own;
            done += written;
        }
        if self.finishing && !self.finished && self.backlog.is_empty() {
            self.finished = true;
            // A peer that has gone needs not be told.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        // At most the connection's credit.
        done as u32
    }

    /// Bytes written; notes a host that takes no more.
    fn outcome(&mut self, written: io::Result<usize>) -> usize {
        match written {
            Ok(written) => written,
            Err(error) => {
                let later = [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted];
                self.deaf |= !later.contains(&error.kind());
                0
            }
        }
    }

    /// Whether the host takes no more.
    pub(super) fn is_deaf(&self) -> bool {
        self.deaf
    }

    /// Whether the host's program has closed its socket, rather than one direction of it.
    pub(super) fn is_abandoned(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::empty())];
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
        poll(&mut fds, PollTimeout::ZERO).is_ok()
            && fds
                .iter()
                .all(|fd| fd.revents().is_some_and(|events| events.intersects(gone)))
    }

    /// Whether everything for the host has been taken.
    pub(super) fn is_flushed(&self) -> bool {
        self.backlog.is_empty()
    }

    /// The guest sends no more: the host is to read the end after the backlog.
    pub(super) fn finish(&mut self) {
        self.finishing = true;
    }

    /// The guest receives no more: the host's writes are to fail.
    pub(super) fn stop_reading(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Read);
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

pub(super) fn parse_greeting(line: &[u8]) -> Greeting {
    let port = line
        .strip_prefix(b"CONNECT ")
        .filter(|digits| digits.iter().all(u8::is_ascii_digit))
        .and_then(|digits| str::from_utf8(digits).ok()?.parse().ok());
    port.map_or(Greeting::Bad, Greeting::Connect)
}
