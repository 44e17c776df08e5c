#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "what is denied to the code is handy in its tests"
)]

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::devices::virtio::F_RING_EVENT_IDX;
use crate::testing::{Buffer, DriverQueue, Guest, flags};

const SIZE: u16 = 8;

fn pair() -> (Guest, DriverQueue) {
    let guest = Guest::new(4 << 20);
    let driver = DriverQueue::new(&guest, 3, SIZE);
    (guest, driver)
}

/// The fault of the first chain.
fn fault(driver: &DriverQueue) -> RingFault {
    driver.device_side().pop().unwrap_err()
}

#[test]
fn a_chain_is_read_and_comes_back() {
    let (guest, mut driver) = pair();
    let mut queue = driver.device_side();
    assert!(queue.pop().unwrap().is_none());
    let (first, second) = guest.put(b"hello world!").split(5);
    let room = guest.room(8);
    let head = driver.submit(&[first, second, room]);

    let chain = queue.pop().unwrap().unwrap();
    assert_eq!(
        (chain.head(), chain.readable_len(), chain.writable_len()),
        (head, 12, 8)
    );
    let mut reader = chain.reader();
    assert_eq!(reader.read_obj::<u8>().unwrap(), b'h');
    reader.skip(1).unwrap();
    let mut text = [0; 10];
    assert!(matches!(
        chain.reader().read_exact(&mut [0; 13]),
        Err(CursorError::Short {
            wanted: 13,
            left: 12
        })
    ));
    reader.read_exact(&mut text).unwrap();
    assert_eq!(
        (&text, reader.remaining(), reader.position()),
        (b"llo world!", 0, 12)
    );
    let mut writer = chain.writer();
    writer.write_obj(0x0102_u16.to_be()).unwrap();
    writer.skip(2).unwrap();
    assert!(writer.write_all(&[0; 5]).is_err());
    writer.write_all(&[9]).unwrap();
    assert_eq!((writer.position(), writer.remaining()), (5, 3));

    queue.complete(chain, 5).unwrap();
    assert_eq!(
        guest.contents(room),
        [1, 2, 0xaa, 0xaa, 9, 0xaa, 0xaa, 0xaa]
    );
    let used = driver.used().unwrap();
    assert_eq!((used.head, used.written), (head, 5));
    assert!(driver.used().is_none());
    assert_eq!(queue.in_flight(), 0);
}

#[test]
fn indirect_and_direct_chains_read_alike() {
    let (guest, mut driver) = pair();
    let mut queue = driver.device_side();
    // Longer than the queue: drivers do that with indirect tables.
    let buffers: Vec<_> = (0..20).map(|byte| guest.put(&[byte])).collect();
    driver.submit_indirect(&buffers);
    let chain = queue.pop().unwrap().unwrap();
    let mut data = [0; 20];
    chain.reader().read_exact(&mut data).unwrap();
    assert!(data.iter().copied().eq(0..20));
    assert_eq!(chain.readable().len(), 20);
    queue.complete(chain, 0).unwrap();
    driver.used().unwrap();
}

#[test]
fn an_indirect_table_may_follow_direct_descriptors() {
    let (guest, mut driver) = pair();
    let text = guest.put(b"ab");
    let table = guest.alloc(32, 1);
    let entry = |buffer: Buffer| {
        let mut entry = [0; 16];
        entry[..8].copy_from_slice(&buffer.addr.to_le_bytes());
        entry[8] = 1;
        entry
    };
    guest.write(table, &entry(text.split(1).1));
    driver.raw_descriptor(0, text.addr, 1, flags::NEXT, 1);
    // The write flag of such a descriptor is to be ignored (virtio 1.2, 2.7.5.3.2).
    driver.raw_descriptor(1, table, 16, flags::INDIRECT | flags::WRITE, 0);
    driver.publish(0);
    let mut queue = driver.device_side();
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (2, 0));
    assert_eq!(chain.reader().read_obj::<[u8; 2]>().unwrap(), *b"ab");
    queue.undo_pop(chain);
}

#[test]
fn slices_cover_what_is_left() {
    let (guest, mut driver) = pair();
    let mut queue = driver.device_side();
    let (first, second) = guest.put(b"0123456789").split(4);
    driver.submit(&[first, second]);
    let chain = queue.pop().unwrap().unwrap();
    let mut reader = chain.reader();
    reader.skip(3).unwrap();
    let lengths = |limit| -> Vec<usize> {
        reader
            .slices(limit)
            .unwrap()
            .iter()
            .map(vm_memory::VolatileSlice::len)
            .collect()
    };
    assert_eq!(lengths(100), [1, 6]);
    assert_eq!(lengths(3), [1, 2]);
    assert_eq!(lengths(0), [0; 0]);
    assert_eq!(
        reader.slices(1).unwrap()[0].read_obj::<u8>(0).unwrap(),
        b'3'
    );
    queue.complete(chain, 0).unwrap();
}

#[test]
fn empty_buffers_are_passed_over_wherever_they_point() {
    let (guest, mut driver) = pair();
    let text = guest.put(b"x");
    driver.submit(&[
        Buffer::readable(u64::MAX, 0),
        text,
        Buffer::readable(0, 0),
        Buffer::writable(guest.end() + 5, 0),
    ]);
    let mut queue = driver.device_side();
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!((chain.readable().len(), chain.writable().len()), (1, 0));
    assert_eq!(chain.reader().read_obj::<u8>().unwrap(), b'x');
    queue.complete(chain, 0).unwrap();
}

#[test]
fn a_chain_put_back_is_popped_again() {
    let (guest, mut driver) = pair();
    let mut queue = driver.device_side();
    let heads = [
        driver.submit(&[guest.put(b"1")]),
        driver.submit(&[guest.put(b"2")]),
    ];
    let first = queue.pop().unwrap().unwrap();
    let second = queue.pop().unwrap().unwrap();
    assert_eq!([first.head(), second.head()], heads);
    queue.undo_pop(second);
    assert!(queue.has_pending().unwrap());
    let again = queue.pop().unwrap().unwrap();
    assert_eq!((again.head(), queue.in_flight()), (heads[1], 2));
    // Out of order is fine.
    queue.complete(again, 0).unwrap();
    queue.complete(first, 0).unwrap();
    assert_eq!(driver.used().unwrap().head, heads[1]);
    assert_eq!(driver.used().unwrap().head, heads[0]);
}

#[test]
fn indexes_run_over_the_end_of_16_bits() {
    for features in [0, F_RING_EVENT_IDX] {
        let (guest, mut driver) = pair();
        driver.reset(features, u16::MAX - 3);
        let mut queue = driver.device_side();
        let text = guest.put(b"x");
        for round in 0..10 {
            assert!(!queue.enable_notification().unwrap(), "round {round}");
            let head = driver.submit(&[text]);
            assert!(driver.kick(), "round {round}");
            let chain = queue.pop().unwrap().unwrap();
            queue.complete(chain, 0).unwrap();
            assert!(queue.should_notify().unwrap(), "round {round}");
            assert_eq!(driver.used().unwrap().head, head);
        }
    }
}

#[test]
fn interrupts_come_when_asked_for() {
    let (guest, mut driver) = pair();
    let mut queue = driver.device_side();
    let text = guest.put(b"x");
    let serve = |driver: &mut DriverQueue, queue: &mut Virtqueue| {
        driver.submit(&[text]);
        let chain = queue.pop().unwrap().unwrap();
        queue.complete(chain, 0).unwrap();
    };
    assert!(!queue.should_notify().unwrap(), "nothing was completed");
    serve(&mut driver, &mut queue);
    assert!(queue.should_notify().unwrap());
    assert!(!queue.should_notify().unwrap(), "it was taken as sent");
    driver.set_no_interrupt(true);
    serve(&mut driver, &mut queue);
    assert!(!queue.should_notify().unwrap());

    driver.reset(F_RING_EVENT_IDX, 0);
    let mut queue = driver.device_side();
    driver.set_used_event(2);
    let wanted: Vec<bool> = (0..4)
        .map(|_| {
            serve(&mut driver, &mut queue);
            queue.should_notify().unwrap()
        })
        .collect();
    assert_eq!(wanted, [false, false, true, false]);
    // Several at once, the third of which is the one.
    driver.set_used_event(6);
    (0..4).for_each(|_| serve(&mut driver, &mut queue));
    assert!(queue.should_notify().unwrap());
}

#[test]
fn notifications_are_asked_for_without_losing_one() {
    for features in [0, F_RING_EVENT_IDX] {
        let (guest, mut driver) = pair();
        driver.reset(features, 0);
        let mut queue = driver.device_side();
        let text = guest.put(b"x");
        queue.disable_notification().unwrap();
        driver.submit(&[text]);
        if features == 0 {
            assert!(!driver.kick());
        }
        assert!(queue.enable_notification().unwrap(), "one is there already");
        let chain = queue.pop().unwrap().unwrap();
        assert!(!queue.enable_notification().unwrap());
        driver.submit(&[text]);
        assert!(driver.kick());
        queue.complete(chain, 0).unwrap();
    }
}

#[test]
fn a_queue_outside_ram_is_refused() {
    let (guest, driver) = pair();
    let make = |change: &dyn Fn(&mut Queue)| {
        let mut ring = driver.ring();
        change(&mut ring);
        Virtqueue::new(3, guest.memory().clone(), ring, false).map(drop)
    };
    make(&|_| ()).unwrap();
    assert!(matches!(
        make(&|ring| ring.set_ready(false)),
        Err(RingFault::NotReady { queue: 3 })
    ));
    let end = guest.end() as u32;
    // The last entry hangs over the end.
    for (change, part) in [
        (
            &(|ring: &mut Queue| ring.set_desc_table_address(Some(end - 112), None))
                as &dyn Fn(&mut Queue),
            Part::Descriptors,
        ),
        (
            &|ring: &mut Queue| ring.set_avail_ring_address(Some(end - 20), None),
            Part::Available,
        ),
        (
            &|ring: &mut Queue| ring.set_used_ring_address(Some(end - 68), None),
            Part::Used,
        ),
        (
            &|ring: &mut Queue| ring.set_used_ring_address(None, Some(u32::MAX)),
            Part::Used,
        ),
        (
            &|ring: &mut Queue| ring.set_desc_table_address(Some(0), Some(0)),
            Part::Descriptors,
        ),
        (
            &|ring: &mut Queue| ring.set_avail_ring_address(Some(0), Some(0)),
            Part::Available,
        ),
        (
            &|ring: &mut Queue| ring.set_used_ring_address(Some(0), Some(0)),
            Part::Used,
        ),
    ] {
        match make(change) {
            Err(RingFault::Outside {
                queue: 3,
                part: named,
                ..
            }) => assert_eq!(named, part),
            other => panic!("{part}: {other:?}"),
        }
    }
}

#[test]
fn an_available_index_too_far_ahead_is_a_fault() {
    for (index, fine) in [(SIZE, true), (SIZE + 1, false), (u16::MAX, false)] {
        let (guest, mut driver) = pair();
        let text = guest.put(b"x");
        driver.raw_descriptor(0, text.addr, 1, 0, 0);
        driver.set_avail_index(index);
        let mut queue = driver.device_side();
        match queue.pop() {
            Ok(Some(chain)) if fine => queue.complete(chain, 0).unwrap(),
            Err(RingFault::AvailableIndex {
                queue: 3,
                next: 0,
                size: SIZE,
                avail,
            }) if !fine => {
                assert_eq!(avail, index);
            }
            other => panic!("{index}: {other:?}"),
        }
    }
}

#[test]
fn descriptors_cannot_be_lent_twice_without_end() {
    let (guest, mut driver) = pair();
    let text = guest.put(b"x");
    driver.raw_descriptor(0, text.addr, 1, 0, 0);
    let mut queue = driver.device_side();
    let mut chains = Vec::new();
    for _ in 0..SIZE {
        driver.publish(0);
        chains.push(queue.pop().unwrap().unwrap());
    }
    driver.publish(0);
    assert!(matches!(
        queue.pop(),
        Err(RingFault::TooManyInFlight {
            queue: 3,
            size: SIZE
        })
    ));
    drop(chains);
}

#[test]
fn every_way_a_chain_can_be_wrong_has_its_fault() {
    use RingFault as F;
    let (guest, mut driver) = pair();
    driver.publish(SIZE);
    assert!(matches!(
        fault(&driver),
        F::DescriptorIndex { head: SIZE, .. }
    ));

    type Raw = (u16, u64, u32, u16, u16);
    let table = guest.alloc(64, 16);
    let end = guest.end();
    type Expected = fn(&RingFault) -> bool;
    let cases: &[(&str, &[Raw], Expected)] = &[
        (
            "next outside",
            &[(0, table, 1, flags::NEXT, SIZE)],
            |fault| {
                matches!(
                    fault,
                    F::DescriptorIndex {
                        descriptor: SIZE,
                        ..
                    }
                )
            },
        ),
        (
            "loop",
            &[(0, table, 1, flags::NEXT, 1), (1, table, 1, flags::NEXT, 0)],
            |fault| matches!(fault, F::TooLong { limit: 8, .. }),
        ),
        ("outside RAM", &[(0, end, 1, 0, 0)], |fault| {
            matches!(fault, F::BufferOutside { .. })
        }),
        (
            "over the end",
            &[(0, end - 1, 2, flags::WRITE, 0)],
            |fault| matches!(fault, F::BufferOutside { len: 2, .. }),
        ),
        ("wrapping", &[(0, u64::MAX, 2, 0, 0)], |fault| {
            matches!(fault, F::BufferOutside { .. })
        }),
        (
            "readable behind writable",
            &[
                (0, table, 1, flags::WRITE | flags::NEXT, 1),
                (1, table, 1, 0, 0),
            ],
            |fault| matches!(fault, F::ReadableAfterWritable { .. }),
        ),
        (
            "indirect with next",
            &[(0, table, 16, flags::INDIRECT | flags::NEXT, 1)],
            |fault| matches!(fault, F::IndirectMisplaced { .. }),
        ),
        (
            "empty table",
            &[(0, table, 0, flags::INDIRECT, 0)],
            |fault| matches!(fault, F::IndirectLength { len: 0, .. }),
        ),
        (
            "part of a table entry",
            &[(0, table, 24, flags::INDIRECT, 0)],
            |fault| matches!(fault, F::IndirectLength { len: 24, .. }),
        ),
        (
            "table outside RAM",
            &[(0, end - 16, 32, flags::INDIRECT, 0)],
            |fault| matches!(fault, F::IndirectOutside { .. }),
        ),
    ];
    for (name, descriptors, expected) in cases {
        driver.reset(0, 0);
        for &(index, addr, len, flags, next) in *descriptors {
            driver.raw_descriptor(index, addr, len, flags, next);
        }
        driver.publish(0);
        let fault = fault(&driver);
        assert!(expected(&fault), "{name}: {fault}");
    }
}

#[test]
fn indirect_tables_cannot_nest_loop_or_leave() {
    use RingFault as F;
    let (guest, mut driver) = pair();
    let table = guest.alloc(32, 16);
    let entry = |flags: u16, next: u16| {
        let mut entry = [0; 16];
        entry[..8].copy_from_slice(&table.to_le_bytes());
        entry[8] = 16;
        entry[12..14].copy_from_slice(&flags.to_le_bytes());
        entry[14..].copy_from_slice(&next.to_le_bytes());
        entry
    };
    driver.raw_descriptor(0, table, 32, flags::INDIRECT, 0);
    driver.publish(0);
    for (name, first, expected) in [
        (
            "nested",
            entry(flags::INDIRECT, 0),
            (|fault| matches!(fault, F::IndirectMisplaced { .. })) as fn(&RingFault) -> bool,
        ),
        ("loop", entry(flags::NEXT, 0), |fault| {
            matches!(fault, F::TooLong { limit: 2, .. })
        }),
        ("next outside", entry(flags::NEXT, 2), |fault| {
            matches!(
                fault,
                F::DescriptorIndex {
                    descriptor: 2,
                    size: 2,
                    ..
                }
            )
        }),
    ] {
        guest.write(table, &first);
        let fault = fault(&driver);
        assert!(expected(&fault), "{name}: {fault}");
    }
}

#[test]
fn indirect_tables_are_followed_for_1024_descriptors_and_no_further() {
    let guest = Guest::new(4 << 20);
    let mut driver = DriverQueue::new(&guest, 3, SIZE);
    let text = guest.put(b"x");
    driver.submit_indirect(&vec![text; 1024]);
    driver.submit_indirect(&vec![text; 1025]);
    let mut queue = driver.device_side();
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!(chain.readable_len(), 1024);
    queue.complete(chain, 0).unwrap();
    assert!(matches!(
        queue.pop(),
        Err(RingFault::TooLong { limit: 1024, .. })
    ));
}

#[test]
fn chains_end_at_four_gigabytes() {
    let guest = Guest::new(3 << 30);
    let mut driver = DriverQueue::new(&guest, 0, SIZE);
    driver.submit(&[
        Buffer::readable(4096, 1 << 31),
        Buffer::readable(4096, 1 << 31),
    ]);
    let mut queue = driver.device_side();
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!(chain.readable_len(), 1 << 32);
    queue.complete(chain, 0).unwrap();
    driver.submit(&[
        Buffer::readable(4096, 1 << 31),
        Buffer::readable(4096, 1 << 31),
        Buffer::writable(4096, 1),
    ]);
    assert!(matches!(queue.pop(), Err(RingFault::TooManyBytes { .. })));
}

#[test]
#[should_panic(expected = "neither completed nor put back")]
fn a_lost_chain_is_noticed() {
    let (guest, mut driver) = pair();
    let mut queue = driver.device_side();
    driver.submit(&[guest.put(b"x")]);
    drop(queue.pop().unwrap());
}

#[test]
fn chains_may_go_with_a_queue_that_is_gone_or_broken() {
    let (guest, mut driver) = pair();
    let mut queue = driver.device_side();
    driver.submit(&[guest.put(b"x")]);
    let chain = queue.pop().unwrap();
    driver.publish(SIZE);
    queue.pop().unwrap_err();
    drop(chain);
    driver.reset(0, 0);
    let mut queue = driver.device_side();
    driver.submit(&[guest.put(b"x")]);
    let chain = queue.pop().unwrap();
    drop(queue);
    drop(chain);
}

#[test]
fn a_chain_belongs_to_its_queue() {
    let (guest, mut driver) = pair();
    let mut queue = driver.device_side();
    let mut other = DriverQueue::new(&guest, 4, SIZE).device_side();
    driver.submit(&[guest.put(b"x")]);
    let chain = queue.pop().unwrap().unwrap();
    drop(queue);
    assert!(matches!(
        other.complete(chain, 0),
        Err(RingFault::WrongQueue { queue: 4, of: 3 })
    ));
}

proptest! {
    /// Whatever is in the descriptor table: a fault, or a chain that lies in RAM and is bounded.
    #[test]
    fn any_table_gives_a_fault_or_a_sound_chain(
        table in proptest::collection::vec(any::<u8>(), 16 * SIZE as usize),
        narrow in any::<bool>(),
        head in 0..SIZE + 1,
    ) {
        let (guest, mut driver) = pair();
        let mut table = table;
        if narrow {
            // Most random addresses are nowhere: bring some into RAM, with small flags and indexes.
            for entry in table.chunks_exact_mut(16) {
                entry[3..8].fill(0);
                entry[2] &= 0x3f;
                entry[10..12].fill(0);
                entry[12] &= 7;
                entry[13] = 0;
                entry[14] %= SIZE as u8 + 1;
                entry[15] = 0;
            }
        }
        guest.write(driver.addresses()[0], &table);
        driver.publish(head);
        let mut queue = driver.device_side();
        if let Ok(chain) = queue.pop() {
            let chain = chain.expect("one was published");
            let sum = |segments: &[Segment]| -> u64 {
                segments.iter().map(|segment| u64::from(segment.len)).sum()
            };
            prop_assert_eq!(sum(chain.readable()), chain.readable_len());
            prop_assert_eq!(sum(chain.writable()), chain.writable_len());
            prop_assert!(chain.readable().len() + chain.writable().len() <= 1024);
            for segment in chain.readable().iter().chain(chain.writable()) {
                prop_assert!(segment.addr.0 + u64::from(segment.len) <= guest.end());
            }
            let mut data = vec![0; chain.readable_len().min(1 << 20) as usize];
            chain.reader().read_exact(&mut data).unwrap();
            queue.complete(chain, 0).unwrap();
        }
    }

    /// However the driver cuts its buffers, the bytes are the same.
    #[test]
    fn readers_and_writers_do_not_see_the_cuts(
        data in proptest::collection::vec(any::<u8>(), 1..200),
        cuts in proptest::collection::vec(1..60_u32, 0..3),
        step in 1..40_usize,
    ) {
        let (guest, mut driver) = pair();
        let mut queue = driver.device_side();
        let mut buffers = Vec::new();
        for buffer in [guest.put(&data), guest.room(data.len() as u32)] {
            let mut rest = buffer;
            for &cut in &cuts {
                let (before, behind) = rest.split(cut.min(rest.len));
                buffers.push(before);
                rest = behind;
            }
            buffers.push(rest);
        }
        driver.submit(&buffers);
        let chain = queue.pop().unwrap().unwrap();
        let (mut reader, mut writer) = (chain.reader(), chain.writer());
        while reader.remaining() > 0 {
            let take = reader.remaining().min(step as u64) as usize;
            let mut part = vec![0; take];
            reader.read_exact(&mut part).unwrap();
            writer.write_all(&part).unwrap();
        }
        let written = writer.position() as u32;
        queue.complete(chain, written).unwrap();
        let copy: Vec<u8> =
            buffers.iter().filter(|buffer| buffer.writable).flat_map(|&b| guest.contents(b)).collect();
        prop_assert_eq!(copy, data);
    }
}
