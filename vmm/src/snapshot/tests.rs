//! Snapshots written, read back, and spoilt.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::{ProptestConfig, any, prop_assert, prop_assert_eq, proptest};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::format::{HEAD, Head, Image};
use super::*;
use crate::memory::GuestMemory;
use crate::testing::residency::resident_kib;

const MIB: u64 = 1 << 20;

/// Two regions, and something at both ends of each.
fn memory() -> GuestMemory {
    let high = GuestAddress(1 << 32);
    let memory = GuestMemory::anonymous(&[(GuestAddress(0), 4 * MIB), (high, 2 * MIB)]).unwrap();
    for (address, value) in [
        (0, 1_u64),
        (4 * MIB - 8, 2),
        (1 << 32, 3),
        ((1 << 32) + 2 * MIB - 8, 4),
    ] {
        memory.write_obj(value, GuestAddress(address)).unwrap();
    }
    memory
}

fn sections() -> Vec<(Kind, u32, Vec<u8>)> {
    vec![
        (Kind::Machine, 0, b"{\"a\":1}".to_vec()),
        (Kind::Vcpu, 0, b"[]".to_vec()),
        (Kind::Vcpu, 1, b"[1]".to_vec()),
    ]
}

fn full(memory: &GuestMemory) -> File {
    let file = tempfile::tempfile().unwrap();
    image::write(&file, memory, sections(), None).unwrap();
    file
}

fn open(file: &File) -> SnapshotFile {
    SnapshotFile::open(file.try_clone().unwrap()).unwrap()
}

fn contents(memory: &GuestMemory) -> Vec<u8> {
    let mut all = vec![0; 6 << 20];
    let (low, high) = all.split_at_mut(4 << 20);
    memory.read_slice(low, GuestAddress(0)).unwrap();
    memory.read_slice(high, GuestAddress(1 << 32)).unwrap();
    all
}

#[test]
fn what_was_written_is_read_back() {
    let memory = memory();
    let file = full(&memory);
    let snapshot = open(&file);
    assert_eq!(snapshot.memory_len(), 6 * MIB);
    assert_eq!(snapshot.base(), None);
    assert_eq!(snapshot.section(Kind::Vcpu, 1).unwrap(), b"[1]");
    assert!(matches!(
        snapshot.section(Kind::Vcpu, 2),
        Err(SnapshotError::Missing { .. })
    ));
    snapshot.verify_memory().unwrap();
    let mapped = image::map(&[snapshot]).unwrap();
    assert_eq!(contents(&mapped), contents(&memory));
}

#[test]
fn pages_of_zeroes_take_no_room_and_mapping_reads_nothing() {
    let file = full(&memory());
    let used = file.metadata().unwrap().blocks() * 512;
    assert!(used < 512 << 10, "{used} bytes on the disk");
    let mapped = image::map(&[open(&file)]).unwrap();
    for (_, host, len) in mapped.host_ranges() {
        assert!(resident_kib(host, len).is_none_or(|kib| kib == 0));
    }
    mapped.write_obj(5_u8, GuestAddress(8192)).unwrap();
    let (_, host, len) = mapped.host_ranges().next().unwrap();
    let page = mapped.host_page() / 1024;
    assert!(resident_kib(host, len).is_none_or(|kib| kib == page));
}

#[test]
fn clones_do_not_see_each_other() {
    let file = full(&memory());
    let clones: Vec<_> = (0..5)
        .map(|_| image::map(&[open(&file)]).unwrap())
        .collect();
    for (number, clone) in (10_u64..).zip(&clones) {
        clone.write_obj(number, GuestAddress(0)).unwrap();
    }
    for (number, clone) in (10_u64..).zip(&clones) {
        assert_eq!(clone.read_obj::<u64>(GuestAddress(0)).unwrap(), number);
        assert_eq!(clone.read_obj::<u64>(GuestAddress(1 << 32)).unwrap(), 3);
    }
    open(&file).verify_memory().unwrap();
}

#[test]
fn a_diff_has_what_changed_and_needs_its_base() {
    let memory = memory();
    let base = full(&memory);
    memory.write_obj(7_u8, GuestAddress(2 * MIB)).unwrap();
    memory.write_obj(0_u64, GuestAddress(1 << 32)).unwrap();
    let diff = tempfile::tempfile().unwrap();
    image::write(&diff, &memory, sections(), Some(&[open(&base)])).unwrap();
    assert_eq!(open(&diff).base(), Some(open(&base).id()));
    assert_eq!(open(&diff).memory_len(), 2 * 4096);
    open(&diff).verify_memory().unwrap();

    memory.write_obj(8_u8, GuestAddress(3 * MIB)).unwrap();
    let next = tempfile::tempfile().unwrap();
    let chain = [open(&base), open(&diff)];
    image::write(&next, &memory, sections(), Some(&chain)).unwrap();
    assert_eq!(open(&next).memory_len(), 4096);
    let mapped = image::map(&[open(&base), open(&diff), open(&next)]).unwrap();
    assert_eq!(contents(&mapped), contents(&memory));

    let other = full(&memory);
    for wrong in [
        vec![],
        vec![open(&diff)],
        vec![open(&base), open(&next)],
        vec![open(&other), open(&diff)],
        vec![open(&base), open(&other)],
    ] {
        let error = image::map(&wrong).unwrap_err();
        assert!(matches!(error, SnapshotError::Base { .. }), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn runs_of_changes_are_joined_until_they_fit(
        pages in proptest::collection::btree_set(0_u64..1536, 0..300),
        most in 1_usize..40,
    ) {
        let memory = memory();
        // The first 1,024 pages are of the lower region.
        let address = |page: u64| if page < 1024 { page * 4096 } else { (1 << 32) + (page - 1024) * 4096 };
        let runs: Vec<_> = pages.iter().map(|page| (address(*page), 4096)).collect();
        let joined = image::fitted(runs.clone(), most, &memory);
        prop_assert!(joined.len() <= most.max(2), "{:x?}", joined);
        for (start, _) in runs {
            let holds = |(first, len): &(u64, u64)| (*first..first + len).contains(&start);
            prop_assert_eq!(joined.iter().filter(|run| holds(run)).count(), 1);
        }
        for pair in joined.windows(2) {
            prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0);
        }
        for (start, len) in joined {
            prop_assert!(memory.check_range(GuestAddress(start), len as usize));
        }
    }
}

#[test]
fn a_file_has_its_name_once_it_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let names = || std::fs::read_dir(dir.path()).unwrap().count();
    let target = SnapshotTarget::create(dir.path()).unwrap();
    assert_eq!(target.file().metadata().unwrap().mode() & 0o777, 0o600);
    drop(target);
    assert_eq!(names(), 0);

    for _ in 0..2 {
        let target = SnapshotTarget::create(dir.path()).unwrap();
        image::write(target.file(), &memory(), sections(), None).unwrap();
        let path = target.commit().unwrap();
        assert_eq!(path, SnapshotTarget::path_in(dir.path()));
        SnapshotFile::open(File::open(path).unwrap()).unwrap();
        assert_eq!(names(), 1);
    }
    let missing = SnapshotTarget::create(&dir.path().join("no")).unwrap_err();
    assert!(missing.to_string().contains("/no/.snapshot."), "{missing}");
}

#[test]
fn other_files_are_told_from_snapshots() {
    let refused = |bytes: &[u8]| {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        SnapshotFile::open(file).unwrap_err()
    };
    assert!(matches!(refused(b""), SnapshotError::Magic { .. }));
    assert!(matches!(refused(&[0; 70_000]), SnapshotError::Magic { .. }));
    let mut next = b"\x89SMVM\r\n\x1a".to_vec();
    next.extend((VERSION + 1).to_le_bytes());
    let error = refused(&next);
    let (found, expected) = (VERSION + 1, VERSION);
    assert_eq!(
        error.to_string(),
        format!("Snapshot has format version {found}, expected {expected}")
    );
    let (reader, _writer) = std::io::pipe().unwrap();
    let pipe = File::from(std::os::fd::OwnedFd::from(reader));
    assert!(matches!(
        SnapshotFile::open(pipe),
        Err(SnapshotError::Unsound(_))
    ));
}

#[test]
fn every_truncation_is_told() {
    let file = full(&memory());
    let whole = file.metadata().unwrap().len();
    for length in [
        0,
        7,
        11,
        100,
        HEAD - 1,
        HEAD,
        whole / 2,
        whole - 1,
        whole + 1,
    ] {
        file.set_len(length).unwrap();
        let error = SnapshotFile::open(file.try_clone().unwrap()).unwrap_err();
        assert!(
            matches!(
                error,
                SnapshotError::Magic { .. }
                    | SnapshotError::Version { .. }
                    | SnapshotError::Length { .. }
                    | SnapshotError::Checksum { .. }
            ),
            "{length}: {error}"
        );
        // What was cut off is gone: only the first one met a whole file.
        file.set_len(whole).unwrap();
        if length >= HEAD {
            image::write(&file, &memory(), sections(), None).unwrap();
        }
    }
}

#[test]
fn a_state_is_all_of_its_bytes() {
    let states = vec![
        (1_u32, "one".to_owned(), Some(0.5_f64)),
        (2, String::new(), None),
    ];
    let bytes = state::encode(&states).unwrap();
    type States = Vec<(u32, String, Option<f64>)>;
    assert_eq!(state::decode::<States>(&bytes).unwrap(), states);
    for length in 0..bytes.len() {
        let cut = state::decode::<States>(&bytes[..length]);
        assert!(matches!(cut, Err(StateCodeError::Format(_))), "{length}");
    }
    let longer = [&bytes[..], &[0]].concat();
    let error = state::decode::<States>(&longer).unwrap_err();
    assert_eq!(error.to_string(), "1 bytes more than the state has");
    // A list that says it has more than there is room for anywhere.
    let endless = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
    state::decode::<Vec<u64>>(&endless).unwrap_err();
    state::decode::<String>(&endless).unwrap_err();
}

/// Opens and verifies; tells whether anything was wrong.
fn is_refused(file: &File) -> bool {
    SnapshotFile::open(file.try_clone().unwrap())
        .and_then(|snapshot| {
            snapshot.verify_memory()?;
            image::map(&[snapshot]).map(drop)
        })
        .is_err()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_flipped_bit_is_told(at in any::<proptest::sample::Index>(), bit in 0..8_u32) {
        let file = full(&memory());
        let at = at.index(file.metadata().unwrap().len() as usize) as u64;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        byte[0] ^= 1_u8 << bit;
        file.write_all_at(&byte, at).unwrap();
        prop_assert!(is_refused(&file), "bit {} of byte {:#x}", bit, at);
    }

    /// The checksum is right: only the limits stand between the bytes and the reader.
    #[test]
    fn no_head_does_harm(
        edits in proptest::collection::vec((0_usize..400, any::<u8>()), 0..8),
    ) {
        let file = full(&memory());
        let mut head = vec![0; HEAD as usize];
        file.read_exact_at(&mut head, 0).unwrap();
        for (at, value) in edits {
            head[12 + at] = value;
        }
        head[12..16].fill(0);
        let sum = format::checksum(&head).to_le_bytes();
        head[12..16].copy_from_slice(&sum);
        file.write_all_at(&head, 0).unwrap();
        let _ = is_refused(&file);
    }

    #[test]
    fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..300), state in any::<u64>()) {
        parse_anything(&bytes);
        let _ = Image::parse(&bytes, state);
        let _ = Head::parse(&bytes, state);
    }

    #[test]
    fn extents_are_read_as_they_were_written(lens in proptest::collection::vec(1_u64..900, 0..20)) {
        let mut image = Image::default();
        let (mut guest, mut offset) = (0, HEAD);
        for pages in lens {
            let extent = format::Extent { guest, len: pages * 4096, offset };
            image.checksums.extend((0..extent.chunks()).map(|sum| sum as u32));
            guest += extent.len + 4096;
            offset += extent.len;
            image.extents.push(extent);
        }
        prop_assert_eq!(Image::parse(&image.encode(), offset).unwrap(), image);
    }
}
