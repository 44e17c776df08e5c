mod hints;
mod host;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::*;
use crate::devices::virtio::{F_VERSION_1, VirtioDevice};
use crate::testing::{Buffer, Guest, Rig, suite};

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATS: u16 = 2;
const HINTS: u16 = 3;
const REPORTING: u16 = 4;

const BASE: u64 = 2 << 20;
const SIZE: u64 = 4 << 20;
/// Pages from here on are for the balloon; buffers lie before.
const FIELD: u64 = BASE + (2 << 20);

/// What the guest is said to have; the balloons leave `FLOOR` of it.
const MEMORY: u64 = 1 << 30;
const FLOOR: u64 = 1 << 20;

fn config() -> BalloonConfig {
    BalloonConfig {
        floor: FLOOR,
        free_page_hint: true,
        ..BalloonConfig::default()
    }
}

fn balloon() -> Balloon {
    Balloon::new(config(), MEMORY).unwrap()
}

/// A balloon on a host with pages of `page` bytes.
fn on_host(page: u64) -> Balloon {
    let host_of = move |memory: &GuestMemory| Host {
        page,
        ..Host::of(memory)
    };
    Balloon::on_host(config(), MEMORY, Box::new(host_of)).unwrap()
}

/// An active balloon with a guest whose RAM does not begin at 0 and is filled.
fn rig(device: Balloon) -> Rig<Balloon> {
    let guest = Guest::with_ranges(&[(BASE, SIZE)]);
    guest.write(BASE, &vec![0x5a; SIZE as usize]);
    let mut rig = Rig::with(device, guest, 128);
    rig.activate();
    rig
}

fn pfn(addr: u64) -> u32 {
    u32::try_from(addr / PAGE).unwrap()
}

/// Page `index` of the field.
fn page(index: u64) -> u64 {
    FIELD + index * PAGE
}

fn list(guest: &Guest, pfns: &[u32]) -> Buffer {
    let bytes: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
    guest.put(&bytes)
}

/// Names pages on a queue.
fn name(rig: &mut Rig<Balloon>, queue: u16, pfns: &[u32]) {
    let list = list(&rig.guest, pfns);
    assert_eq!(rig.exchange(queue, &[list]).written, 0);
}

fn inflate(rig: &mut Rig<Balloon>, pages: impl IntoIterator<Item = u64>) {
    let pfns: Vec<u32> = pages.into_iter().map(|index| pfn(page(index))).collect();
    name(rig, INFLATE, &pfns);
}

fn deflate(rig: &mut Rig<Balloon>, pages: impl IntoIterator<Item = u64>) {
    let pfns: Vec<u32> = pages.into_iter().map(|index| pfn(page(index))).collect();
    name(rig, DEFLATE, &pfns);
}

/// Which of the first pages of the field were emptied; the others have to be as they were.
fn gone(rig: &Rig<Balloon>, count: u64) -> Vec<u64> {
    let (full, empty) = ([0x5a; PAGE as usize], [0; PAGE as usize]);
    (0..count)
        .filter(|index| {
            let bytes = rig.guest.read(page(*index), PAGE as usize);
            assert!(bytes == full || bytes == empty, "page {index}");
            bytes == empty
        })
        .collect()
}

/// Which of the first pages of the field the host holds nothing for. To look at a page's contents
/// changes that.
fn absent(rig: &Rig<Balloon>, count: u64) -> Vec<u64> {
    (0..count)
        .filter(|index| rig.guest.resident(page(*index), PAGE) == 0)
        .collect()
}

fn prove(rig: &mut Rig<Balloon>) {
    let metrics = rig.device.handle();
    let before = metrics.metrics().inflated_pages.get();
    let at = rig.guest.alloc(3 * PAGE, PAGE);
    rig.guest.write(at, &[0x77; 3 * PAGE as usize]);
    name(rig, INFLATE, &[pfn(at + PAGE)]);
    let contents = [0x77, 0, 0x77]
        .map(|byte| vec![byte; PAGE as usize])
        .concat();
    assert!(rig.guest.read(at, 3 * PAGE as usize) == contents);
    name(rig, DEFLATE, &[pfn(at + PAGE)]);
    assert_eq!(metrics.metrics().inflated_pages.get(), before + 1);
}

#[test]
fn passes_the_suite_of_all_devices() {
    suite::run(balloon, prove);
}

#[test]
fn inflated_pages_leave_the_host_and_others_stay() {
    let mut rig = rig(balloon());
    assert_eq!(gone(&rig, 16), [0; 0]);
    assert_eq!(absent(&rig, 16), [0; 0]);
    inflate(&mut rig, [3, 5, 6]);
    assert_eq!(absent(&rig, 16), [3, 5, 6]);
    assert_eq!(gone(&rig, 16), [3, 5, 6]);
    let handle = rig.device.handle();
    let metrics = handle.metrics();
    assert_eq!(metrics.inflated_pages.get(), 3);
    assert_eq!(metrics.discarded_bytes.get(), 3 * PAGE);

    // A page taken back is the guest's again, and can be given away again.
    deflate(&mut rig, [5]);
    rig.guest.write(page(5), &[0x5a; PAGE as usize]);
    assert_eq!(gone(&rig, 16), [3, 6]);
    inflate(&mut rig, [5]);
    assert_eq!(metrics.duplicates.get(), 0);
    assert_eq!(metrics.deflated_pages.get(), 1);
}

#[test]
fn nonsense_in_a_list_is_passed_over_and_counted() {
    let mut rig = rig(balloon());
    let mut bytes: Vec<u8> = [
        pfn(page(1)),
        u32::MAX,
        0,
        pfn(BASE) - 1,
        pfn(BASE + SIZE),
        pfn(page(2)),
        pfn(page(1)),
    ]
    .iter()
    .flat_map(|pfn| pfn.to_le_bytes())
    .collect();
    // The beginning of one more number.
    bytes.extend(&pfn(page(4)).to_le_bytes()[..3]);
    let list = rig.guest.put(&bytes);
    assert_eq!(rig.exchange(INFLATE, &[list]).written, 0);
    assert_eq!(gone(&rig, 8), [1, 2]);
    let handle = rig.device.handle();
    let metrics = handle.metrics();
    assert_eq!(metrics.not_ram.get(), 4);
    assert_eq!(metrics.duplicates.get(), 1);
    assert_eq!(metrics.remainders.get(), 1);
    assert_eq!(metrics.inflated_pages.get(), 2);
    // Named once more, later: still one page.
    inflate(&mut rig, [2]);
    assert_eq!(metrics.duplicates.get(), 2);

    name(
        &mut rig,
        DEFLATE,
        &[pfn(page(7)), 0, u32::MAX, pfn(page(1)), pfn(page(1))],
    );
    assert_eq!(metrics.not_inflated.get(), 2);
    assert_eq!(metrics.not_ram.get(), 6);
    assert_eq!(metrics.deflated_pages.get(), 1);
    assert_eq!(rig.faults.count(), 0);
}

#[test]
fn writable_buffers_are_never_read_as_pages() {
    let mut rig = rig(balloon());
    let good = list(&rig.guest, &[pfn(page(1))]);
    let bad = list(&rig.guest, &[pfn(page(2))]);
    let bad = Buffer::writable(bad.addr, bad.len);
    assert_eq!(rig.exchange(INFLATE, &[good, bad]).written, 0);
    assert_eq!(rig.exchange(INFLATE, &[bad]).written, 0);
    assert_eq!(gone(&rig, 8), [1]);
    assert_eq!(rig.device.handle().metrics().wrong_direction.get(), 2);
    assert_eq!(rig.guest.contents(bad), pfn(page(2)).to_le_bytes());
}

#[test]
fn a_list_without_end_is_cut() {
    let mut rig = rig(balloon());
    // All the same page, but for one that lies beyond what is read.
    let mut pfns = vec![pfn(page(1)); wire::MAX_PFNS];
    pfns.push(pfn(page(2)));
    name(&mut rig, INFLATE, &pfns);
    assert_eq!(gone(&rig, 8), [1]);
    let handle = rig.device.handle();
    assert_eq!(handle.metrics().oversized.get(), 1);
    assert_eq!(handle.metrics().duplicates.get(), wire::MAX_PFNS as u64 - 1);
}

#[test]
fn adjacent_pages_go_in_one_discard_in_any_order() {
    let mut rig = rig(balloon());
    inflate(&mut rig, (0..256).rev());
    let handle = rig.device.handle();
    let metrics = handle.metrics();
    assert_eq!(
        (metrics.discards.get(), metrics.discarded_bytes.get()),
        (1, 256 * PAGE)
    );
    // 7 has been in for long: two runs around it.
    deflate(&mut rig, (0..7).chain(8..16));
    inflate(&mut rig, (0..16).map(|index| index * 5 % 16));
    assert_eq!(metrics.discards.get(), 3);
    assert_eq!(metrics.duplicates.get(), 1);
    assert_eq!(gone(&rig, 257).len(), 256);
}

#[test]
fn larger_pages_of_the_host_go_only_whole() {
    for host_page in [16 << 10, 64 << 10] {
        let mut rig = rig(on_host(host_page));
        let count = host_page / PAGE;
        // Two host pages, interleaved, from the second on.
        for index in (count..2 * count - 1).flat_map(|index| [index, index + count]) {
            inflate(&mut rig, [index]);
            assert_eq!(gone(&rig, 4 * count), [0; 0]);
        }
        inflate(&mut rig, [3 * count - 1]);
        assert_eq!(
            absent(&rig, 4 * count),
            Vec::from_iter(2 * count..3 * count)
        );
        assert_eq!(gone(&rig, 4 * count), Vec::from_iter(2 * count..3 * count));
        inflate(&mut rig, [2 * count - 1]);
        assert_eq!(gone(&rig, 4 * count), Vec::from_iter(count..3 * count));

        // One page comes back: its neighbours in the host page may be written by nobody, but it is
        // live, and must survive whatever else is inflated.
        deflate(&mut rig, [count]);
        rig.guest.write(page(count), &[0x5a; PAGE as usize]);
        deflate(&mut rig, [count + 1]);
        inflate(&mut rig, [count + 1]);
        assert_eq!(
            rig.guest.read(page(count), PAGE as usize),
            [0x5a; PAGE as usize]
        );
        inflate(&mut rig, [count]);
        assert_eq!(rig.guest.resident(page(count), host_page), 0);
    }
}

#[test]
fn larger_pages_stay_when_the_driver_need_not_tell_first() {
    let mut rig = rig(on_host(16 << 10));
    rig.device.reset();
    rig.activate_with(F_VERSION_1, 0).unwrap();
    inflate(&mut rig, 0..8);
    assert_eq!(gone(&rig, 8), [0; 0]);
    assert_eq!(rig.device.handle().metrics().inflated_pages.get(), 8);
    // Pages of the same size do no harm.
    let mut rig = super::tests::rig(balloon());
    rig.device.reset();
    rig.activate_with(F_VERSION_1, 0).unwrap();
    inflate(&mut rig, 0..8);
    assert_eq!(gone(&rig, 8).len(), 8);
}

#[test]
fn a_host_page_over_the_end_of_ram_is_never_complete() {
    let end = BASE + SIZE + PAGE;
    let guest = Guest::with_ranges(&[(BASE, SIZE + PAGE)]);
    guest.write(end - PAGE, &[0x5a; PAGE as usize]);
    let mut rig = Rig::with(on_host(16 << 10), guest, 16);
    rig.activate();
    name(
        &mut rig,
        INFLATE,
        &[
            pfn(end - PAGE),
            pfn(end),
            pfn(end + PAGE),
            pfn(end + 2 * PAGE),
        ],
    );
    let handle = rig.device.handle();
    assert_eq!(handle.metrics().discards.get(), 0);
    assert_eq!(
        (
            handle.metrics().inflated_pages.get(),
            handle.metrics().not_ram.get()
        ),
        (1, 3)
    );
    assert_eq!(rig.guest.read(end - PAGE, 1), [0x5a]);
}

#[test]
fn reported_pages_leave_the_host() {
    let mut rig = rig(balloon());
    let report = |rig: &mut Rig<Balloon>, ranges: &[(u64, u64)]| {
        let buffers: Vec<_> = ranges
            .iter()
            .map(|&(at, len)| Buffer::writable(at, len as u32))
            .collect();
        assert_eq!(rig.exchange(REPORTING, &buffers).written, 0);
    };
    report(&mut rig, &[(page(8), 4 * PAGE), (page(2), PAGE)]);
    assert_eq!(absent(&rig, 16), [2, 8, 9, 10, 11]);
    assert_eq!(gone(&rig, 16), [2, 8, 9, 10, 11]);
    let handle = rig.device.handle();
    let metrics = handle.metrics();
    assert_eq!(
        (metrics.reported_bytes.get(), metrics.discards.get()),
        (5 * PAGE, 2)
    );
    assert_eq!(metrics.inflated_pages.get(), 0);
    // Parts of pages stay.
    report(&mut rig, &[(page(4) + 1, 2 * PAGE)]);
    report(&mut rig, &[(page(13), PAGE - 1)]);
    assert_eq!(gone(&rig, 16), [2, 5, 8, 9, 10, 11]);
    assert_eq!(metrics.remainders.get(), 2);
    // So does what is readable.
    let readable = Buffer::readable(page(15), PAGE as u32);
    assert_eq!(rig.exchange(REPORTING, &[readable]).written, 0);
    assert_eq!(metrics.wrong_direction.get(), 1);
    assert_eq!(gone(&rig, 16), [2, 5, 8, 9, 10, 11]);
    assert_eq!(rig.faults.count(), 0);

    // Outside RAM: no buffer of a queue can be there.
    let beyond = Buffer::writable(BASE + SIZE - PAGE, 2 * PAGE as u32);
    rig.submit(REPORTING, &[beyond]);
    assert_eq!(rig.faults.count(), 1);
    assert_eq!(rig.guest.read(BASE + SIZE - PAGE, 1), [0x5a]);
}

#[test]
fn reports_keep_to_whole_pages_of_the_host() {
    let mut rig = rig(on_host(16 << 10));
    let buffer = Buffer::writable(page(3), 10 * PAGE as u32);
    assert_eq!(rig.exchange(REPORTING, &[buffer]).written, 0);
    assert_eq!(gone(&rig, 16), Vec::from_iter(4..12));
}

#[test]
fn queues_are_numbered_by_what_was_negotiated() {
    let offered = balloon();
    assert_eq!(offered.queue_max_sizes().len(), 5);
    assert_eq!(offered.features(), 0b11_1111);
    let mut rig = rig(offered);
    rig.device.reset();
    // Reporting alone: it is queue 2 then.
    rig.activate_queues(F_VERSION_1 | F_PAGE_REPORTING, 0, &[0, 1, 2])
        .unwrap();
    let buffer = Buffer::writable(page(1), PAGE as u32);
    assert_eq!(rig.exchange(2, &[buffer]).written, 0);
    assert_eq!(gone(&rig, 4), [1]);

    let none = BalloonConfig {
        floor: 0,
        page_reporting: false,
        free_page_hint: false,
        stats: false,
        deflate_on_oom: false,
    };
    let plain = Balloon::new(none, MEMORY).unwrap();
    assert_eq!(
        (plain.queue_max_sizes().len(), plain.features()),
        (2, 0b1_0001)
    );
}

#[test]
fn configuration_takes_bytes_halves_and_words() {
    let mut rig = Rig::new(balloon());
    let handle = rig.device.handle();
    handle.set_target(0x1_0203 * PAGE).unwrap();
    assert_eq!(rig.config(0), [0x03, 0x02, 0x01, 0]);
    assert_eq!(rig.config(1), [0x02]);
    assert_eq!(rig.config(2), [0x01, 0]);
    let device = &mut rig.device;
    device.write_config(4, &0x11_u32.to_le_bytes());
    assert_eq!(handle.actual(), 0x11 * PAGE);
    device.write_config(5, &[0x22]);
    device.write_config(6, &[0x33, 0x00]);
    assert_eq!(handle.actual(), 0x33_2211 * PAGE);
    // Over both edges; target and command are not the driver's.
    device.write_config(2, &[0xff, 0xff, 0x44]);
    device.write_config(7, &[0x01, 0xff, 0xff]);
    device.write_config(0, &[0xff; 4]);
    device.write_config(8, &[0xff, 0xff, 0xff, 0xff, 0xaa, 0xbb]);
    device.write_config(15, &[0xdd, 0xff]);
    device.write_config(16, &[0xff; 8]);
    device.write_config(u64::MAX, &[0xff; 8]);
    assert_eq!(handle.actual(), 0x0133_2244 * PAGE);
    assert_eq!(handle.target(), 0x1_0203 * PAGE);
    assert_eq!(rig.config(8), [0, 0, 0, 0, 0xaa, 0xbb, 0, 0xdd]);
    assert_eq!(rig.config(16), [0; 8]);
}

#[test]
fn a_reset_ends_the_drivers_balloon_and_keeps_the_target() {
    let mut rig = rig(balloon());
    let handle = rig.device.handle();
    handle.set_target(4 * PAGE).unwrap();
    inflate(&mut rig, [1]);
    rig.device.write_config(4, &1_u32.to_le_bytes());
    rig.device.reset();
    assert_eq!((handle.target(), handle.actual()), (4 * PAGE, 0));
    let before = rig.interrupt.config_count();
    handle.set_target(5 * PAGE).unwrap();
    assert_eq!(
        rig.interrupt.config_count(),
        before,
        "nobody is there to be told"
    );
    rig.activate();
    inflate(&mut rig, [1]);
    assert_eq!(handle.metrics().duplicates.get(), 0);
}

/// Refuses while told to, and notes what it is asked.
#[derive(Clone, Debug, Default)]
struct Note {
    refuse: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<(u64, u64)>>>,
}

impl Discard for Note {
    fn discard(&self, start: GuestAddress, len: u64) -> Result<(), DiscardError> {
        self.asked.lock().unwrap().push((start.0, len));
        if self.refuse.load(Ordering::SeqCst) {
            let source = io::ErrorKind::InvalidInput.into();
            return Err(DiscardError::Host {
                start: start.0,
                len,
                source,
            });
        }
        Ok(())
    }
}

#[test]
fn a_host_that_refuses_is_counted_and_the_guest_goes_on() {
    let note = Note::default();
    let noting = note.clone();
    let host_of = move |_: &GuestMemory| Host {
        page: PAGE,
        discard: Box::new(noting.clone()),
    };
    let mut rig = rig(Balloon::on_host(config(), MEMORY, Box::new(host_of)).unwrap());
    note.refuse.store(true, Ordering::SeqCst);
    inflate(&mut rig, [1]);
    note.refuse.store(false, Ordering::SeqCst);
    inflate(&mut rig, [2, 3]);
    assert_eq!(
        *note.asked.lock().unwrap(),
        [(page(1), PAGE), (page(2), 2 * PAGE)]
    );
    let handle = rig.device.handle();
    assert_eq!(handle.metrics().discard_failures.get(), 1);
    assert_eq!(handle.metrics().discarded_bytes.get(), 2 * PAGE);
    assert_eq!(handle.metrics().inflated_pages.get(), 3);
    assert_eq!(rig.faults.count(), 0);
}

#[test]
fn more_lists_than_one_turn_takes_are_all_worked_off() {
    let mut rig = rig(balloon());
    for index in 0..40 {
        let list = list(&rig.guest, &[pfn(page(index))]);
        rig.queues[0].submit(&[list]);
    }
    rig.queues[0].kick();
    assert!(rig.run() >= 10, "turns are bounded");
    assert_eq!(gone(&rig, 41).len(), 40);
}

#[test]
fn merging_covers_every_page_once() {
    assert_eq!(pages::merge(vec![], 1), []);
    assert_eq!(pages::merge(vec![9, 3, 1, 2, 8], 1), [(1, 3), (8, 2)]);
    assert_eq!(pages::merge(vec![8, 0, 4, 16], 4), [(0, 12), (16, 4)]);
}

proptest! {
    /// Whatever pages are named in whatever order: gone is exactly what is complete, all else is as
    /// it was.
    #[test]
    fn only_complete_host_pages_in_the_balloon_are_gone(
        host_pages in prop_oneof![Just(1_u64), Just(4)],
        steps in proptest::collection::vec(
            (any::<bool>(), proptest::collection::vec(0..24_u64, 0..40)),
            1..6,
        ),
    ) {
        let mut rig = rig(on_host(host_pages * PAGE));
        let mut inside = [false; 24];
        let mut expected = [0x5a_u8; 24];
        for (deflating, pages) in steps {
            if deflating {
                // A driver writes pages it took back.
                deflate(&mut rig, pages.iter().copied());
                for index in pages {
                    if std::mem::take(&mut inside[index as usize]) {
                        rig.guest.write(page(index), &[0x5a; PAGE as usize]);
                        expected[index as usize] = 0x5a;
                    }
                }
                continue;
            }
            inflate(&mut rig, pages.iter().copied());
            for index in pages {
                if std::mem::replace(&mut inside[index as usize], true) {
                    continue;
                }
                let first = (index - index % host_pages) as usize;
                let host_page = first..first + host_pages as usize;
                if inside[host_page.clone()].iter().all(|inside| *inside) {
                    expected[host_page].fill(0);
                }
            }
            for index in 0..24 {
                let bytes = rig.guest.read(page(index), PAGE as usize);
                prop_assert!(bytes == [expected[index as usize]; PAGE as usize], "page {}", index);
            }
        }
        prop_assert_eq!(rig.guest.read(page(24), 1), [0x5a]);
        prop_assert_eq!(rig.guest.read(page(0) - 1, 1), [0x5a]);
    }

    #[test]
    fn statistics_may_be_anything(bytes in proptest::collection::vec(any::<u8>(), 0..900)) {
        let stats = Stats::parse(&bytes);
        let last_free = bytes
            .chunks_exact(wire::STAT_LEN)
            .take(wire::MAX_STATS)
            .rfind(|stat| stat[..2] == [4, 0])
            .map(|stat| u64::from_le_bytes(stat[2..].try_into().unwrap()));
        prop_assert_eq!(stats.free, last_free);
    }

    #[test]
    fn no_driver_hurts_it(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        suite::survives(balloon(), &bytes, prove);
    }
}
