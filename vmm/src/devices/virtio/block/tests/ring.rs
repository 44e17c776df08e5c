//! Several requests at once, where the host has io_uring; where it hasn't, the same one by one.

use super::*;
use crate::sys::ring::Rings;

/// A disk of two files, the second a little longer than whole sectors.
#[derive(Debug)]
struct Two {
    parts: [Part; 2],
}

const FIRST: u64 = 3 * SECTOR + 100;

fn two() -> (Block, [File; 2]) {
    let files = [1_u8, 2].map(|byte| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[byte; FIRST as usize]).unwrap();
        file
    });
    let [first, second] = [0, 1].map(|index| files[index].try_clone().unwrap());
    let part = |file, start| Part {
        file,
        start,
        len: FIRST,
    };
    let backend = Two {
        parts: [part(first, 0), part(second, FIRST)],
    };
    let config = BlockConfig {
        id: "block0".into(),
        backend: Box::new(backend),
        read_only: false,
        serial: String::new(),
    };
    (Block::new(config).unwrap(), files)
}

/// A backend that does nothing by itself: one request alone would fail.
impl Backend for Two {
    fn size(&self) -> u64 {
        2 * FIRST
    }
    fn parts(&self) -> &[Part] {
        &self.parts
    }
    fn read(&mut self, _: u64, _: Vec<VolatileSlice<'_>>) -> io::Result<()> {
        Err(io::Error::other("one by one"))
    }
    fn write(&mut self, _: u64, _: Vec<VolatileSlice<'_>>) -> io::Result<()> {
        Err(io::Error::other("one by one"))
    }
    fn flush(&mut self) -> io::Result<()> {
        Err(io::Error::other("one by one"))
    }
    fn discard(&mut self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&mut self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
}

fn has_rings() -> bool {
    Rings::OnDemand
        .take(&[&tempfile::tempfile().unwrap()])
        .is_ok()
}

/// Requests made available together; their data and status, once all are answered.
struct Together {
    statuses: Vec<Buffer>,
}

impl Together {
    fn submit(rig: &mut Rig<Block>, requests: &[(u32, u64, Option<Buffer>)]) -> Self {
        let statuses = requests
            .iter()
            .map(|&(kind, sector, data)| {
                let status = rig.guest.room(1);
                let mut buffers = vec![header(&rig.guest, kind, sector)];
                buffers.extend(data);
                buffers.push(status);
                rig.queues[0].submit(&buffers);
                status
            })
            .collect();
        rig.queues[0].kick();
        Self { statuses }
    }

    fn answers(&self, rig: &mut Rig<Block>) -> Vec<u8> {
        let mut left = self.statuses.len();
        rig.run_until(|rig| {
            while rig.used(0).is_some() {
                left -= 1;
            }
            left == 0
        });
        self.statuses
            .iter()
            .flat_map(|status| rig.guest.contents(*status))
            .collect()
    }
}

#[test]
fn requests_over_the_edges_of_files_are_done_together() {
    if !has_rings() {
        return;
    }
    let (device, files) = two();
    let mut rig = Rig::new(device);
    rig.activate();
    let room = |rig: &Rig<Block>, sectors: u32| rig.guest.room(sectors * SECTOR as u32);
    // The third sector's end is the second file's beginning.
    let over = room(&rig, 3);
    let source = rig.guest.put(&[9; 1024]);
    let requests = [
        (IN, 0, Some(room(&rig, 1))),
        (IN, 1, Some(over)),
        (OUT, 4, Some(source)),
        (FLUSH, 0, None),
    ];
    let all = Together::submit(&mut rig, &requests);
    // A request that finds itself alone is done by the backend.
    assert_eq!(all.answers(&mut rig), [OK, OK, OK, OK]);
    let contents = rig.guest.contents(over);
    let edge = (FIRST - SECTOR) as usize;
    assert!(contents[..edge].iter().all(|byte| *byte == 1));
    assert!(contents[edge..].iter().all(|byte| *byte == 2));
    let mut written = [0; 1024];
    files[1]
        .read_exact_at(&mut written, 4 * SECTOR - FIRST)
        .unwrap();
    assert_eq!(written, [9; 1024]);
    let metrics = rig.device.metrics();
    assert_eq!(
        (
            metrics.reads.get(),
            metrics.writes.get(),
            metrics.flushes.get()
        ),
        (2, 1, 1)
    );
    assert_eq!(metrics.read_bytes.get(), 4 * SECTOR);
    // At most one for each, and fewer for what ends together.
    assert!((1..=4).contains(&rig.interrupt.used_count()));
    assert_eq!(rig.faults.count(), 0);
}

#[test]
fn errors_of_one_are_not_those_of_others() {
    let file = image();
    let mut rig = rig(&file);
    file.set_len(10 * SECTOR).unwrap();
    let requests: Vec<_> = [3, 9, 10, 4]
        .map(|sector| (IN, sector, Some(rig.guest.room(512))))
        .into();
    let all = Together::submit(&mut rig, &requests);
    assert_eq!(all.answers(&mut rig), [OK, OK, IO_ERROR, OK]);
    assert_eq!(rig.guest.contents(requests[3].2.unwrap()), [4; 512]);
    let metrics = rig.device.metrics();
    assert_eq!((metrics.reads.get(), metrics.io_errors.get()), (3, 1));
    prove(&mut rig);
}

#[test]
fn without_flush_writes_are_durable_before_they_are_answered() {
    let file = image();
    let mut rig = Rig::new(disk(&file, false));
    rig.activate_with(F_VERSION_1, 0).unwrap();
    let source = rig.guest.put(&[0x33; 512]);
    let requests = [7, 8, 9].map(|sector| (OUT, sector, Some(source)));
    let all = Together::submit(&mut rig, &requests);
    assert_eq!(all.answers(&mut rig), [OK; 3]);
    assert_eq!(file_bytes(&file, 7, 3), [0x33; 1536]);
    assert_eq!(rig.device.metrics().writes.get(), 3);
}

#[test]
fn a_reset_waits_for_what_is_under_way() {
    let file = image();
    for _ in 0..20 {
        let mut rig = rig(&file);
        let data = rig.guest.room(16 * 512);
        let pieces = (0..5).map(|index| Buffer {
            addr: data.addr + index * 512,
            len: 512,
            writable: true,
        });
        let requests: Vec<_> = (1..)
            .zip(pieces)
            .map(|(at, to)| (IN, at, Some(to)))
            .collect();
        Together::submit(&mut rig, &requests);
        rig.turn(std::time::Duration::ZERO);
        rig.device.reset();
        // From here on the memory is the guest's.
        rig.guest.write(data.addr, &[0xcc; 16 * 512]);
        rig.run();
        assert_eq!(rig.guest.contents(data), [0xcc; 16 * 512]);
        rig.activate();
        prove(&mut rig);
    }
}

proptest! {
    #[test]
    fn no_driver_hurts_it(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let file = image();
        suite::survives(disk(&file, false), &bytes, prove);
    }
}
