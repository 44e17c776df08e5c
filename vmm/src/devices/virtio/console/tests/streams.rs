//! Bytes both ways, and their ends.

use super::*;

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
