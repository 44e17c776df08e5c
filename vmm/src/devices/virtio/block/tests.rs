mod fill;
mod ring;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::wire::{Disk, HEADER_LEN, Request, SECTOR, Status, parse, parse_range};
use super::*;
use crate::devices::virtio::{F_VERSION_1, VirtioDevice};
use crate::testing::{Buffer, Guest, Rig, suite};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const SECTORS: u64 = 2048;

/// A disk of 1 MiB, each sector filled with its number.
fn image() -> File {
    let mut file = tempfile::tempfile().unwrap();
    for sector in 0..SECTORS {
        file.write_all(&[sector as u8; SECTOR as usize]).unwrap();
    }
    file
}

fn disk(file: &File, read_only: bool) -> Block {
    let backend = Box::new(FileBackend::open(file.try_clone().unwrap(), read_only).unwrap());
    let serial = "disk-7".to_owned();
    Block::new(BlockConfig {
        id: "block0".into(),
        backend,
        read_only,
        serial,
    })
    .unwrap()
}

fn rig(file: &File) -> Rig<Block> {
    let mut rig = Rig::new(disk(file, false));
    rig.activate();
    rig
}

fn header(guest: &Guest, kind: u32, sector: u64) -> Buffer {
    let mut bytes = [0; HEADER_LEN];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    guest.put(&bytes)
}

/// Sends a request with these buffers between header and status; returns the status.
fn request(rig: &mut Rig<Block>, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
    let status = rig.guest.room(1);
    let mut buffers = vec![header(&rig.guest, kind, sector)];
    buffers.extend_from_slice(data);
    buffers.push(status);
    let used = rig.exchange(0, &buffers);
    let writable: u32 = buffers
        .iter()
        .filter(|buffer| buffer.writable)
        .map(|buffer| buffer.len)
        .sum();
    assert_eq!(used.written, writable);
    rig.guest.contents(status)[0]
}

fn range(guest: &Guest, sector: u64, count: u32, flags: u32) -> Buffer {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&count.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    guest.put(&bytes)
}

fn file_bytes(file: &File, sector: u64, count: u64) -> Vec<u8> {
    let mut bytes = vec![0; (count * SECTOR) as usize];
    file.read_exact_at(&mut bytes, sector * SECTOR).unwrap();
    bytes
}

/// Writes, reads back, flushes and asks for the name.
fn prove(rig: &mut Rig<Block>) {
    let data: Vec<u8> = (0..1024_u32).map(|at| (at * 7) as u8).collect();
    let source = rig.guest.put(&data);
    assert_eq!(request(rig, OUT, 5, &[source]), OK);
    let target = rig.guest.room(1024);
    assert_eq!(request(rig, IN, 5, &[target]), OK);
    assert_eq!(rig.guest.contents(target), data);
    assert_eq!(request(rig, FLUSH, 0, &[]), OK);
    let name = rig.guest.room(20);
    assert_eq!(request(rig, GET_ID, 0, &[name]), OK);
    assert_eq!(
        rig.guest.contents(name),
        b"disk-7\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
}

#[test]
fn passes_the_suite_of_all_devices() {
    let file = image();
    suite::run(|| disk(&file, false), prove);
}

#[test]
fn configuration_says_what_the_disk_is() {
    let file = image();
    file.set_len(SECTORS * SECTOR + 100).unwrap();
    let writable = Rig::new(disk(&file, false));
    assert_eq!(
        u64::from_le_bytes(writable.config(0)),
        SECTORS,
        "whole sectors only"
    );
    assert_eq!(u32::from_le_bytes(writable.config(12)), 254);
    assert_eq!(u32::from_le_bytes(writable.config(20)), 512);
    assert_eq!(u32::from_le_bytes(writable.config(40)), wire::MAX_RANGES);
    assert_eq!(writable.config(56), [1]);
    let features = writable.device.features();
    assert_eq!(features & (1 << 5), 0);
    assert_ne!(features & (1 << 9), 0);
    assert_ne!(features & (1 << 13), 0);

    let read_only = Rig::new(disk(&file, true));
    assert_ne!(read_only.device.features() & (1 << 5), 0);
    assert_eq!(read_only.device.features() & (1 << 13 | 1 << 14), 0);
    assert_eq!(u32::from_le_bytes(read_only.config(36)), 0);
}

#[test]
fn serials_fit_twenty_bytes() {
    let make = |serial: &str| {
        let backend = Box::new(FileBackend::open(tempfile::tempfile().unwrap(), true).unwrap());
        let serial = serial.to_owned();
        Block::new(BlockConfig {
            id: "block0".into(),
            backend,
            read_only: true,
            serial,
        })
    };
    make("12345678901234567890").unwrap();
    for bad in ["123456789012345678901", "nul\0"] {
        assert!(matches!(make(bad), Err(BlockError::Serial { serial }) if serial == bad));
    }
}

#[test]
fn files_must_fit_the_disk() {
    let named = tempfile::NamedTempFile::new().unwrap();
    let read_only = || File::open(named.path()).unwrap();
    FileBackend::open(read_only(), true).unwrap();
    let error = FileBackend::open(read_only(), false).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    let directory = tempfile::tempdir().unwrap();
    let error = FileBackend::open(File::open(directory.path()).unwrap(), true).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn data_may_be_cut_anywhere() {
    let file = image();
    let mut rig = rig(&file);
    let data: Vec<u8> = (0..1536_u32).map(|at| ((at * 11) >> 3) as u8).collect();
    let (first, rest) = rig.guest.put(&data).split(3);
    let (second, third) = rest.split(1000);
    assert_eq!(request(&mut rig, OUT, 9, &[first, second, third]), OK);
    assert_eq!(file_bytes(&file, 9, 3), data);
    // Neighbours are as before.
    assert_eq!(file_bytes(&file, 8, 1), [8; 512]);
    assert_eq!(file_bytes(&file, 12, 1), [12; 512]);

    // The status may share a buffer with the end of the data.
    let room = rig.guest.room(1537);
    let (first, rest) = room.split(511);
    let header = header(&rig.guest, IN, 9);
    assert_eq!(rig.exchange(0, &[header, first, rest]).written, 1537);
    let answer = rig.guest.contents(room);
    assert_eq!((&answer[..1536], answer[1536]), (&data[..], OK));

    // And the header with the beginning of the data.
    let mut whole = rig
        .guest
        .contents(super::tests::header(&rig.guest, OUT, 20));
    whole.extend([0x77; 512]);
    let (first, rest) = rig.guest.put(&whole).split(7);
    let status = rig.guest.room(1);
    rig.exchange(0, &[first, rest, status]);
    assert_eq!(rig.guest.contents(status), [OK]);
    assert_eq!(file_bytes(&file, 20, 1), [0x77; 512]);
}

#[test]
fn requests_end_with_the_disk() {
    let file = image();
    let mut rig = rig(&file);
    let sectors = |rig: &Rig<Block>, count: u32| rig.guest.room(count * 512);
    for (sector, count, expected) in [
        (SECTORS - 1, 1, OK),
        (SECTORS - 1, 2, IO_ERROR),
        (SECTORS, 1, IO_ERROR),
        (u64::MAX, 1, IO_ERROR),
        (u64::MAX / 512, 1, IO_ERROR),
        (u64::MAX / 512 + 1, 1, IO_ERROR),
    ] {
        let target = sectors(&rig, count);
        assert_eq!(
            request(&mut rig, IN, sector, &[target]),
            expected,
            "{count} at {sector}"
        );
        let source = Buffer::readable(target.addr, target.len);
        assert_eq!(
            request(&mut rig, OUT, sector, &[source]),
            expected,
            "{count} at {sector}"
        );
    }
    // Nothing but whole sectors.
    let part = rig.guest.room(511);
    assert_eq!(request(&mut rig, IN, 0, &[part]), IO_ERROR);
    assert_eq!(
        request(&mut rig, OUT, 0, &[Buffer::readable(part.addr, 513)]),
        IO_ERROR
    );
    assert_eq!(file.metadata().unwrap().len(), SECTORS * SECTOR);
    assert_eq!(file_bytes(&file, 0, 1), [0; 512]);
    assert_eq!(rig.device.metrics().io_errors.get(), 12);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let file = image();
    let mut rig = Rig::new(disk(&file, true));
    rig.activate();
    let source = rig.guest.put(&[0xff; 512]);
    let range = range(&rig.guest, 4, 1, 0);
    assert_eq!(request(&mut rig, OUT, 4, &[source]), IO_ERROR);
    assert_eq!(request(&mut rig, DISCARD, 0, &[range]), IO_ERROR);
    assert_eq!(request(&mut rig, WRITE_ZEROES, 0, &[range]), IO_ERROR);
    assert_eq!(file_bytes(&file, 4, 1), [4; 512]);
    assert_eq!(request(&mut rig, FLUSH, 0, &[]), OK);
    let target = rig.guest.room(512);
    assert_eq!(request(&mut rig, IN, 4, &[target]), OK);
    assert_eq!(rig.guest.contents(target), [4; 512]);
}

#[test]
fn malformed_requests_are_answered_and_the_disk_goes_on() {
    let file = image();
    let mut rig = rig(&file);
    let metrics = rig.device.metrics();
    assert_eq!(request(&mut rig, 99, 0, &[]), UNSUPPORTED);
    assert_eq!(request(&mut rig, u32::MAX, 0, &[]), UNSUPPORTED);
    assert_eq!(metrics.unsupported.get(), 2);
    let short = rig.guest.room(19);
    assert_eq!(request(&mut rig, GET_ID, 0, &[short]), IO_ERROR);

    // No whole header.
    let status = rig.guest.room(1);
    let stub = rig.guest.put(&[0; 15]);
    rig.exchange(0, &[stub, status]);
    assert_eq!(rig.guest.contents(status), [IO_ERROR]);
    rig.guest.write(status.addr, &[0xaa]);
    rig.exchange(0, &[status]);
    assert_eq!(rig.guest.contents(status), [IO_ERROR]);

    // No room for a status.
    let header = header(&rig.guest, FLUSH, 0);
    assert_eq!(rig.exchange(0, &[header]).written, 0);
    assert_eq!(metrics.unanswerable.get(), 1);
    assert_eq!(rig.faults.count(), 0);
    prove(&mut rig);
}

#[test]
fn discarded_space_goes_back_to_the_host() {
    let file = image();
    file.sync_all().unwrap();
    let mut rig = rig(&file);
    let before = file.metadata().unwrap().blocks();
    let ranges = [
        range(&rig.guest, 512, 512, 0),
        range(&rig.guest, 1536, 256, 0),
    ];
    assert_eq!(request(&mut rig, DISCARD, 0, &ranges), OK);
    assert_eq!(rig.device.metrics().cleared_bytes.get(), 768 * 512);
    assert!(
        file.metadata().unwrap().blocks() <= before - 700,
        "no space was given back"
    );
    assert_eq!(file.metadata().unwrap().len(), SECTORS * SECTOR);
    let target = rig.guest.room(512);
    for (sector, byte) in [
        (511, 255),
        (512, 0),
        (1023, 0),
        (1024, 0),
        (1025, 1),
        (1792, 0),
    ] {
        assert_eq!(request(&mut rig, IN, sector, &[target]), OK);
        assert_eq!(rig.guest.contents(target), [byte; 512], "sector {sector}");
    }
}

#[test]
fn zeroed_ranges_read_as_zeroes_with_and_without_their_space() {
    let file = image();
    let mut rig = rig(&file);
    // Neither begins nor ends on a block of the file system.
    for (first, unmap) in [(259_u64, 1), (1283, 0)] {
        let range = range(&rig.guest, first, 101, unmap);
        assert_eq!(request(&mut rig, WRITE_ZEROES, 0, &[range]), OK);
        assert_eq!(file_bytes(&file, first, 101), vec![0; 101 * 512]);
        assert_eq!(file_bytes(&file, first - 1, 1), [(first - 1) as u8; 512]);
        assert_eq!(
            file_bytes(&file, first + 101, 1),
            [(first + 101) as u8; 512]
        );
    }
}

#[test]
fn ranges_are_checked_before_the_first_is_touched() {
    let file = image();
    let mut rig = rig(&file);
    let good = range(&rig.guest, 100, 8, 0);
    let unmap_flag = range(&rig.guest, 100, 8, 1);
    let reserved_flag = range(&rig.guest, 100, 8, 2);
    let beyond = range(&rig.guest, SECTORS - 1, 2, 0);
    let huge = range(&rig.guest, 0, wire::MAX_RANGE_SECTORS + 1, 0);
    let part = Buffer { len: 8, ..good };
    for (kind, ranges, expected) in [
        (DISCARD, vec![good, unmap_flag], UNSUPPORTED),
        (DISCARD, vec![good, reserved_flag], UNSUPPORTED),
        (WRITE_ZEROES, vec![good, reserved_flag], UNSUPPORTED),
        (DISCARD, vec![good, beyond], IO_ERROR),
        (WRITE_ZEROES, vec![good, beyond], IO_ERROR),
        (DISCARD, vec![good, huge], IO_ERROR),
        (DISCARD, vec![good, part], IO_ERROR),
        (DISCARD, vec![], IO_ERROR),
    ] {
        assert_eq!(
            request(&mut rig, kind, 0, &ranges),
            expected,
            "{kind} {ranges:?}"
        );
    }
    let many = rig.guest.put(&[0; 16 * (wire::MAX_RANGES as usize + 1)]);
    assert_eq!(request(&mut rig, DISCARD, 0, &[many]), IO_ERROR);
    assert_eq!(file_bytes(&file, 100, 1), [100; 512]);
    assert_eq!(rig.device.metrics().cleared_bytes.get(), 0);
}

#[test]
fn a_backing_file_cut_short_is_an_error_and_no_hang() {
    let file = image();
    let mut rig = rig(&file);
    file.set_len(10 * SECTOR + 100).unwrap();
    let target = rig.guest.room(1024);
    assert_eq!(request(&mut rig, IN, 8, &[target]), OK);
    assert_eq!(request(&mut rig, IN, 9, &[target]), IO_ERROR);
    assert_eq!(request(&mut rig, IN, 11, &[target]), IO_ERROR);
    assert_eq!(rig.faults.count(), 0);
    prove(&mut rig);
}

#[test]
fn more_requests_than_one_turn_takes_are_all_answered() {
    let file = image();
    let mut rig = Rig::with(disk(&file, false), Guest::new(8 << 20), 256);
    rig.activate();
    let target = rig.guest.room(512);
    let status = rig.guest.room(1);
    let header = header(&rig.guest, IN, 3);
    for _ in 0..85 {
        rig.queues[0].submit(&[header, target, status]);
    }
    rig.queues[0].kick();
    assert!(rig.run() > 1, "one turn is bounded");
    let mut answered = 0;
    while let Some(used) = rig.used(0) {
        assert_eq!(used.written, 513);
        answered += 1;
    }
    assert_eq!(answered, 85);
    assert_eq!(rig.guest.contents(status), [OK]);
    assert_eq!(rig.device.metrics().reads.get(), 85);
    // The driver looked at none of them meanwhile: it asked for the first interrupt only.
    assert_eq!(rig.interrupt.used_count(), 1);
}

#[test]
fn requests_made_before_activation_are_served() {
    let file = image();
    let mut rig = Rig::new(disk(&file, false));
    rig.activate();
    let (target, status) = (rig.guest.room(512), rig.guest.room(1));
    let header = header(&rig.guest, IN, 3);
    rig.queues[0].submit(&[header, target, status]);
    // No kick.
    rig.run();
    assert_eq!(rig.guest.contents(target), [3; 512]);
}

/// Notes what is asked of it, and fails when told to.
#[derive(Clone, Debug, Default)]
struct Note {
    calls: Arc<Mutex<Vec<String>>>,
    failures: Arc<AtomicUsize>,
}

impl Note {
    fn note(&self, call: String) -> io::Result<()> {
        self.calls.lock().unwrap().push(call);
        let fails = self
            .failures
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            });
        if fails.is_ok() {
            Err(io::Error::other("told to fail"))
        } else {
            Ok(())
        }
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

impl Backend for Note {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read(&mut self, offset: u64, into: Vec<VolatileSlice<'_>>) -> io::Result<()> {
        self.note(format!(
            "read {offset} {}",
            into.iter().map(VolatileSlice::len).sum::<usize>()
        ))
    }
    fn write(&mut self, offset: u64, from: Vec<VolatileSlice<'_>>) -> io::Result<()> {
        self.note(format!(
            "write {offset} {}",
            from.iter().map(VolatileSlice::len).sum::<usize>()
        ))
    }
    fn flush(&mut self) -> io::Result<()> {
        self.note("flush".into())
    }
    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.note(format!("discard {offset} {len}"))
    }
    fn write_zeroes(&mut self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.note(format!("zero {offset} {len} {may_unmap}"))
    }
}

fn noted() -> (Rig<Block>, Note) {
    let note = Note::default();
    let backend = Box::new(note.clone());
    let config = BlockConfig {
        id: "block0".into(),
        backend,
        read_only: false,
        serial: String::new(),
    };
    (Rig::new(Block::new(config).unwrap()), note)
}

#[test]
fn without_flush_the_disk_writes_through() {
    let (mut rig, note) = noted();
    rig.activate_with(F_VERSION_1, 0).unwrap();
    let source = rig.guest.put(&[0; 512]);
    assert_eq!(request(&mut rig, OUT, 2, &[source]), OK);
    assert_eq!(note.take(), ["write 1024 512", "flush"]);
    rig.device.reset();

    rig.activate();
    assert_eq!(request(&mut rig, OUT, 2, &[source]), OK);
    assert_eq!(note.take(), ["write 1024 512"]);
    assert_eq!(request(&mut rig, FLUSH, 0, &[]), OK);
    assert_eq!(note.take(), ["flush"]);
}

#[test]
fn a_failing_backend_is_an_io_error() {
    let (mut rig, note) = noted();
    rig.activate();
    let (source, target) = (rig.guest.put(&[0; 512]), rig.guest.room(512));
    let range = range(&rig.guest, 0, 8, 1);
    let calls: [(u32, Vec<Buffer>); 4] = [
        (IN, vec![target]),
        (OUT, vec![source]),
        (FLUSH, vec![]),
        (WRITE_ZEROES, vec![range]),
    ];
    for (kind, data) in calls {
        note.failures.store(1, Ordering::SeqCst);
        assert_eq!(
            request(&mut rig, kind, 0, &data),
            IO_ERROR,
            "request {kind}"
        );
        assert_eq!(request(&mut rig, kind, 0, &data), OK, "request {kind}");
    }
    assert_eq!(rig.device.metrics().io_errors.get(), 4);
    assert_eq!(rig.faults.count(), 0);
}

#[test]
fn a_reset_disk_may_be_dropped_or_used_by_its_owner() {
    let file = image();
    let mut rig = rig(&file);
    prove(&mut rig);
    drop(rig);
    let mut position = &file;
    position.seek(SeekFrom::Start(5 * SECTOR)).unwrap();
    let mut byte = [0; 2];
    position.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [0, 7]);
}

proptest! {
    #[test]
    fn parsed_requests_lie_on_the_disk(
        header in any::<[u8; HEADER_LEN]>(),
        kind in 0..16_u32,
        near in any::<bool>(),
        readable in prop_oneof![0..5000_u64, any::<u64>()],
        writable in prop_oneof![0..5000_u64, any::<u64>()],
        sectors in 0..4096_u64,
        read_only in any::<bool>(),
    ) {
        let mut header = header;
        header[..4].copy_from_slice(&kind.to_le_bytes());
        if near {
            header[10..].fill(0);
        }
        let disk = Disk { sectors, read_only };
        match parse(disk, header, readable, writable) {
            Ok(Request::Read { offset, len }) => {
                prop_assert_eq!(len, writable);
                prop_assert!(offset + len <= sectors * SECTOR && offset % SECTOR == 0);
            }
            Ok(Request::Write { offset, len }) => {
                prop_assert!(!read_only);
                prop_assert_eq!(len, readable);
                prop_assert!(offset + len <= sectors * SECTOR && offset % SECTOR == 0);
            }
            Ok(Request::Discard { ranges } | Request::WriteZeroes { ranges }) => {
                prop_assert!(!read_only);
                prop_assert_eq!(u64::from(ranges) * 16, readable);
            }
            Ok(Request::Flush | Request::GetId) => {}
            Err(status) => prop_assert_ne!(status, Status::Ok),
        }
    }

    #[test]
    fn parsed_ranges_lie_on_the_disk(
        range in any::<[u8; 16]>(),
        small in any::<bool>(),
        zeroes in any::<bool>(),
        sectors in 0..4096_u64,
    ) {
        let mut range = range;
        if small {
            range[2..8].fill(0);
            range[10..12].fill(0);
            range[12] &= 1;
            range[13..].fill(0);
        }
        if let Ok(range) = parse_range(Disk { sectors, read_only: false }, range, zeroes) {
            prop_assert!(range.offset + range.len <= sectors * SECTOR);
        }
    }

    #[test]
    fn no_driver_hurts_it(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let (rig, _) = noted();
        suite::survives(rig.device, &bytes, |rig| {
            let target = rig.guest.room(512);
            assert_eq!(request(rig, IN, 1, &[target]), OK);
        });
    }
}
