//! Much data both ways, within what the receiver has room for.

use super::*;

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
fn a_request_for_credit_is_answered() {
    let mut linux = Linux::up();
    let (_program, port) = linux.connected();
    linux.data(port, &[0; 100]);
    linux.say(port, Op::CreditRequest);
    let update = linux.expect(Op::CreditUpdate);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (BUFFER, 100));
}
