//! Drivers without manners, and what every device has to pass.

use super::*;

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
