//! The device against a guest that behaves as Linux does, and against one that does not.

mod credit;
mod hostile;
mod restore;

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;

use proptest::prelude::*;
use tempfile::TempDir;

use super::connection::{BUFFER, Connection, Heard};
use super::metrics::Metrics;
use super::stream::{Greeting, parse_greeting};
use super::wire::{
    HEADER_LEN, HOST_CID, Header, Op, Refusal, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
    TYPE_STREAM,
};
use super::*;
use crate::devices::virtio::VirtioDevice;
use crate::testing::{Buffer, Guest, Rig, suite};

const CID: u32 = 7;
const PORT: u32 = 1024;

fn listener() -> (TempDir, UnixListener) {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("vsock")).unwrap();
    (dir, listener)
}

/// A guest's socket layer, on the driver model.
struct Linux {
    dir: TempDir,
    rig: Rig<Vsock>,
    metrics: Arc<Metrics>,
    lent: VecDeque<(u16, Buffer)>,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Linux {
    fn with(buffers: usize, len: u32) -> Self {
        let (dir, listener) = listener();
        let device = Vsock::new(VsockConfig { cid: CID, listener }).unwrap();
        let metrics = device.metrics();
        let mut rig = Rig::with(device, Guest::new(32 << 20), 64);
        rig.activate();
        let lent = VecDeque::new();
        let mut linux = Self {
            dir,
            rig,
            metrics,
            lent,
            buf_alloc: 256 << 10,
            fwd_cnt: 0,
        };
        linux.supply(buffers, len);
        linux
    }

    fn up() -> Self {
        Self::with(32, 4096)
    }

    fn supply(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            let buffer = self.rig.guest.room(len);
            self.lend(buffer);
        }
    }

    fn lend(&mut self, buffer: Buffer) {
        // Header and payload in descriptors of their own, as before Linux 6.2, or in one.
        let head = if buffer.len > 64 && self.lent.len().is_multiple_of(2) {
            let (header, payload) = buffer.split(HEADER_LEN as u32);
            self.rig.submit(RECEIVE, &[header, payload])
        } else {
            self.rig.submit(RECEIVE, &[buffer])
        };
        self.lent.push_back((head, buffer));
    }

    /// Lends one more buffer, from a fixed set.
    fn recycle(&mut self) {
        let addr = 16 << 20 | (u64::from(self.rig.queues[0].avail_index() % 128) << 12);
        self.lend(Buffer::writable(addr, 4096));
    }

    /// The next packet, which keeps its buffer.
    fn take(&mut self) -> Option<(Header, Vec<u8>)> {
        self.rig.run();
        loop {
            let used = self.rig.used(RECEIVE)?;
            let (head, buffer) = self.lent.pop_front().unwrap();
            assert_eq!(used.head, head);
            if used.written == 0 {
                continue;
            }
            let bytes = self.rig.guest.contents(buffer);
            let (header, payload) = bytes.split_first_chunk().unwrap();
            let header = Header::parse(header);
            assert_eq!(used.written as usize, HEADER_LEN + header.len as usize);
            return Some((header, payload[..header.len as usize].to_vec()));
        }
    }

    /// The next packet; its buffer goes back to the device.
    fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        let packet = self.take()?;
        let len = 4096;
        self.supply(1, len);
        Some(packet)
    }

    fn expect(&mut self, op: Op) -> Header {
        let (header, _) = self
            .next()
            .unwrap_or_else(|| panic!("no packet, {op:?} expected"));
        assert_eq!(header.op, op as u16, "{header:?}");
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, u64::from(CID)));
        header
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        let head = self.rig.guest.put(&header.encode());
        let mut buffers = vec![head];
        if !payload.is_empty() {
            buffers.push(self.rig.guest.put(payload));
        }
        let used = self.rig.exchange(TRANSMIT, &buffers);
        assert_eq!(used.written, 0);
    }

    fn header(&self, host_port: u32, op: Op) -> Header {
        Header {
            src_cid: u64::from(CID),
            dst_cid: HOST_CID,
            src_port: PORT,
            dst_port: host_port,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    fn say(&mut self, host_port: u32, op: Op) {
        self.send(self.header(host_port, op), &[]);
    }

    fn shut_down(&mut self, host_port: u32, flags: u32) {
        self.send(
            Header {
                flags,
                ..self.header(host_port, Op::Shutdown)
            },
            &[],
        );
    }

    fn data(&mut self, host_port: u32, payload: &[u8]) {
        let len = payload.len() as u32;
        self.send(
            Header {
                len,
                ..self.header(host_port, Op::Data)
            },
            payload,
        );
    }

    fn program(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("vsock")).unwrap()
    }

    /// A host program that is connected, and its port.
    fn connected(&mut self) -> (UnixStream, u32) {
        let mut program = self.program();
        program
            .write_all(format!("CONNECT {PORT}\n").as_bytes())
            .unwrap();
        let request = self.expect(Op::Request);
        assert_eq!(request.dst_port, PORT);
        assert_eq!(request.buf_alloc, BUFFER);
        self.say(request.src_port, Op::Response);
        let expected = format!("OK {}\n", request.src_port);
        let mut answer = vec![0; expected.len()];
        program.read_exact(&mut answer).unwrap();
        assert_eq!(answer, expected.as_bytes());
        (program, request.src_port)
    }

    /// Data packets of the host until there is no more.
    fn received(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some((header, payload)) = self.next() {
            assert_eq!(header.op, Op::Data as u16, "{header:?}");
            all.extend(payload);
        }
        all
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect()
}

fn end_of(program: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    program.read_to_end(&mut all).unwrap();
    all
}

fn is_silent(program: &UnixStream) -> bool {
    program.set_nonblocking(true).unwrap();
    let read = (&*program).read(&mut [0]);
    program.set_nonblocking(false).unwrap();
    read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

#[test]
fn bytes_pass_both_ways_once_the_guest_has_accepted() {
    let mut linux = Linux::up();
    let (mut program, port) = linux.connected();
    program.write_all(b"ping").unwrap();
    let (header, payload) = linux.next().unwrap();
    assert_eq!(
        (header.op, payload.as_slice()),
        (Op::Data as u16, &b"ping"[..])
    );
    linux.data(port, b"pong");
    let mut answer = [0; 4];
    program.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"pong");
}

#[test]
fn a_refused_program_reads_the_end() {
    let mut linux = Linux::up();
    let mut program = linux.program();
    program.write_all(b"CONNECT 9\n").unwrap();
    let request = linux.expect(Op::Request);
    linux.send(
        Header {
            src_port: 9,
            ..linux.header(request.src_port, Op::Reset)
        },
        &[],
    );
    assert_eq!(end_of(&mut program), b"");
    assert_eq!(linux.metrics.refused.get(), 1);
    assert!(linux.next().is_none(), "a reset is not answered");
}

#[test]
fn programs_that_come_before_the_driver_wait() {
    let (dir, listener) = listener();
    let device = Vsock::new(VsockConfig { cid: CID, listener }).unwrap();
    let mut rig = Rig::with(device, Guest::new(32 << 20), 64);
    let mut program = UnixStream::connect(dir.path().join("vsock")).unwrap();
    program.write_all(b"CONNECT 1024\n").unwrap();
    rig.run();
    let metrics = rig.device.metrics();
    assert_eq!(metrics.accepted.get(), 0);
    rig.activate();
    let lent = VecDeque::new();
    let mut linux = Linux {
        dir,
        rig,
        metrics,
        lent,
        buf_alloc: 1 << 16,
        fwd_cnt: 0,
    };
    // No buffer yet: the request waits for one.
    linux.rig.run();
    linux.supply(4, 4096);
    let request = linux.expect(Op::Request);
    linux.say(request.src_port, Op::Response);
    let mut ok = [0; 3];
    program.read_exact(&mut ok).unwrap();
    assert_eq!(&ok, b"OK ");
}

#[test]
fn bad_greetings_end_the_connection() {
    let mut linux = Linux::up();
    for greeting in [
        "\n",
        "connect 1\n",
        "CONNECT\n",
        "CONNECT -1\n",
        "CONNECT 4294967296\n",
        "CONNECT +1\n",
    ] {
        let mut program = linux.program();
        program.write_all(greeting.as_bytes()).unwrap();
        linux.rig.run();
        assert_eq!(end_of(&mut program), b"", "{greeting}");
    }
    let mut endless = linux.program();
    endless.write_all(&[b'C'; 33]).unwrap();
    linux.rig.run();
    // One byte too many was left unread: that may show as a reset.
    assert!(endless.read(&mut [0]).map_or_else(
        |error| error.kind() == ErrorKind::ConnectionReset,
        |n| n == 0
    ));
    drop(linux.program());
    linux.rig.run();
    assert_eq!(linux.metrics.bad_greetings.get(), 8);
    assert!(linux.next().is_none());
}

#[test]
fn a_greeting_in_pieces_and_data_right_behind_it_are_understood() {
    let mut linux = Linux::up();
    let mut program = linux.program();
    program.write_all(b"CONN").unwrap();
    linux.rig.run();
    program.write_all(b"ECT 1024\nhello").unwrap();
    let request = linux.expect(Op::Request);
    assert!(linux.next().is_none());
    linux.say(request.src_port, Op::Response);
    assert_eq!(linux.received(), b"hello");
}

#[test]
fn each_direction_ends_on_its_own() {
    let mut linux = Linux::up();
    let (mut program, port) = linux.connected();
    program.write_all(b"request").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    assert_eq!(linux.next().unwrap().1, b"request");
    assert_eq!(linux.expect(Op::Shutdown).flags, SHUTDOWN_SEND);
    linux.data(port, b"answer");
    linux.shut_down(port, SHUTDOWN_SEND);
    assert_eq!(end_of(&mut program), b"answer");
    // Linux sends both flags when the socket is closed.
    linux.shut_down(port, SHUTDOWN_BOTH);
    linux.expect(Op::Reset);
    linux.data(port, b"late");
    linux.expect(Op::Reset);
}

#[test]
fn a_guest_that_receives_no_more_fails_the_programs_writes() {
    let mut linux = Linux::up();
    let (mut program, port) = linux.connected();
    linux.shut_down(port, SHUTDOWN_RECEIVE);
    let error = program.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    linux.data(port, b"still sending");
    let mut seen = [0; 13];
    program.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"still sending");
}

#[test]
fn a_program_that_closes_is_told_to_the_guest_behind_its_data() {
    let mut linux = Linux::up();
    let (mut program, port) = linux.connected();
    program.write_all(b"bye").unwrap();
    drop(program);
    assert_eq!(linux.next().unwrap().1, b"bye");
    assert_eq!(linux.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    linux.say(port, Op::Reset);
    assert!(linux.next().is_none());
    linux.say(port, Op::CreditRequest);
    linux.expect(Op::Reset);
}

#[test]
fn a_program_that_gives_up_while_connecting_is_told_to_the_guest() {
    let mut linux = Linux::up();
    let mut program = linux.program();
    program.write_all(b"CONNECT 1024\n").unwrap();
    let request = linux.expect(Op::Request);
    drop(program);
    assert_eq!(linux.expect(Op::Reset).src_port, request.src_port);
}

#[test]
fn what_the_guest_sent_before_a_reset_is_delivered() {
    let mut linux = Linux::up();
    let (mut program, port) = linux.connected();
    let data = pattern(100_000);
    for chunk in data.chunks(10_000) {
        linux.data(port, chunk);
    }
    linux.say(port, Op::Reset);
    let reader = thread::spawn(move || end_of(&mut program));
    linux.rig.run_until(|_| reader.is_finished());
    assert!(reader.join().unwrap() == data);
}

#[test]
fn messages_go_before_data() {
    let mut linux = Linux::with(1, 4096);
    let (mut program, port) = linux.connected();
    // One buffer has come back; the data takes it.
    program.write_all(&pattern(50_000)).unwrap();
    linux.rig.run();
    linux.send(linux.header(5, Op::Request), &[]);
    linux.say(port, Op::CreditRequest);
    let ops: Vec<_> = (0..4)
        .map(|_| {
            let (header, _) = linux.take().unwrap();
            linux.recycle();
            header.op
        })
        .collect();
    let expected = [Op::Data, Op::Reset, Op::CreditUpdate, Op::Data];
    assert_eq!(ops, expected.map(|op| op as u16));
}

#[test]
fn a_reset_ends_all_connections_and_another_start_takes_new_ones() {
    let mut linux = Linux::up();
    let (mut program, _) = linux.connected();
    linux.rig.device.reset();
    assert_eq!(end_of(&mut program), b"");
    linux.rig.activate();
    linux.lent.clear();
    linux.supply(8, 4096);
    linux.connected();
}

#[test]
fn connections_beyond_the_limit_wait_for_others_to_end() {
    let linux = Linux::up();
    let mut programs: Vec<_> = (0..MAX_CONNECTIONS)
        .map(|_| {
            let program = linux.program();
            linux.rig.run();
            program
        })
        .collect();
    programs.push(linux.program());
    linux.rig.run();
    assert_eq!(linux.metrics.accepted.get(), MAX_CONNECTIONS as u64);
    programs.remove(0);
    linux.rig.run();
    assert_eq!(linux.metrics.accepted.get(), MAX_CONNECTIONS as u64 + 1);
}

#[test]
fn reserved_context_ids_are_refused() {
    for cid in [0, 1, 2, u32::MAX] {
        let (_dir, listener) = listener();
        let made = Vsock::new(VsockConfig { cid, listener });
        assert!(matches!(made, Err(VsockError::Cid { .. })));
    }
}

#[test]
fn the_guest_reads_its_context_id() {
    assert_eq!(Linux::up().rig.config::<8>(0), u64::from(CID).to_le_bytes());
}
