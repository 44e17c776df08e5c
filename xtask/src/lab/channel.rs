//! Frames between `xtask` and the lab, over one virtio-serial port.
//!
//! The port is a byte stream that outlives sessions: a host that dies may leave half a frame
//! behind. So each frame begins with a mark to find the next one by, and a session begins with
//! `Hello` and a number that `Ready` repeats; what comes before that is of an earlier session.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// The name of the virtio-serial port.
pub(crate) const PORT: &str = "supermachine.lab";

const MARK: [u8; 4] = *b"\xf5SmL";
const HEADER: usize = 9;
/// Larger frames than this are damage, not data.
const LIMIT: usize = 1 << 20;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Host: a session begins; end what runs. Payload: the session's number.
    Hello = 1,
    /// Lab: nothing runs, the exchange disk is free. Payload: the number of `Hello`.
    Ready = 2,
    /// Host: run this. Payload: a [`Request`] as JSON.
    Run = 3,
    /// Host: bytes for standard input; empty at its end.
    Stdin = 4,
    /// Host: end the command now.
    Kill = 5,
    /// Lab: bytes of standard output.
    Stdout = 6,
    /// Lab: bytes of standard error.
    Stderr = 7,
    /// Lab: bytes of a tar archive of /out.
    Out = 8,
    /// Lab: the session is over. Payload: the exit status, little-endian i32.
    Exit = 9,
    /// Lab: nothing; written to learn that a host is there.
    Idle = 10,
    /// Lab: everything is in place, the command starts now.
    Started = 11,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::{Exit, Hello, Idle, Kill, Out, Ready, Run, Started, Stderr, Stdin, Stdout};
        [
            Hello, Ready, Run, Stdin, Kill, Stdout, Stderr, Out, Exit, Idle, Started,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

/// What the host asks the lab to run.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    /// Rows and columns, if the command is to have a terminal.
    pub(crate) tty: Option<(u16, u16)>,
    /// Folders on the exchange disk to show under /mnt.
    pub(crate) mounts: Vec<String>,
    /// Install what the exchange disk has under build/.
    pub(crate) install: bool,
    /// Send /out back.
    pub(crate) out: bool,
}

/// Writes one frame with a single write where the stream takes it.
pub(crate) fn send(stream: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= LIMIT)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "frame too large"))?;
    let mut frame = Vec::with_capacity(HEADER + payload.len());
    frame.extend_from_slice(&MARK);
    frame.push(kind as u8);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    stream.write_all(&frame)?;
    stream.flush()
}

/// Cuts a stream into frames, skipping to the next mark where it doesn't parse.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    held: Vec<u8>,
}

impl Frames {
    /// Reads until a whole frame is there. `None`: the stream's other side is gone.
    pub(crate) fn next(&mut self, stream: &mut impl Read) -> io::Result<Option<(Kind, Vec<u8>)>> {
        let mut chunk = [0; 64 * 1024];
        loop {
            if let Some(frame) = self.take() {
                return Ok(Some(frame));
            }
            match stream.read(&mut chunk) {
                Ok(0) => {
                    self.held.clear();
                    return Ok(None);
                }
                Ok(count) => self
                    .held
                    .extend_from_slice(chunk.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn take(&mut self) -> Option<(Kind, Vec<u8>)> {
        loop {
            self.skip_to_mark();
            let header: &[u8; HEADER] = self.held.first_chunk()?;
            let [_, _, _, _, kind, length @ ..] = *header;
            let length = u32::from_le_bytes(length) as usize;
            let Some(kind) = Kind::from_byte(kind).filter(|_| length <= LIMIT) else {
                self.held.drain(..1);
                continue;
            };
            let payload = self.held.get(HEADER..HEADER + length)?.to_vec();
            self.held.drain(..HEADER + length);
            return Some((kind, payload));
        }
    }

    fn skip_to_mark(&mut self) {
        let mark = self
            .held
            .windows(MARK.len())
            .position(|window| window == MARK);
        let keep = mark.unwrap_or_else(|| {
            // A mark may be cut by the end of what has been read.
            let cut = (1..MARK.len())
                .rev()
                .find(|n| self.held.ends_with(&MARK[..*n]));
            self.held.len() - cut.unwrap_or(0)
        });
        self.held.drain(..keep);
    }
}

#[cfg(test)]
mod tests {
    use super::{Frames, Kind, send};

    fn all(bytes: &[u8]) -> Vec<(Kind, Vec<u8>)> {
        let (mut frames, mut stream, mut found) = (Frames::default(), bytes, Vec::new());
        while let Some(frame) = frames.next(&mut stream).unwrap() {
            found.push(frame);
        }
        found
    }

    #[test]
    fn frames_survive_the_trip() {
        let mut bytes = Vec::new();
        send(&mut bytes, Kind::Stdout, b"abc").unwrap();
        send(&mut bytes, Kind::Exit, &0_i32.to_le_bytes()).unwrap();
        assert_eq!(
            all(&bytes),
            [(Kind::Stdout, b"abc".to_vec()), (Kind::Exit, vec![0; 4])]
        );
    }

    #[test]
    fn remains_of_a_dead_session_are_skipped() {
        let mut frame = Vec::new();
        send(&mut frame, Kind::Ready, b"7").unwrap();
        let mut bytes = b"\xf5Smgarbage\xf5SmL\xffxxxx\xf5S".to_vec();
        bytes.extend_from_slice(&frame);
        assert_eq!(all(&bytes), [(Kind::Ready, b"7".to_vec())]);
    }
}
