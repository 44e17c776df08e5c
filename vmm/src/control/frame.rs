//! Frames on the control socket: eight bytes of header, a JSON body, files beside it.
//!
//! The header is two little-endian words: the body's length in bytes and the number of files. The
//! files are attached (SCM_RIGHTS) to the header's first byte, so whoever has read a header holds
//! all its files. Both sides bound what they accept before they make room for it.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::cmsg_space;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

const HEADER: usize = 8;

/// The most files one frame can carry, which is Linux's limit (SCM_MAX_FD).
pub(super) const MAX_FILES: usize = 253;

/// What a side accepts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Bytes of body.
    pub(super) body: usize,
    /// Files per frame.
    pub(super) files: usize,
}

/// What the child accepts: a [`Boot`](super::message::Boot) with a long command line.
pub(super) const FROM_PARENT: Limits = Limits {
    body: 1 << 20,
    files: MAX_FILES,
};

/// What the parent accepts. The child never sends files.
pub(super) const FROM_CHILD: Limits = Limits {
    body: 64 << 10,
    files: 0,
};

/// A frame that can't be sent or accepted.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    #[error("Control socket")]
    Socket(#[source] io::Error),
    #[error("Control socket closed within a frame")]
    Cut,
    #[error("Frame of {length} bytes, at most {limit} expected")]
    Length { length: usize, limit: usize },
    #[error("Frame with {files} files, at most {limit} expected")]
    Files { files: usize, limit: usize },
    #[error("Frame carried more files than the {limit} expected")]
    UnexpectedFiles { limit: usize },
    #[error("Frame announced {announced} files and carried {carried}")]
    FileCount { announced: usize, carried: usize },
    #[error("Frame is no message")]
    Body(#[source] serde_json::Error),
}

/// Writes one frame.
pub(super) fn send<T: Serialize>(
    socket: &UnixStream,
    message: &T,
    files: &[BorrowedFd<'_>],
    limits: Limits,
) -> Result<(), FrameError> {
    if files.len() > limits.files {
        return Err(FrameError::Files {
            files: files.len(),
            limit: limits.files,
        });
    }
    let mut frame = vec![0; HEADER];
    serde_json::to_writer(&mut frame, message).map_err(FrameError::Body)?;
    let length = frame.len() - HEADER;
    if length > limits.body {
        return Err(FrameError::Length {
            length,
            limit: limits.body,
        });
    }
    // Both fit: they were compared with the limits.
    frame[..4].copy_from_slice(&(length as u32).to_le_bytes());
    frame[4..HEADER].copy_from_slice(&(files.len() as u32).to_le_bytes());

    let sent = if files.is_empty() {
        0
    } else {
        send_with_files(socket, &frame, files).map_err(FrameError::Socket)?
    };
    (&mut &*socket)
        .write_all(&frame[sent..])
        .map_err(FrameError::Socket)
}

/// Attaches the files to the frame's first bytes; returns how many bytes went with them.
fn send_with_files(
    socket: &UnixStream,
    frame: &[u8],
    files: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    loop {
        match sendmsg(
            socket,
            &[IoSlice::new(frame)],
            &mut ancillary,
            SendFlags::empty(),
        ) {
            Err(rustix::io::Errno::INTR) => {}
            sent => return Ok(sent?),
        }
    }
}

/// The files of a frame; nothing when there were some, and this process can hold no more.
pub(super) type Carried = Option<Vec<OwnedFd>>;

/// Reads one frame; nothing when the other side closed the socket between two.
pub(super) fn receive<T: DeserializeOwned>(
    socket: &UnixStream,
    limits: Limits,
) -> Result<Option<(T, Carried)>, FrameError> {
    let Some((header, files)) = receive_header(socket, limits)? else {
        return Ok(None);
    };
    let [l0, l1, l2, l3, f0, f1, f2, f3] = header;
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    let announced = u32::from_le_bytes([f0, f1, f2, f3]) as usize;
    if length > limits.body {
        return Err(FrameError::Length {
            length,
            limit: limits.body,
        });
    }
    let most = announced.max(files.as_ref().map_or(0, Vec::len));
    if most > limits.files {
        return Err(FrameError::Files {
            files: most,
            limit: limits.files,
        });
    }
    if let Some(files) = &files
        && files.len() != announced
    {
        return Err(FrameError::FileCount {
            announced,
            carried: files.len(),
        });
    }

    let mut body = vec![0; length];
    (&mut &*socket)
        .read_exact(&mut body)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => FrameError::Cut,
            _ => FrameError::Socket(error),
        })?;
    let message = serde_json::from_slice(&body).map_err(FrameError::Body)?;
    Ok(Some((message, files)))
}

type Header = ([u8; HEADER], Carried);

/// Reads a header and the files attached to it. A side that takes no files offers no room for them,
/// so that none becomes a descriptor.
fn receive_header(socket: &UnixStream, limits: Limits) -> Result<Option<Header>, FrameError> {
    let mut header = [0; HEADER];
    let mut files = Vec::new();
    let mut lost = false;
    let mut filled = 0;
    while filled < HEADER {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
        let mut ancillary = match limits.files {
            0 => RecvAncillaryBuffer::default(),
            _ => RecvAncillaryBuffer::new(&mut space),
        };
        let received = match recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut header[filled..])],
            &mut ancillary,
            RecvFlags::empty(),
        ) {
            Err(rustix::io::Errno::INTR) => continue,
            received => received.map_err(|errno| FrameError::Socket(errno.into()))?,
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        // There is room for as many as can be sent: what is missing has found no descriptor.
        if received.flags.contains(ReturnFlags::CTRUNC) {
            if limits.files < MAX_FILES {
                return Err(FrameError::UnexpectedFiles {
                    limit: limits.files,
                });
            }
            lost = true;
        }
        match received.bytes {
            0 if filled == 0 => return Ok(None),
            0 => return Err(FrameError::Cut),
            bytes => filled += bytes,
        }
    }
    // The flag of recvmsg that does this is not portable; the child, who alone takes files, never
    // forks.
    for file in &files {
        fcntl_setfd(file, FdFlags::CLOEXEC).map_err(|errno| FrameError::Socket(errno.into()))?;
    }
    Ok(Some((header, (!lost).then_some(files))))
}
