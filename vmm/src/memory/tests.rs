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
    assert_eq!(
        memory.discard(GuestAddress(page), page).unwrap(),
        Discarded::Freed
    );
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
