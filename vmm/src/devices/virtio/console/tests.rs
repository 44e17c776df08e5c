//! The console against a driver that behaves as Linux does, and against one that does not.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Seek, Write, pipe};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use super::wire::{FromDriver, Malformed, ToDriver};
use super::*;
use crate::devices::virtio::{F_VERSION_1, VirtioDevice};
use crate::testing::{Buffer, Guest, Rig, suite};

const PORTS: u32 = 4;
const DEVICE_READY: u16 = 0;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;

type Events = Arc<Mutex<Vec<PortEvent>>>;

fn console() -> (Console, Events) {
    let events = Events::default();
    let sink = Arc::clone(&events);
    let config = ConsoleConfig {
        ports: vec![
            PortConfig {
                name: "agent".into(),
            },
            PortConfig::default(),
        ],
        max_ports: PORTS,
        events: Box::new(move |event| sink.lock().unwrap().push(event)),
    };
    (Console::new(config).unwrap(), events)
}

fn control_message(port: u32, event: u16, value: u16) -> Vec<u8> {
    let mut bytes = port.to_le_bytes().to_vec();
    bytes.extend(event.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    bytes
}

/// What Linux's driver does, on the driver model.
struct Linux {
    rig: Rig<Console>,
    handle: Handle,
    events: Events,
    /// Control buffers lent to the device, in order.
    lent: VecDeque<(u16, Buffer)>,
    /// Messages of the device, as (port, event, value, rest).
    heard: Vec<(u32, u16, u16, Vec<u8>)>,
}

impl Linux {
    /// A driver that has bound the device but not announced itself.
    fn bound() -> Self {
        let (console, events) = console();
        let handle = console.handle();
        let mut rig = Rig::with(console, Guest::new(32 << 20), 64);
        rig.activate();
        Self {
            rig,
            handle,
            events,
            lent: VecDeque::new(),
            heard: Vec::new(),
        }
    }

    /// A driver that is up, with the configured ports.
    fn up() -> Self {
        let mut linux = Self::bound();
        linux.announce();
        linux
    }

    fn announce(&mut self) {
        for _ in 0..8 {
            let buffer = self.rig.guest.room(64);
            let head = self.rig.queues[2].submit(&[buffer]);
            self.lent.push_back((head, buffer));
        }
        self.say(u32::MAX, DEVICE_READY, 1);
        self.listen();
    }

    fn say(&mut self, port: u32, event: u16, value: u16) {
        let buffer = self.rig.guest.put(&control_message(port, event, value));
        assert_eq!(self.rig.exchange(3, &[buffer]).written, 0);
    }

    /// Deals with all the device says, as the driver's work queue does.
    fn listen(&mut self) {
        self.rig.run();
        while let Some(used) = self.rig.used(2) {
            let (head, buffer) = self.lent.pop_front().unwrap();
            assert_eq!(used.head, head);
            let mut bytes = self.rig.guest.contents(buffer);
            bytes.truncate(used.written as usize);
            let port = u32::from_le_bytes(bytes[..4].try_into().unwrap());
            let event = u16::from_le_bytes(bytes[4..6].try_into().unwrap());
            let value = u16::from_le_bytes(bytes[6..8].try_into().unwrap());
            self.heard.push((port, event, value, bytes[8..].to_vec()));
            if event == 1 {
                self.say(port, PORT_READY, 1);
            }
            let head = self.rig.submit(2, &[buffer]);
            self.lent.push_back((head, buffer));
        }
    }

    fn heard(&mut self) -> Vec<(u32, u16, u16, Vec<u8>)> {
        self.listen();
        std::mem::take(&mut self.heard)
    }

    fn events(&self) -> Vec<PortEvent> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    fn attach(&mut self, port: u32, input: Option<OwnedFd>, output: Option<OwnedFd>) {
        self.handle
            .attach(port, PortEnds { input, output })
            .unwrap();
        self.listen();
    }

    fn open(&mut self, port: u32) {
        self.say(port, PORT_OPEN, 1);
        self.listen();
    }

    fn close(&mut self, port: u32) {
        self.say(port, PORT_OPEN, 0);
        self.listen();
    }

    fn tx(port: u32) -> u16 {
        queues_of(port).1
    }

    fn rx(port: u32) -> u16 {
        queues_of(port).0
    }

    fn write(&mut self, port: u32, data: &[u8]) {
        let buffer = self.rig.guest.put(data);
        self.rig.submit(Self::tx(port), &[buffer]);
    }

    /// Supplies receive buffers.
    fn supply(&mut self, port: u32, count: usize, len: u32) -> VecDeque<(u16, Buffer)> {
        (0..count)
            .map(|_| {
                let buffer = self.rig.guest.room(len);
                (self.rig.submit(Self::rx(port), &[buffer]), buffer)
            })
            .collect()
    }

    /// What has arrived in `buffers`.
    fn received(&mut self, port: u32, buffers: &mut VecDeque<(u16, Buffer)>) -> Vec<u8> {
        self.rig.run();
        let mut data = Vec::new();
        while let Some(used) = self.rig.used(Self::rx(port)) {
            let (head, buffer) = buffers.pop_front().unwrap();
            assert_eq!(used.head, head);
            data.extend(&self.rig.guest.contents(buffer)[..used.written as usize]);
        }
        data
    }
}

fn output() -> (PipeReader, Option<OwnedFd>) {
    let (reader, writer) = pipe().unwrap();
    (reader, Some(writer.into()))
}

fn input() -> (Option<OwnedFd>, PipeWriter) {
    let (reader, writer) = pipe().unwrap();
    (Some(reader.into()), writer)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect()
}

fn read_now(reader: &mut PipeReader, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    reader.read_exact(&mut data).unwrap();
    data
}

#[test]
fn configured_ports_are_announced_once_the_driver_is_ready() {
    let mut linux = Linux::bound();
    linux.rig.run();
    assert_eq!(linux.rig.used(2), None);
    linux.announce();
    assert_eq!(
        linux.heard(),
        [
            (0, 1, 1, vec![]),
            (1, 1, 1, vec![]),
            (0, 7, 1, b"agent\0".to_vec())
        ]
    );
}

#[test]
fn configuration_space_has_the_number_of_ports_and_the_size_of_the_first() {
    let linux = Linux::up();
    linux.handle.resize(0, 80, 25).unwrap();
    assert_eq!(
        linux.rig.config::<8>(0),
        [80, 0, 25, 0, PORTS as u8, 0, 0, 0]
    );
}

#[test]
fn output_arrives_and_a_close_is_reported_when_it_has() {
    let mut linux = Linux::up();
    linux.heard();
    let (mut reader, writer) = output();
    linux.attach(0, None, writer);
    assert_eq!(linux.heard(), [(0, PORT_OPEN, 1, vec![])]);
    assert_eq!(linux.events(), []);
    linux.open(0);
    assert_eq!(linux.events(), [PortEvent::Opened(0)]);
    linux.write(0, b"hello, ");
    linux.write(0, b"world");
    assert_eq!(read_now(&mut reader, 12), b"hello, world");
    linux.close(0);
    assert_eq!(linux.events(), [PortEvent::Closed(0)]);
    assert_eq!(linux.heard(), [(0, PORT_OPEN, 0, vec![])]);
    // Nobody holds the other end any more.
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}

#[test]
fn ten_megabytes_pass_byte_exact_with_few_interrupts() {
    let mut linux = Linux::up();
    let (mut reader, writer) = output();
    linux.attach(1, None, writer);
    linux.open(1);
    let sink = thread::spawn(move || {
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        all
    });
    let data = pattern(10_000_000);
    let slots: Vec<_> = (0..32)
        .map(|_| linux.rig.guest.alloc(32 << 10, 4096))
        .collect();
    let mut free: Vec<u64> = slots.clone();
    let mut busy = std::collections::HashMap::new();
    let mut chunks = data.chunks(32 << 10);
    let before = linux.rig.interrupt.used_count();
    let mut sent = 0_usize;
    loop {
        while let Some(addr) = free.pop() {
            let Some(chunk) = chunks.next() else {
                free.push(addr);
                break;
            };
            linux.rig.guest.write(addr, chunk);
            let queue = &mut linux.rig.queues[usize::from(Linux::tx(1))];
            let head = queue.submit(&[Buffer::readable(addr, chunk.len() as u32)]);
            queue.kick();
            busy.insert(head, addr);
            sent += 1;
        }
        if busy.is_empty() {
            break;
        }
        let mut done = Vec::new();
        linux.rig.run_until(|rig| {
            done.extend(rig.used(Linux::tx(1)));
            !done.is_empty()
        });
        free.extend(done.iter().map(|used| busy.remove(&used.head).unwrap()));
    }
    linux.close(1);
    assert_eq!(linux.events(), [PortEvent::Opened(1), PortEvent::Closed(1)]);
    assert!(sink.join().unwrap() == data);
    assert!(linux.rig.interrupt.used_count() - before <= sent as u64 + 2);
    assert_eq!(linux.handle.metrics().output_bytes.get(), data.len() as u64);
}

#[test]
fn a_full_output_stops_the_guest_and_a_close_waits_for_it() {
    let mut linux = Linux::up();
    let (mut reader, writer) = output();
    linux.attach(1, None, writer);
    linux.open(1);
    let data = pattern(300_000);
    for chunk in data.chunks(10_000) {
        linux.write(1, chunk);
    }
    let taken = (0..)
        .take_while(|_| linux.rig.used(Linux::tx(1)).is_some())
        .count();
    assert!(taken < 30, "a pipe holds 64 KiB");
    assert!(linux.handle.metrics().output_stalls.get() > 0);
    // The close travels on the control queue and overtakes the data.
    linux.close(1);
    assert_eq!(linux.events(), [PortEvent::Opened(1)]);
    let mut seen = Vec::new();
    while seen.len() < data.len() {
        assert_eq!(linux.events(), []);
        let mut some = vec![0; 7_777];
        let n = reader.read(&mut some).unwrap();
        seen.extend(&some[..n]);
        linux.rig.run();
        if linux.events.lock().unwrap().contains(&PortEvent::Closed(1)) {
            // All has been written; the rest is in the pipe.
            reader.read_to_end(&mut seen).unwrap();
            break;
        }
    }
    assert!(seen == data);
    linux.rig.run();
    assert_eq!(linux.events(), [PortEvent::Closed(1)]);
}

#[test]
fn a_reader_that_goes_away_does_not_stop_the_guest() {
    let mut linux = Linux::up();
    let (reader, writer) = output();
    linux.attach(1, None, writer);
    linux.open(1);
    drop(reader);
    for _ in 0..100 {
        linux.write(1, &[7; 1000]);
        assert!(linux.rig.used(Linux::tx(1)).is_some());
    }
    assert_eq!(linux.handle.metrics().output_failures.get(), 1);
    linux.close(1);
    assert_eq!(linux.events(), [PortEvent::Opened(1), PortEvent::Closed(1)]);
    assert_eq!(linux.rig.faults.count(), 0);
}

#[test]
fn a_reader_that_goes_away_frees_a_guest_that_waits() {
    let mut linux = Linux::up();
    let (reader, writer) = output();
    linux.attach(1, None, writer);
    linux.open(1);
    for _ in 0..20 {
        linux.write(1, &[7; 10_000]);
    }
    while linux.rig.used(Linux::tx(1)).is_some() {}
    assert!(linux.rig.queues[usize::from(Linux::tx(1))].lent() > 0);
    drop(reader);
    linux.rig.run();
    while linux.rig.used(Linux::tx(1)).is_some() {}
    assert_eq!(linux.rig.queues[usize::from(Linux::tx(1))].lent(), 0);
}

#[test]
fn input_arrives_and_its_end_comes_behind_the_data() {
    let mut linux = Linux::up();
    let (ours, mut writer) = input();
    writer.write_all(b"early").unwrap();
    linux.attach(1, ours, None);
    let mut buffers = linux.supply(1, 4, 16);
    // Linux would throw it away.
    assert_eq!(linux.received(1, &mut buffers), b"");
    linux.open(1);
    assert_eq!(linux.received(1, &mut buffers), b"early");
    writer.write_all(&pattern(100)).unwrap();
    drop(writer);
    linux.heard();
    // Only three buffers of 16 bytes are left.
    assert_eq!(linux.received(1, &mut buffers), pattern(100)[..48]);
    assert_eq!(linux.heard(), []);
    let mut buffers = linux.supply(1, 8, 16);
    assert_eq!(linux.received(1, &mut buffers), pattern(100)[48..]);
    assert_eq!(linux.heard(), [(1, PORT_OPEN, 0, vec![])]);
    assert_eq!(
        linux.events(),
        [PortEvent::Opened(1), PortEvent::InputEnded(1)]
    );
    linux.close(1);
    assert_eq!(linux.events(), [PortEvent::Closed(1)]);
    assert_eq!(linux.heard(), []);
}

#[test]
fn ten_megabytes_of_input_pass_byte_exact() {
    let mut linux = Linux::up();
    let (ours, mut writer) = input();
    linux.attach(1, ours, None);
    linux.open(1);
    let data = pattern(10_000_000);
    let copy = data.clone();
    let source = thread::spawn(move || writer.write_all(&copy).unwrap());
    let mut buffers = linux.supply(1, 32, 4096);
    let mut seen: Vec<u8> = Vec::new();
    while seen.len() < data.len() {
        let mut done = Vec::new();
        linux.rig.run_until(|rig| {
            done.extend(rig.used(Linux::rx(1)));
            !done.is_empty()
        });
        for used in done {
            let (head, buffer) = buffers.pop_front().unwrap();
            assert_eq!(used.head, head);
            seen.extend(&linux.rig.guest.contents(buffer)[..used.written as usize]);
            let queue = &mut linux.rig.queues[usize::from(Linux::rx(1))];
            let head = queue.submit(&[buffer]);
            queue.kick();
            buffers.push_back((head, buffer));
        }
    }
    source.join().unwrap();
    assert!(seen == data);
    linux.rig.run_until(|_| {
        linux
            .events
            .lock()
            .unwrap()
            .contains(&PortEvent::InputEnded(1))
    });
}

#[test]
fn close_input_ends_it_behind_what_is_there() {
    let mut linux = Linux::up();
    let (ours, mut writer) = input();
    linux.attach(1, ours, None);
    linux.open(1);
    let mut buffers = linux.supply(1, 4, 64);
    writer.write_all(b"last words").unwrap();
    linux.handle.close_input(1).unwrap();
    assert_eq!(linux.received(1, &mut buffers), b"last words");
    linux.listen();
    assert_eq!(
        linux.events(),
        [PortEvent::Opened(1), PortEvent::InputEnded(1)]
    );
    assert!(writer.write_all(b"x").is_err(), "the reading end is closed");
}

#[test]
fn a_fifo_without_a_writer_yet_has_not_ended() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stdin");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let flags = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_NONBLOCK;
    let fifo = nix::fcntl::open(&path, flags, nix::sys::stat::Mode::empty()).unwrap();
    let mut linux = Linux::up();
    linux.attach(1, Some(fifo), None);
    linux.open(1);
    let mut buffers = linux.supply(1, 4, 64);
    linux.rig.run();
    assert_eq!(linux.events(), [PortEvent::Opened(1)]);
    let mut writer = File::options().write(true).open(&path).unwrap();
    writer.write_all(b"now").unwrap();
    drop(writer);
    assert_eq!(linux.received(1, &mut buffers), b"now");
    linux.listen();
    assert_eq!(linux.events(), [PortEvent::InputEnded(1)]);
}

#[test]
fn files_and_null_devices_do_as_ends() {
    let mut linux = Linux::up();
    let mut source = tempfile::tempfile().unwrap();
    source.write_all(&pattern(5000)).unwrap();
    source.rewind().unwrap();
    let mut sink = tempfile::tempfile().unwrap();
    let output = sink.try_clone().unwrap();
    linux.attach(0, Some(source.into()), Some(output.into()));
    linux.open(0);
    let mut buffers = linux.supply(0, 3, 1000);
    assert_eq!(linux.received(0, &mut buffers), pattern(5000)[..3000]);
    let mut buffers = linux.supply(0, 8, 1000);
    assert_eq!(linux.received(0, &mut buffers), pattern(5000)[3000..]);
    linux.listen();
    linux.write(0, b"to a file");
    linux.close(0);
    assert_eq!(
        linux.events(),
        [
            PortEvent::Opened(0),
            PortEvent::InputEnded(0),
            PortEvent::Closed(0)
        ]
    );
    sink.rewind().unwrap();
    let mut written = String::new();
    sink.read_to_string(&mut written).unwrap();
    assert_eq!(written, "to a file");

    let null = || {
        Some(
            File::options()
                .read(true)
                .write(true)
                .open("/dev/null")
                .unwrap()
                .into(),
        )
    };
    linux.attach(1, null(), null());
    linux.open(1);
    linux.supply(1, 1, 10);
    linux.listen();
    linux.write(1, &[0; 100_000]);
    linux.close(1);
    assert_eq!(
        linux.events(),
        [
            PortEvent::Opened(1),
            PortEvent::InputEnded(1),
            PortEvent::Closed(1)
        ]
    );
}

#[test]
fn a_slot_is_used_again_after_both_sides_closed() {
    let mut linux = Linux::up();
    for round in 0..3_u8 {
        let (mut reader, writer) = output();
        linux.attach(1, None, writer);
        let busy = linux.handle.attach(1, PortEnds::default());
        assert!(matches!(busy, Err(ConsoleError::Busy { port: 1 })));
        linux.open(1);
        linux.write(1, &[round; 10]);
        linux.close(1);
        assert_eq!(linux.events(), [PortEvent::Opened(1), PortEvent::Closed(1)]);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all, [round; 10]);
    }
    let opens: Vec<_> = linux
        .heard()
        .into_iter()
        .filter(|(_, event, ..)| *event == PORT_OPEN)
        .collect();
    let values: Vec<_> = opens.iter().map(|(_, _, value, _)| *value).collect();
    assert_eq!(values, [1, 0, 1, 0, 1, 0]);
}

#[test]
fn nothing_of_one_attachment_reaches_the_next() {
    let mut linux = Linux::up();
    let (_reader, writer) = output();
    linux.attach(1, None, writer);
    linux.open(1);
    for _ in 0..20 {
        linux.write(1, &[1; 10_000]);
    }
    linux.handle.detach(1).unwrap();
    linux.listen();
    assert!(matches!(
        linux.handle.attach(1, PortEnds::default()),
        Err(ConsoleError::Busy { port: 1 })
    ));
    linux.close(1);
    assert_eq!(linux.events(), [PortEvent::Opened(1), PortEvent::Closed(1)]);
    let (mut reader, writer) = output();
    linux.attach(1, None, writer);
    linux.open(1);
    linux.write(1, b"new");
    linux.close(1);
    let mut all = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"new");
    assert!(linux.handle.metrics().discarded_bytes.get() > 0);
}

#[test]
fn a_quick_change_of_hosts_is_told_as_close_and_open() {
    let mut linux = Linux::up();
    linux.attach(1, None, None);
    linux.heard();
    linux.handle.detach(1).unwrap();
    linux.handle.attach(1, PortEnds::default()).unwrap();
    assert_eq!(
        linux.heard(),
        [(1, PORT_OPEN, 0, vec![]), (1, PORT_OPEN, 1, vec![])]
    );
}

#[test]
fn attach_returns_when_the_driver_has_dealt_with_it() {
    let mut linux = Linux::up();
    let handle = linux.handle.clone();
    let attach = thread::spawn(move || handle.attach(1, PortEnds::default()));
    linux.rig.run_until(|rig| rig.queues[2].used_index() == 4);
    // The message is in the guest's memory, but nothing in the guest has looked at it.
    linux.rig.turn(Duration::from_millis(20));
    assert!(!attach.is_finished());
    linux.listen();
    attach.join().unwrap().unwrap();

    let waiting = thread::scope(|scope| {
        let handle = &linux.handle;
        let attaching = scope
            .spawn(|| handle.begin_attach(0, PortEnds::default()))
            .join();
        attaching.unwrap().unwrap().wait(Duration::from_millis(1))
    });
    // begin_attach ran on another thread, so there was an answer to wait for, and none came.
    assert!(matches!(
        waiting,
        Err(ConsoleError::Unanswered { port: 0, .. })
    ));
    linux.listen();
    assert_eq!(linux.events(), []);
    linux.attach(0, None, None);
}

#[test]
fn ports_come_with_their_first_attachment_and_go_when_removed() {
    let mut linux = Linux::up();
    linux.heard();
    linux.attach(3, None, None);
    assert_eq!(
        linux.heard(),
        [(3, 1, 1, vec![]), (3, PORT_OPEN, 1, vec![])]
    );
    linux.open(3);
    linux.handle.remove(3).unwrap();
    assert_eq!(linux.heard(), [(3, 2, 1, vec![])]);
    linux.attach(3, None, None);
    assert_eq!(
        linux.heard(),
        [(3, 1, 1, vec![]), (3, PORT_OPEN, 1, vec![])]
    );
    assert!(matches!(
        linux.handle.attach(4, PortEnds::default()),
        Err(ConsoleError::NoPort { port: 4, ports: 4 })
    ));
}

#[test]
fn a_new_size_is_told() {
    let mut linux = Linux::up();
    linux.heard();
    linux.handle.resize(1, 132, 43).unwrap();
    assert_eq!(linux.heard(), [(1, 5, 0, vec![43, 0, 132, 0])]);
}

#[test]
fn nonsense_of_the_driver_is_counted_and_changes_nothing() {
    let mut linux = Linux::up();
    linux.heard();
    let refused = linux.handle.metrics();
    for (port, event) in [
        (PORTS, PORT_OPEN),
        (u32::MAX, PORT_OPEN),
        (u32::MAX, PORT_READY),
        (3, PORT_OPEN),
        (3, PORT_READY),
        (0, 77),
        (0, 1),
    ] {
        let before = refused.control_refused.get();
        linux.say(port, event, 1);
        assert_eq!(refused.control_refused.get(), before + 1, "{port} {event}");
    }
    let short = linux.rig.guest.put(&[0; 7]);
    linux.rig.exchange(3, &[short]);
    linux.close(0);
    linux.close(0);
    assert_eq!(linux.events(), []);
    assert_eq!(linux.heard(), []);
    assert_eq!(linux.rig.faults.count(), 0);
}

#[test]
fn a_driver_that_asks_for_ever_and_takes_no_answer_makes_nothing_grow() {
    let mut linux = Linux::bound();
    linux.say(0, DEVICE_READY, 1);
    for _ in 0..1000 {
        linux.say(0, DEVICE_READY, 1);
        linux.say(0, PORT_READY, 1);
    }
    assert_eq!(linux.handle.metrics().control_sent.get(), 0);
    linux.announce();
    assert_eq!(linux.heard().len(), 3);
}

#[test]
fn a_reset_closes_what_was_open_and_keeps_what_was_not() {
    let mut linux = Linux::up();
    let (mut reader, writer) = output();
    linux.attach(0, None, writer);
    linux.open(0);
    linux.attach(1, None, None);
    linux.rig.device.reset();
    assert_eq!(linux.events(), [PortEvent::Opened(0), PortEvent::Closed(0)]);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    linux.rig.activate();
    linux.lent.clear();
    linux.heard.clear();
    linux.announce();
    let opens: Vec<_> = linux
        .heard()
        .into_iter()
        .filter(|(_, event, ..)| *event == PORT_OPEN)
        .collect();
    assert_eq!(opens, [(1, PORT_OPEN, 1, vec![])]);
}

#[test]
fn a_broken_queue_closes_what_was_open() {
    let mut linux = Linux::up();
    let (mut reader, writer) = output();
    linux.attach(0, None, writer);
    linux.open(0);
    linux.write(0, b"all there is");
    let queue = &mut linux.rig.queues[0];
    queue.set_avail_index(queue.avail_index().wrapping_add(1000));
    let queue = &mut linux.rig.queues[1];
    queue.set_avail_index(queue.avail_index().wrapping_add(1000));
    queue.ring_bell();
    linux.rig.run();
    assert_eq!(linux.rig.faults.count(), 1);
    assert_eq!(linux.events(), [PortEvent::Opened(0), PortEvent::Closed(0)]);
    let mut all = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"all there is");
    // Nobody answers, but nobody is waited for either.
    linux.handle.attach(0, PortEnds::default()).unwrap();
}

#[test]
fn handles_outlive_the_device() {
    let mut linux = Linux::up();
    let (mut reader, writer) = output();
    linux.attach(0, None, writer);
    linux.open(0);
    let handle = linux.handle.clone();
    drop(linux.rig);
    assert_eq!(
        *linux.events.lock().unwrap(),
        [PortEvent::Opened(0), PortEvent::Closed(0)]
    );
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    thread::spawn(move || handle.attach(0, PortEnds::default()))
        .join()
        .unwrap()
        .unwrap();
}

#[test]
fn what_is_attached_before_the_driver_is_up_waits_for_it() {
    let mut linux = Linux::bound();
    let (mut reader, writer) = output();
    linux.attach(0, None, writer);
    linux.announce();
    linux.open(0);
    linux.write(0, b"ready");
    assert_eq!(read_now(&mut reader, 5), b"ready");
    assert_eq!(linux.events(), [PortEvent::Opened(0)]);
}

#[test]
fn without_multiport_the_first_port_is_simply_open() {
    let (console, events) = console();
    let handle = console.handle();
    let mut rig = Rig::new(console);
    rig.activate_queues(F_VERSION_1, 0, &[0, 1]).unwrap();
    let (mut reader, writer) = output();
    handle
        .attach(
            0,
            PortEnds {
                input: None,
                output: writer,
            },
        )
        .unwrap();
    let data = rig.guest.put(b"plain");
    rig.exchange(1, &[data]);
    assert_eq!(read_now(&mut reader, 5), b"plain");
    assert_eq!(*events.lock().unwrap(), [PortEvent::Opened(0)]);
}

#[test]
fn unusable_configurations_are_refused() {
    for (max_ports, named) in [(0, 0), (MAX_PORTS + 1, 0), (1, 2)] {
        let ports = vec![PortConfig::default(); named];
        let config = ConsoleConfig {
            ports,
            max_ports,
            events: Box::new(|_| ()),
        };
        assert!(matches!(
            Console::new(config),
            Err(ConsoleError::Ports { .. })
        ));
    }
}

/// One exchange that works with a driver in any state a test left it in.
fn prove(rig: &mut Rig<Console>) {
    let room = rig.guest.room(64);
    rig.submit(2, &[room]);
    let handle = rig.device.handle();
    handle.detach(0).unwrap();
    for message in [(0, DEVICE_READY, 1), (0, PORT_READY, 1), (0, PORT_OPEN, 0)] {
        let buffer = rig
            .guest
            .put(&control_message(message.0, message.1, message.2));
        rig.exchange(3, &[buffer]);
    }
    let (mut reader, writer) = output();
    handle
        .attach(
            0,
            PortEnds {
                input: None,
                output: writer,
            },
        )
        .unwrap();
    for _ in 0..8 {
        let room = rig.guest.room(64);
        rig.submit(2, &[room]);
    }
    for message in [(0, PORT_READY, 1), (0, PORT_OPEN, 1)] {
        let buffer = rig
            .guest
            .put(&control_message(message.0, message.1, message.2));
        rig.exchange(3, &[buffer]);
    }
    let data = rig.guest.put(b"proof");
    assert_eq!(rig.exchange(1, &[data]).written, 0);
    assert_eq!(read_now(&mut reader, 5), b"proof");
    while rig.used(2).is_some() {}
}

#[test]
fn generic_suite() {
    suite::run(|| console().0, prove);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn survives_hostile_drivers(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        suite::survives(console().0, &bytes, prove);
    }

    #[test]
    fn any_order_of_things_leaves_the_device_working(
        steps in prop::collection::vec((0..10_u8, 0..PORTS + 1, any::<u8>()), 0..120)
    ) {
        let mut linux = Linux::up();
        let mut readers = Vec::new();
        let mut writers = Vec::new();
        for (step, port, value) in steps {
            match step {
                0 => linux.say(port, PORT_OPEN, u16::from(value & 1)),
                1 => linux.say(port, PORT_READY, u16::from(value & 1)),
                2 => linux.say(port, DEVICE_READY, 1),
                3 if port < PORTS && linux.rig.queues[usize::from(Linux::tx(port))].lent() < 60 => {
                    linux.write(port, &vec![value; usize::from(value) * 64 + 1]);
                }
                4 => {
                    let (reader, output) = output();
                    let (input, writer) = input();
                    readers.push(reader);
                    writers.push(writer);
                    let _ = linux.handle.attach(port, PortEnds { input, output });
                }
                5 => { let _ = linux.handle.detach(port); }
                6 => { let _ = linux.handle.close_input(port); }
                7 => { let _ = linux.handle.remove(port); }
                8 => {
                    if value & 1 == 0 { readers.pop(); } else { writers.pop(); }
                }
                _ => linux.listen(),
            }
            for port in 0..PORTS {
                while linux.rig.used(Linux::tx(port)).is_some() {}
            }
        }
        linux.rig.run();
        prop_assert_eq!(linux.rig.faults.count(), 0);
        drop((readers, writers));
        for port in 0..PORTS {
            linux.close(port);
            let _ = linux.handle.detach(port);
        }
        linux.events();
        for port in 0..PORTS {
            let (mut reader, writer) = output();
            linux.attach(port, None, writer);
            linux.open(port);
            linux.write(port, b"still here");
            linux.close(port);
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            prop_assert_eq!(all, b"still here");
        }
    }

    #[test]
    fn any_control_message_parses_or_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..20)) {
        match FromDriver::parse(&bytes) {
            Err(Malformed::Short { len }) => prop_assert!(len < wire::CONTROL_LEN),
            Err(Malformed::Event { event }) => prop_assert!(![0, 3, 6].contains(&event)),
            Ok(_) => prop_assert!(bytes.len() >= wire::CONTROL_LEN),
        }
    }

    #[test]
    fn names_of_any_length_fit_a_control_buffer(name in ".{0,300}") {
        let bytes = ToDriver::Name(name).encode(1);
        prop_assert!(bytes.len() <= wire::CONTROL_LEN + wire::MAX_NAME + 1);
    }
}
