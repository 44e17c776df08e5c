use std::collections::BTreeMap;
use std::io::Cursor;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    entries: 1000,
    bytes: 1 << 20,
    depth: 8,
};

/// Everything a stream holds, data as bytes.
#[derive(Debug, PartialEq)]
enum Seen {
    Record(Record),
    Data(u64, Vec<u8>),
}

fn decode(bytes: &[u8], limits: Limits) -> Result<Vec<Seen>, Error> {
    let mut decoder = Decoder::new(Cursor::new(bytes), limits);
    let mut seen = Vec::new();
    while let Some(record) = decoder.next_record()? {
        seen.push(match record {
            Record::Data { offset, length } => {
                assert_eq!(decoder.data().len(), length as usize);
                Seen::Data(offset, decoder.data().to_vec())
            }
            record => Seen::Record(record),
        });
    }
    Ok(seen)
}

fn stream(work: impl FnOnce(&mut Encoder<&mut Vec<u8>>)) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, &Attributes::default(), false).unwrap();
    work(&mut encoder);
    encoder.finish().unwrap();
    bytes
}

fn whiteout(name: &[u8]) -> Record {
    Record::Whiteout {
        name: name.to_vec(),
        below: true,
    }
}

fn directory(name: &[u8]) -> Record {
    Record::Directory {
        name: name.to_vec(),
        attributes: Attributes::default(),
        opaque: false,
        below: true,
    }
}

fn file(size: u64, shared: bool) -> Record {
    Record::File {
        name: b"file".to_vec(),
        attributes: Attributes::default(),
        shared,
        size,
    }
}

#[test]
fn ids_travel() {
    let mut bytes = Vec::new();
    ask(&mut bytes, "c1").unwrap();
    assert_eq!(asked(bytes.as_slice()).unwrap(), "c1");
    assert!(ask(&mut bytes, &"x".repeat(256)).is_err());
    assert!(asked([5, b'a'].as_slice()).is_err());
}

#[test]
fn an_empty_stream_is_one() {
    let seen = decode(&stream(|_| {}), LIMITS).unwrap();
    let end = Record::End {
        entries: 0,
        bytes: 0,
    };
    let root = Record::Root {
        attributes: Attributes::default(),
        changed: false,
    };
    assert_eq!(seen, [Seen::Record(root), Seen::Record(end)]);
}

#[test]
fn names_that_are_paths_are_refused() {
    let names: [&[u8]; 7] = [b"", b".", b"..", b"/", b"/etc", b"a/b", b"a\0b"];
    for name in names {
        for record in [whiteout(name), directory(name)] {
            let bytes = stream(|encoder| encoder.record(&record).unwrap());
            let error = decode(&bytes, LIMITS).unwrap_err();
            assert!(matches!(error, Error::Field { .. }), "{name:?}: {error}");
        }
    }
}

#[test]
fn no_name_comes_twice() {
    let decoded = |names: &[&[u8]]| {
        let bytes = stream(|encoder| {
            for name in names {
                encoder.record(&whiteout(name)).unwrap();
            }
        });
        decode(&bytes, LIMITS)
    };
    decoded(&[b"a", b"aa", b"b", b"\xff"]).unwrap();
    for names in [[b"a", b"a"], [b"b", b"a"]] {
        let error = decoded(&[names[0], names[1]]).unwrap_err();
        assert!(error.to_string().contains("above the last"), "{error}");
    }
    // Each directory has an order of its own.
    let bytes = stream(|encoder| {
        for record in [
            directory(b"b"),
            whiteout(b"a"),
            Record::Up,
            directory(b"c"),
            whiteout(b"a"),
            Record::Up,
        ] {
            encoder.record(&record).unwrap();
        }
    });
    decode(&bytes, LIMITS).unwrap();
}

#[test]
fn order_is_held() {
    let misplaced = |work: &dyn Fn(&mut Encoder<&mut Vec<u8>>)| {
        let error = decode(&stream(work), LIMITS).unwrap_err();
        assert!(matches!(error, Error::Order { .. }), "{error}");
    };
    misplaced(&|encoder| encoder.record(&Record::Up).unwrap());
    misplaced(&|encoder| encoder.data(0, b"x").unwrap());
    misplaced(&|encoder| encoder.record(&directory(b"not left")).unwrap());
    misplaced(&|encoder| {
        encoder.record(&file(4, false)).unwrap();
        encoder.record(&whiteout(b"further")).unwrap();
        encoder.data(0, b"x").unwrap();
    });
}

#[test]
fn data_stays_in_its_file() {
    let refused = |pieces: &[(u64, &[u8])]| {
        let bytes = stream(|encoder| {
            encoder.record(&file(4, false)).unwrap();
            for (offset, data) in pieces {
                encoder.data(*offset, data).unwrap();
            }
        });
        decode(&bytes, LIMITS).unwrap_err().to_string()
    };
    assert!(refused(&[(0, b"12345")]).contains("within the file"));
    assert!(refused(&[(4, b"1")]).contains("within the file"));
    assert!(refused(&[(u64::MAX, b"1")]).contains("within the file"));
    assert!(refused(&[(2, b"1"), (1, b"1")]).contains("one after the last"));
    assert!(refused(&[(0, b"")]).contains("1 to 65536"));
    assert!(refused(&[(0, &[0; DATA_MAX + 1])]).contains("1 to 65536"));
}

#[test]
fn links_need_an_inode() {
    let link = Record::Link {
        name: b"link".to_vec(),
        inode: 0,
    };
    for shared in [false, true] {
        let bytes = stream(|encoder| {
            encoder.record(&file(0, shared)).unwrap();
            encoder.record(&link).unwrap();
        });
        assert_eq!(decode(&bytes, LIMITS).is_ok(), shared);
    }
}

#[test]
fn limits_hold() {
    let limits = Limits {
        entries: 2,
        bytes: 3,
        depth: 1,
    };
    let refused = |what: &str, work: &dyn Fn(&mut Encoder<&mut Vec<u8>>)| {
        let error = decode(&stream(work), limits).unwrap_err();
        assert!(matches!(error, Error::Limit { .. }), "{error}");
        assert!(error.to_string().ends_with(what), "{error}");
    };
    refused("2 entries", &|encoder| {
        for name in [b"a", b"b", b"c"] {
            encoder.record(&whiteout(name)).unwrap();
        }
    });
    refused("3 bytes", &|encoder| {
        encoder.record(&file(10, false)).unwrap();
        encoder.data(0, b"1234").unwrap();
    });
    refused("1 directories within one another", &|encoder| {
        encoder.record(&directory(b"a")).unwrap();
        encoder.record(&directory(b"b")).unwrap();
        encoder.record(&Record::Up).unwrap();
        encoder.record(&Record::Up).unwrap();
    });
}

#[test]
fn false_counts_are_refused() {
    let mut bytes = stream(|encoder| encoder.record(&whiteout(b"a")).unwrap());
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    assert!(decode(&bytes, LIMITS).is_err());
}

#[test]
fn attributes_are_checked() {
    let wrong = |change: &dyn Fn(&mut Attributes)| {
        let mut attributes = Attributes::default();
        change(&mut attributes);
        let mut bytes = Vec::new();
        let encoder = Encoder::new(&mut bytes, &attributes, false).unwrap();
        encoder.finish().unwrap();
        let error = decode(&bytes, LIMITS).unwrap_err();
        assert!(matches!(error, Error::Field { .. }), "{error}");
    };
    wrong(&|it| it.mode = 0o10000);
    wrong(&|it| it.uid = u32::MAX);
    wrong(&|it| it.gid = u32::MAX);
    wrong(&|it| it.mtime_ns = 1_000_000_000);
    wrong(&|it| it.xattrs = vec![(Vec::new(), Vec::new())]);
    for name in [
        "user.a\0",
        "trusted.overlay.opaque",
        "trusted.overlay.redirect",
        "security.selinux",
        "security.ima",
        "system.other",
        "other",
    ] {
        wrong(&|it| it.xattrs = vec![(name.into(), Vec::new())]);
    }
    wrong(&|it| it.xattrs = vec![(b"user.a".to_vec(), Vec::new()); XATTRS_MAX + 1]);
    wrong(&|it| it.xattrs = vec![(b"user.a".to_vec(), vec![0; XATTR_BYTES_MAX])]);
}

#[test]
fn whiteouts_are_no_devices() {
    let node = |kind| {
        decode(
            &stream(|encoder| {
                let record = Record::Node {
                    name: b"node".to_vec(),
                    attributes: Attributes::default(),
                    shared: false,
                    kind,
                };
                encoder.record(&record).unwrap();
            }),
            LIMITS,
        )
    };
    assert!(node(NodeKind::Character { major: 0, minor: 0 }).is_err());
    assert!(
        node(NodeKind::Block {
            major: 4096,
            minor: 0
        })
        .is_err()
    );
    assert!(
        node(NodeKind::Block {
            major: 0,
            minor: 1 << 20
        })
        .is_err()
    );
    assert!(node(NodeKind::Character { major: 1, minor: 3 }).is_ok());
    assert!(node(NodeKind::Socket).is_ok());
}

#[test]
fn a_failure_ends_the_stream() {
    let mut bytes = Vec::new();
    let encoder = Encoder::new(&mut bytes, &Attributes::default(), false).unwrap();
    encoder.fail(&"why ".repeat(1000)).unwrap();
    bytes.extend(b"more");
    let seen = decode(&bytes, LIMITS).unwrap();
    assert!(matches!(
        &seen[..],
        [Seen::Record(Record::Root { .. }), Seen::Record(Record::Failed { reason })]
            if reason.len() == REASON_MAX
    ));
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 1..=NAME_MAX).prop_filter("a name", |name| {
        !name.contains(&b'/') && !name.contains(&0) && name != b"." && name != b".."
    })
}

fn attributes() -> impl Strategy<Value = Attributes> {
    let xattr = (vec(1..=u8::MAX, 1..=20), vec(any::<u8>(), 0..100))
        .prop_map(|(name, value)| ([b"user.".to_vec(), name].concat(), value));
    (
        0..=0o7777_u16,
        0..u32::MAX,
        0..u32::MAX,
        any::<i64>(),
        0..1_000_000_000_u32,
        vec(xattr, 0..3),
    )
        .prop_map(|(mode, uid, gid, mtime, mtime_ns, xattrs)| Attributes {
            mode,
            uid,
            gid,
            mtime,
            mtime_ns,
            xattrs,
        })
}

fn kind() -> impl Strategy<Value = NodeKind> {
    prop_oneof![
        Just(NodeKind::Fifo),
        Just(NodeKind::Socket),
        (1..1_u32 << 12, 0..1_u32 << 20)
            .prop_map(|(major, minor)| NodeKind::Character { major, minor }),
        (0..1_u32 << 12, 0..1_u32 << 20)
            .prop_map(|(major, minor)| NodeKind::Block { major, minor }),
    ]
}

/// Records that may stand anywhere in a directory.
fn entry() -> impl Strategy<Value = Record> {
    let target = vec(1..=u8::MAX, 1..200);
    prop_oneof![
        (name(), any::<bool>()).prop_map(|(name, below)| Record::Whiteout { name, below }),
        (name(), attributes(), any::<bool>(), target).prop_map(
            |(name, attributes, shared, target)| Record::Symlink {
                name,
                attributes,
                shared,
                target
            }
        ),
        (name(), attributes(), any::<bool>(), kind()).prop_map(
            |(name, attributes, shared, kind)| Record::Node {
                name,
                attributes,
                shared,
                kind
            }
        ),
        (name(), attributes(), any::<bool>(), 0..1_u64 << 40).prop_map(
            |(name, attributes, shared, size)| Record::File {
                name,
                attributes,
                shared,
                size
            }
        ),
    ]
}

fn name_of(record: &Record) -> Vec<u8> {
    match record {
        Record::Whiteout { name, .. }
        | Record::Symlink { name, .. }
        | Record::Node { name, .. }
        | Record::File { name, .. } => name.clone(),
        other => panic!("{other:?} has no name"),
    }
}

/// Entries in the order of their names, each name once.
fn entries() -> impl Strategy<Value = Vec<Record>> {
    vec(entry(), 0..5).prop_map(|entries| {
        let by_name: BTreeMap<_, _> = entries.into_iter().map(|it| (name_of(&it), it)).collect();
        by_name.into_values().collect()
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        root in attributes(),
        changed in any::<bool>(),
        directories in btree_map(
            name(),
            (attributes(), any::<bool>(), any::<bool>(), entries()),
            0..5,
        ),
        data in vec(any::<u8>(), 1..1000),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(&mut bytes, &root, changed).unwrap();
        let mut expected = vec![Seen::Record(Record::Root { attributes: root, changed })];
        for (name, (attributes, opaque, below, entries)) in directories {
            let directory = Record::Directory { name, attributes, opaque, below };
            encoder.record(&directory).unwrap();
            expected.push(Seen::Record(directory));
            for entry in entries {
                encoder.record(&entry).unwrap();
                let size = match &entry { Record::File { size, .. } => *size, _ => 0 };
                expected.push(Seen::Record(entry));
                if let Some(offset) = size.checked_sub(data.len() as u64) {
                    encoder.data(offset, &data).unwrap();
                    expected.push(Seen::Data(offset, data.clone()));
                }
            }
            encoder.record(&Record::Up).unwrap();
            expected.push(Seen::Record(Record::Up));
        }
        let (entries, counted) = encoder.finish().unwrap();
        expected.push(Seen::Record(Record::End { entries, bytes: counted }));
        prop_assert_eq!(decode(&bytes, LIMITS).unwrap(), expected);
        // Cut anywhere, it is refused.
        prop_assert!(decode(&bytes[..cut.index(bytes.len())], LIMITS).is_err());
    }

    #[test]
    fn any_bytes_are_read_or_refused(
        begins_well in any::<bool>(),
        bytes in vec(prop_oneof![0..12_u8, any::<u8>()], 0..2000),
    ) {
        let mut stream = if begins_well { stream(|_| {}) } else { Vec::new() };
        // Without the end, more may follow.
        stream.truncate(stream.len().saturating_sub(17));
        stream.extend(bytes);
        let mut entries = 0;
        let mut decoder = Decoder::new(Cursor::new(&stream), LIMITS);
        while let Ok(Some(record)) = decoder.next_record() {
            if let Record::Directory { name, .. } | Record::Whiteout { name, .. } = &record {
                entries += 1;
                prop_assert!(!name.contains(&b'/') && !name.is_empty() && name != b"..");
            }
        }
        prop_assert!(entries <= LIMITS.entries);
        prop_assert!(decoder.next_record().unwrap().is_none());
    }
}
