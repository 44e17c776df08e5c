//! The device against a guest that behaves as Linux does, and against one that does not.

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
fn ten_megabytes_to_the_guest_are_split_and_wait_for_credit() {
    let mut linux = Linux::with(32, 4096);
    linux.buf_alloc = 64 << 10;
    let (mut program, port) = linux.connected();
    let data = pattern(10_000_000);
    let copy = data.clone();
    let source = thread::spawn(move || {
        program.write_all(&copy).unwrap();
        program
    });
    let mut seen = Vec::new();
    let mut asked = 0;
    while seen.len() < data.len() {
        linux.rig.run_until(|rig| {
            rig.queues[usize::from(RECEIVE)].used_index()
                != rig.queues[usize::from(RECEIVE)]
                    .avail_index()
                    .wrapping_sub(linux.lent.len() as u16)
        });
        let (header, payload) = linux.take().unwrap();
        let buffer = linux.rig.guest.alloc(0, 4096);
        assert!(buffer < linux.rig.guest.end());
        match header.op {
            op if op == Op::Data as u16 => {
                assert!(!payload.is_empty() && payload.len() <= 4096 - HEADER_LEN);
                seen.extend(payload);
                assert!(
                    seen.len() as u32 - linux.fwd_cnt <= linux.buf_alloc,
                    "beyond the credit"
                );
            }
            op => {
                assert_eq!(op, Op::CreditRequest as u16);
                asked += 1;
                linux.fwd_cnt = seen.len() as u32;
                linux.say(port, Op::CreditUpdate);
            }
        }
        linux.recycle();
    }
    drop(source.join().unwrap());
    assert!(seen == data);
    assert!(asked > 100);
}

impl Linux {
    /// Lends one more buffer, from a fixed set.
    fn recycle(&mut self) {
        let addr = 16 << 20 | (u64::from(self.rig.queues[0].avail_index() % 128) << 12);
        self.lend(Buffer::writable(addr, 4096));
    }
}

#[test]
fn ten_megabytes_to_the_host_are_kept_within_the_credit() {
    let mut linux = Linux::up();
    let (mut program, port) = linux.connected();
    let sink = thread::spawn(move || end_of(&mut program));
    let data = pattern(10_000_000);
    let (mut sent, mut taken) = (0_u32, 0_u32);
    let addr = linux.rig.guest.alloc(16 << 10, 4096);
    let head = linux.rig.guest.alloc(64, 64);
    while (sent as usize) < data.len() {
        let room = BUFFER - sent.wrapping_sub(taken);
        let len = room.min(16 << 10).min(data.len() as u32 - sent);
        if len > 0 {
            let payload = &data[sent as usize..(sent + len) as usize];
            linux.rig.guest.write(addr, payload);
            let header = Header {
                len,
                ..linux.header(port, Op::Data)
            };
            linux.rig.guest.write(head, &header.encode());
            let buffers = [Buffer::readable(head, 44), Buffer::readable(addr, len)];
            linux.rig.exchange(TRANSMIT, &buffers);
            sent += len;
        } else {
            // Only the host's reading brings new credit.
            let before = linux.rig.queues[0].used_index();
            linux
                .rig
                .run_until(|rig| rig.queues[0].used_index() != before);
        }
        while let Some((header, _)) = linux.take() {
            assert_eq!(header.op, Op::CreditUpdate as u16);
            taken = header.fwd_cnt;
            linux.recycle();
        }
    }
    linux.shut_down(port, SHUTDOWN_BOTH);
    let is_reset = |(header, _): &(Header, Vec<u8>)| header.op == Op::Reset as u16;
    while !std::iter::from_fn(|| linux.take()).any(|packet| is_reset(&packet)) {
        let before = linux.rig.queues[0].used_index();
        linux
            .rig
            .run_until(|rig| rig.queues[0].used_index() != before);
    }
    assert!(sink.join().unwrap() == data);
    assert_eq!(linux.metrics.guest_bytes.get(), data.len() as u64);
    assert_eq!(linux.metrics.violations.get(), 0);
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
fn a_request_for_credit_is_answered() {
    let mut linux = Linux::up();
    let (_program, port) = linux.connected();
    linux.data(port, &[0; 100]);
    linux.say(port, Op::CreditRequest);
    let update = linux.expect(Op::CreditUpdate);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (BUFFER, 100));
}

#[test]
fn whatever_breaks_the_rules_ends_its_connection_only() {
    let mut linux = Linux::up();
    let (mut good, good_port) = linux.connected();
    type Misdeed = fn(&mut Linux, u32);
    let misdeeds: [Misdeed; 6] = [
        // More than the credit.
        |linux, port| {
            for _ in 0..40 {
                linux.data(port, &[0; 10_000]);
            }
        },
        // More than the packet has.
        |linux, port| {
            let header = Header {
                len: 100,
                ..linux.header(port, Op::Data)
            };
            linux.send(header, &[0; 50]);
        },
        |linux, port| linux.say(port, Op::Response),
        |linux, port| linux.say(port, Op::Request),
        |linux, port| {
            let header = Header {
                op: 99,
                ..linux.header(port, Op::Data)
            };
            linux.send(header, &[]);
        },
        // Data after its end.
        |linux, port| {
            linux.shut_down(port, SHUTDOWN_SEND);
            linux.data(port, &[1]);
        },
    ];
    for (number, misdeed) in misdeeds.into_iter().enumerate() {
        let (program, port) = linux.connected();
        misdeed(&mut linux, port);
        let reset =
            std::iter::from_fn(|| linux.next()).find(|(header, _)| header.op == Op::Reset as u16);
        assert_eq!(
            reset
                .unwrap_or_else(|| panic!("misdeed {number}"))
                .0
                .src_port,
            port
        );
        assert_eq!(linux.metrics.violations.get(), number as u64 + 1);
        while linux.next().is_some() {}
        drop(program);
    }
    linux.data(good_port, b"fine");
    let mut seen = [0; 4];
    good.read_exact(&mut seen).unwrap();
    assert_eq!(linux.rig.faults.count(), 0);
}

#[test]
fn packets_for_nobody_are_reset_and_forged_ones_ignored() {
    let mut linux = Linux::up();
    let stranger = linux.header(5, Op::Request);
    linux.send(stranger, &[]);
    let reset = linux.expect(Op::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (5, PORT));
    for header in [
        Header {
            kind: 2,
            ..stranger
        },
        Header {
            dst_cid: 1,
            ..stranger
        },
        Header { op: 0, ..stranger },
    ] {
        linux.send(header, &[]);
        let (reset, _) = linux.next().unwrap();
        assert_eq!(
            (reset.op, reset.kind, reset.src_cid),
            (Op::Reset as u16, header.kind, header.dst_cid)
        );
    }
    linux.send(
        Header {
            src_cid: 99,
            ..stranger
        },
        &[],
    );
    linux.say(5, Op::Reset);
    let short = linux.rig.guest.put(&[0; HEADER_LEN - 1]);
    linux.rig.exchange(TRANSMIT, &[short]);
    assert!(linux.next().is_none());
    assert_eq!(linux.metrics.packets_refused.get(), 6);

    // The right port of the host from a wrong one of the guest.
    let (program, port) = linux.connected();
    linux.send(
        Header {
            src_port: 1,
            ..linux.header(port, Op::Reset)
        },
        &[],
    );
    assert!(is_silent(&program));
}

#[test]
fn a_guest_that_takes_no_resets_is_heard_no_more_until_it_does() {
    let mut linux = Linux::with(0, 0);
    let request = linux.rig.guest.put(&linux.header(5, Op::Request).encode());
    for _ in 0..300 {
        if linux.rig.queues[1].lent() < 60 {
            linux.rig.submit(TRANSMIT, &[request]);
        }
        while linux.rig.used(TRANSMIT).is_some() {}
    }
    let heard = linux.metrics.packets_received.get();
    assert!(heard <= 64, "{heard} resets are queued");
    assert!(linux.rig.queues[1].lent() > 0);
    while linux.metrics.resets_sent.get() < linux.metrics.packets_refused.get() {
        linux.recycle();
        linux.take().unwrap();
    }
    while linux.rig.used(TRANSMIT).is_some() {}
    assert_eq!(linux.rig.queues[1].lent(), 0);
    assert!(linux.metrics.resets_sent.get() > heard);
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
fn useless_buffers_are_given_back_and_counted() {
    let mut linux = Linux::with(3, HEADER_LEN as u32 - 1);
    let mut program = linux.program();
    program.write_all(b"CONNECT 1024\n").unwrap();
    assert!(linux.take().is_none());
    assert_eq!(linux.metrics.bad_buffers.get(), 3);
    linux.supply(1, HEADER_LEN as u32);
    let request = linux.take().unwrap().0;
    linux.say(request.src_port, Op::Response);
    program.write_all(b"data").unwrap();
    linux.supply(2, HEADER_LEN as u32);
    assert!(linux.take().is_none());
    assert_eq!(linux.metrics.bad_buffers.get(), 5);
    linux.supply(1, 4096);
    assert_eq!(linux.take().unwrap().1, b"data");
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

/// A connection with a guest that has nothing but two buffers.
fn prove(rig: &mut Rig<Vsock>, dir: &TempDir) {
    let connect = || -> io::Result<UnixStream> {
        let mut program = UnixStream::connect(dir.path().join("vsock"))?;
        program.write_all(b"CONNECT 1024\n")?;
        Ok(program)
    };
    let mut program = connect().unwrap();
    rig.run();
    let buffer = rig.guest.room(4096);
    let used = rig.exchange(RECEIVE, &[buffer]);
    assert_eq!(used.written as usize, HEADER_LEN);
    let contents = rig.guest.contents(buffer);
    let request = Header::parse(contents.first_chunk().unwrap());
    assert_eq!(request.op, Op::Request as u16);
    let accept = Header {
        src_cid: u64::from(CID),
        dst_cid: HOST_CID,
        src_port: 1024,
        dst_port: request.src_port,
        kind: TYPE_STREAM,
        op: Op::Response as u16,
        buf_alloc: 4096,
        ..Header::default()
    };
    let packet = rig.guest.put(&accept.encode());
    rig.exchange(TRANSMIT, &[packet]);
    let mut answer = [0; 3];
    program.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"OK ");
    let reset = Header {
        op: Op::Reset as u16,
        ..accept
    };
    let packet = rig.guest.put(&reset.encode());
    rig.exchange(TRANSMIT, &[packet]);
}

#[test]
fn generic_suite() {
    let (dir, listener) = listener();
    let make = || {
        let listener = listener.try_clone().unwrap();
        Vsock::new(VsockConfig { cid: CID, listener }).unwrap()
    };
    suite::run(make, |rig| prove(rig, &dir));
}

fn any_header() -> impl Strategy<Value = Header> {
    let op = prop_oneof![8 => 0..9_u16, 1 => any::<u16>()];
    let amount = prop_oneof![3 => 0..5000_u32, 1 => any::<u32>()];
    (
        op,
        0..4_u32,
        amount.clone(),
        amount.clone(),
        amount,
        0..40_u8,
    )
        .prop_map(|(op, flags, len, buf_alloc, fwd_cnt, odd)| Header {
            src_cid: u64::from(CID) + u64::from(odd == 1),
            dst_cid: HOST_CID + u64::from(odd == 2),
            src_port: PORT,
            dst_port: 0,
            len,
            kind: TYPE_STREAM + u16::from(odd == 3),
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn survives_hostile_drivers(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let (dir, listener) = listener();
        let mut early = UnixStream::connect(dir.path().join("vsock")).unwrap();
        early.write_all(b"CONNECT 1\n").unwrap();
        drop(early);
        let device = Vsock::new(VsockConfig { cid: CID, listener }).unwrap();
        suite::survives(device, &bytes, |rig| prove(rig, &dir));
    }

    #[test]
    fn any_packets_leave_the_device_working(
        steps in prop::collection::vec((any_header(), 0..4_usize, 0..8_u8), 0..80)
    ) {
        let mut linux = Linux::up();
        let mut programs: Vec<_> = (0..3).map(|_| linux.connected()).collect();
        for (header, target, action) in steps {
            let port = programs.get(target).map_or(77, |(_, port)| *port);
            match action {
                0 => if let Some((program, _)) = programs.get(target) {
                    program.set_nonblocking(true).unwrap();
                    let _ = (&*program).write(&[1; 3000]);
                },
                1 => if let Some((program, _)) = programs.get(target) {
                    program.set_nonblocking(true).unwrap();
                    let _ = (&*program).read(&mut [0; 3000]);
                },
                2 if programs.len() > target => { programs.remove(target); }
                _ => {
                    let len = header.len.min(5000) as usize;
                    linux.send(Header { dst_port: port, ..header }, &vec![0; len]);
                }
            }
            while linux.next().is_some() {}
        }
        prop_assert_eq!(linux.rig.faults.count(), 0);
        drop(programs);
        while linux.next().is_some() {}
        let (mut program, port) = linux.connected();
        linux.data(port, b"well");
        let mut seen = [0; 4];
        program.read_exact(&mut seen).unwrap();
        prop_assert_eq!(&seen, b"well");
    }

    #[test]
    fn headers_survive_the_wire(header in any_header()) {
        prop_assert_eq!(Header::parse(&header.encode()), header);
    }

    #[test]
    fn any_bytes_are_a_packet_or_refused(bytes in prop::array::uniform32(any::<u8>()), more in prop::array::uniform12(any::<u8>()), payload in 0..10_000_u64) {
        let mut whole = [0; HEADER_LEN];
        whole[..32].copy_from_slice(&bytes);
        whole[32..].copy_from_slice(&more);
        let header = Header::parse(&whole);
        prop_assert_eq!(header.encode(), whole);
        match header.check(CID, payload) {
            Ok(op) => prop_assert_eq!(op as u16, header.op),
            Err(Refusal::Short) => prop_assert!(u64::from(header.len) > payload),
            Err(_) => {}
        }
    }

    /// Whatever the guest claims, it gets no more than its credit and sends no more than ours.
    #[test]
    fn credit_holds(steps in prop::collection::vec((any_header(), any::<bool>()), 0..100)) {
        let mut connection = Connection::new(CID, 1, PORT);
        connection.next_message();
        connection.hear(Op::Response, &Header { buf_alloc: 1000, ..Header::default() });
        let (mut received, mut forwarded) = (0_u64, 0_u64);
        for (header, forward) in steps {
            if let Heard::Data(len) = connection.hear(Op::Data, &header) {
                received += u64::from(len);
            }
            prop_assert!(received - forwarded <= u64::from(BUFFER));
            prop_assert!(connection.credit() <= header.buf_alloc);
            let credit = connection.credit();
            connection.data(credit.min(500));
            prop_assert!(connection.credit() <= credit);
            if forward {
                connection.forward((received - forwarded) as u32);
                forwarded = received;
            }
            while connection.next_message().is_some() {}
        }
    }

    #[test]
    fn any_greeting_is_understood_or_bad(line in prop::collection::vec(any::<u8>(), 0..40)) {
        prop_assert!(parse_greeting(&line) != Greeting::Unfinished);
    }

    #[test]
    fn greetings_with_a_port_are_understood(port: u32) {
        prop_assert_eq!(parse_greeting(format!("CONNECT {port}").as_bytes()), Greeting::Connect(port));
    }
}
