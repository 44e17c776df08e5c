//! Drivers without manners, and what every device has to pass.

use super::*;

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

/// A connection with a guest that has nothing but two buffers.
fn prove(rig: &mut Rig<Vsock>, dir: &TempDir) {
    // A driver has a buffer for events there at all times.
    loop {
        while rig.used(EVENT).is_some() {}
        if rig.queues[usize::from(EVENT)].lent() > 0 {
            break;
        }
        let room = rig.guest.room(4);
        rig.submit(EVENT, &[room]);
    }
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
