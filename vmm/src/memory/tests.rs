use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use super::*;
use vm_memory::Bytes;

const MIB: u64 = 1 << 20;

fn two_regions() -> GuestMemory {
    GuestMemory::anonymous(&[(GuestAddress(0), 4 * MIB), (GuestAddress(1 << 32), 2 * MIB)]).unwrap()
}

#[test]
fn regions_start_on_huge_pages_of_the_host() {
    let memory = two_regions();
    for (_, host, _) in memory.host_ranges() {
        assert_eq!(host as usize % HUGE_PAGE, 0);
    }
    assert_eq!(memory.size(), 6 * MIB);
}

#[test]
fn accesses_outside_ram_fail() {
    let memory = two_regions();
    memory.write_obj(7u32, GuestAddress(4 * MIB - 4)).unwrap();
    assert!(memory.write_obj(7u32, GuestAddress(4 * MIB - 2)).is_err());
    assert!(memory.write_obj(7u32, GuestAddress(5 * MIB)).is_err());
    assert!(memory.read_obj::<u64>(GuestAddress(u64::MAX - 3)).is_err());
    memory
        .write_obj(9u8, GuestAddress((1 << 32) + 2 * MIB - 1))
        .unwrap();
    assert!(
        memory
            .write_obj(9u8, GuestAddress((1 << 32) + 2 * MIB))
            .is_err()
    );
}

#[test]
fn discard_zeroes_only_the_range() {
    let memory = two_regions();
    let page = memory.host_page();
    for index in 0..3 {
        memory
            .write_obj(0x5aa5u16, GuestAddress(index * page))
            .unwrap();
    }
    memory.discard(GuestAddress(page), page).unwrap();
    let at = |index: u64| memory.read_obj::<u16>(GuestAddress(index * page)).unwrap();
    assert_eq!((at(0), at(1), at(2)), (0x5aa5, 0, 0x5aa5));
}

#[test]
fn discard_refuses_what_is_not_whole_pages_of_one_region() {
    let memory = two_regions();
    let page = memory.host_page();
    let refused = |start: u64, len: u64| memory.discard(GuestAddress(start), len).unwrap_err();
    assert!(matches!(refused(1, page), DiscardError::Unaligned { .. }));
    assert!(matches!(
        refused(0, page - 1),
        DiscardError::Unaligned { .. }
    ));
    assert!(matches!(
        refused(4 * MIB, page),
        DiscardError::NotRam { .. }
    ));
    assert!(matches!(
        refused(4 * MIB - page, 2 * page),
        DiscardError::NotRam { .. }
    ));
    assert!(matches!(
        refused(0, !(page - 1)),
        DiscardError::NotRam { .. }
    ));
}

#[test]
fn ranges_must_be_pages_in_order() {
    let bad = |ranges: &[(GuestAddress, u64)]| GuestMemory::anonymous(ranges).unwrap_err();
    let page = GuestAddress;
    assert!(matches!(bad(&[(page(0), 0)]), MemoryError::BadRange { .. }));
    assert!(matches!(
        bad(&[(page(0), 4095)]),
        MemoryError::BadRange { .. }
    ));
    assert!(matches!(
        bad(&[(page(1), 4096)]),
        MemoryError::BadRange { .. }
    ));
    assert!(matches!(
        bad(&[(page(u64::MAX - 4095), 8192)]),
        MemoryError::BadRange { .. }
    ));
    assert!(matches!(
        bad(&[(page(0), 8192), (page(4096), 4096)]),
        MemoryError::BadRange { start: 4096, .. }
    ));
}

/// Four pages of memory, each beginning with a number, of which the middle two are discarded.
fn discard_the_middle(memory: &GuestMemory) {
    let page = memory.host_page();
    let at = |index: u64| GuestAddress(index * page);
    for index in 0..4 {
        memory.write_obj(100 + index as u16, at(index)).unwrap();
    }
    assert_eq!(memory.resident(at(0), 4 * page).unwrap(), 4 * page);
    memory.discard(at(1), 2 * page).unwrap();
    assert_eq!(memory.resident(at(1), 2 * page).unwrap(), 0);
    let numbers: Vec<u16> = (0..4)
        .map(|index| memory.read_obj(at(index)).unwrap())
        .collect();
    assert_eq!(numbers, [100, 0, 0, 103]);
    // It is memory like any other, and can go again.
    memory.write_obj(7_u16, at(1)).unwrap();
    assert_eq!(memory.read_obj::<u16>(at(1)).unwrap(), 7);
    memory.discard(at(0), 2 * page).unwrap();
    assert_eq!(memory.read_obj::<u64>(at(0)).unwrap(), 0);
    assert_eq!(memory.read_obj::<u64>(at(1)).unwrap(), 0);
    assert_eq!(memory.read_obj::<u16>(at(3)).unwrap(), 103);
}

#[test]
fn anonymous_memory_is_discarded() {
    discard_the_middle(&two_regions());
}

#[cfg(target_os = "linux")]
#[test]
fn shared_memory_is_discarded() {
    discard_the_middle(&GuestMemory::shared(&[(GuestAddress(0), MIB)]).unwrap());
}

/// A file of `size` bytes, all `0x5a`, without a name.
fn file(size: u64) -> std::fs::File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![0x5a; size as usize]).unwrap();
    file
}

#[test]
fn copies_of_a_file_are_discarded_and_never_show_the_file_again() {
    let page = GuestMemory::anonymous(&[(GuestAddress(0), MIB)])
        .unwrap()
        .host_page();
    let file = file(2 * MIB + page);
    let ranges = [
        FileRange {
            start: GuestAddress(0),
            size: MIB,
            offset: page,
        },
        FileRange {
            start: GuestAddress(1 << 32),
            size: MIB,
            offset: MIB + page,
        },
    ];
    file.write_all_at(&[1], page).unwrap();
    file.write_all_at(&[2], MIB + page).unwrap();
    let [memory, other] = [(); 2].map(|()| GuestMemory::from_file(&file, &ranges).unwrap());
    let read = |memory: &GuestMemory, at: u64| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
    assert_eq!((read(&memory, 0), read(&memory, 1 << 32)), (1, 2));
    assert_eq!(read(&memory, 8 * page), 0x5a);

    // Never touched, read, written: all are gone alike, in this copy.
    memory.write_obj(9_u8, GuestAddress(9 * page)).unwrap();
    memory.discard(GuestAddress(7 * page), 3 * page).unwrap();
    assert_eq!(
        memory.resident(GuestAddress(7 * page), 3 * page).unwrap(),
        0
    );
    assert_eq!([7, 8, 9].map(|index| read(&memory, index * page)), [0; 3]);
    assert_eq!([6, 10].map(|index| read(&memory, index * page)), [0x5a; 2]);
    discard_the_middle(&memory);
    assert_eq!([7, 8, 9].map(|index| read(&other, index * page)), [0x5a; 3]);
    let mut unchanged = [0; 1];
    file.read_exact_at(&mut unchanged, 10 * page).unwrap();
    assert_eq!(unchanged, [0x5a]);
}

#[test]
fn a_file_shorter_than_the_guests_ram_is_refused() {
    let range = FileRange {
        start: GuestAddress(0),
        size: MIB,
        offset: 4096,
    };
    let error = GuestMemory::from_file(&file(MIB), &[range]).unwrap_err();
    assert!(
        matches!(error, MemoryError::ShortFile { len: MIB, needed } if needed == MIB + 4096),
        "{error}"
    );
}

/// What was called, with guest address and length.
type Call = (&'static str, u64, u64);

/// Notes what it is told, and refuses to map or unmap on request.
#[derive(Clone, Debug)]
struct Map {
    unit: u64,
    calls: Arc<Mutex<Vec<Call>>>,
    refuses: Arc<Mutex<Option<&'static str>>>,
}

impl Map {
    fn note(&self, call: &'static str, start: u64, len: u64) -> io::Result<()> {
        self.calls.lock().unwrap().push((call, start, len));
        if *self.refuses.lock().unwrap() == Some(call) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(())
    }
}

impl StageTwo for Map {
    fn unit(&self) -> u64 {
        self.unit
    }

    fn unmap(&self, start: GuestAddress, len: u64) -> io::Result<()> {
        self.note("unmap", start.0, len)
    }

    fn map(&self, start: GuestAddress, len: u64) -> io::Result<()> {
        self.note("map", start.0, len)
    }
}

/// Memory of a hypervisor that takes `pages` at once.
fn mapped(pages: u64) -> (GuestMemory, Map) {
    let memory = two_regions();
    let map = Map {
        unit: pages * memory.host_page(),
        calls: Arc::default(),
        refuses: Arc::default(),
    };
    memory.set_stage_two(Box::new(map.clone()));
    (memory, map)
}

#[test]
fn what_a_hypervisor_takes_as_one_is_discarded_as_one() {
    let (memory, map) = mapped(16);
    let page = memory.host_page();
    assert_eq!(memory.discard_unit(), 16 * page);
    for (start, len) in [(16, 15), (17, 16), (8, 16)] {
        let refused = memory.discard(GuestAddress(start * page), len * page);
        assert!(matches!(refused, Err(DiscardError::Unaligned { .. })));
    }
    assert!(map.calls.lock().unwrap().is_empty());
    memory.discard(GuestAddress(16 * page), 32 * page).unwrap();
    let range = (16 * page, 32 * page);
    assert_eq!(
        *map.calls.lock().unwrap(),
        [("unmap", range.0, range.1), ("map", range.0, range.1)]
    );
}

#[test]
fn a_hypervisor_that_holds_pages_is_told_before_and_after() {
    let (memory, map) = mapped(1);
    discard_the_middle(&memory);
    map.calls.lock().unwrap().clear();

    let (start, page) = (GuestAddress((1 << 32) + 4096 * 16), memory.host_page() * 2);
    memory.write_obj(5_u8, start).unwrap();
    memory.discard(start, page).unwrap();
    assert_eq!(
        *map.calls.lock().unwrap(),
        [("unmap", start.0, page), ("map", start.0, page)]
    );
    assert_eq!(memory.read_obj::<u8>(start).unwrap(), 0);

    // What can't be taken from the guest is left alone.
    memory.write_obj(6_u8, start).unwrap();
    *map.refuses.lock().unwrap() = Some("unmap");
    assert!(matches!(
        memory.discard(start, page),
        Err(DiscardError::Host { .. })
    ));
    assert_eq!(memory.read_obj::<u8>(start).unwrap(), 6);
}
