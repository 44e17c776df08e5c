//! The console against a driver that behaves as Linux does, and against one that does not.

mod hostile;
mod streams;

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

/// Two of them have a doorbell between them.
const PORTS: u32 = 6;
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
        linux.handle.attach(PORTS, PortEnds::default()),
        Err(ConsoleError::NoPort {
            port: PORTS,
            ports: PORTS
        })
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
