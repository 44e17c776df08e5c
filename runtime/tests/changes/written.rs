//! Streams of honest guests.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::process::Command;

use supermachine_protocol::changes::{Attributes, NodeKind, Record};
use supermachine_runtime::changes::Outcome;

use crate::support::*;

pub(crate) const TESTS: &[(&str, fn())] = &[
    (
        "written::attributes_of_every_kind",
        attributes_of_every_kind,
    ),
    ("written::holes_stay_holes", holes_stay_holes),
    ("written::deletions", deletions),
    (
        "written::directories_over_something",
        directories_over_something,
    ),
    (
        "written::merged_into_what_was_there",
        merged_into_what_was_there,
    ),
    ("written::the_root_itself", the_root_itself),
    ("written::a_plain_directory", a_plain_directory),
];

fn odd() -> Attributes {
    Attributes {
        mode: 0o4751,
        uid: 70_000,
        gid: 42,
        mtime: 1_000_000_000,
        mtime_ns: 123_456_789,
        xattrs: vec![
            // cap_net_raw=ep
            (
                b"security.capability".to_vec(),
                vec![
                    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                ],
            ),
            (b"trusted.note".to_vec(), b"trusted".to_vec()),
        ],
    }
}

fn attributes_of_every_kind() {
    let snapshot = Snapshot::new(true);
    let trusted = Attributes {
        xattrs: vec![(b"trusted.note".to_vec(), b"trusted".to_vec())],
        ..odd()
    };
    let outcome = snapshot.encoded(|encoder| {
        encoder.record(&Record::Node {
            name: b"device".to_vec(),
            attributes: trusted.clone(),
            shared: false,
            kind: NodeKind::Character { major: 1, minor: 3 },
        })?;
        encoder.record(&Record::Directory {
            name: b"directory".to_vec(),
            attributes: trusted.clone(),
            opaque: false,
            below: false,
        })?;
        encoder.record(&file("inside"))?;
        encoder.record(&Record::Up)?;
        for (name, kind) in [("fifo", NodeKind::Fifo), ("fifos", NodeKind::Socket)] {
            encoder.record(&Record::Node {
                name: name.into(),
                attributes: trusted.clone(),
                shared: false,
                kind,
            })?;
        }
        encoder.record(&Record::File {
            name: b"file".to_vec(),
            attributes: odd(),
            shared: true,
            size: 5,
        })?;
        encoder.data(0, b"hello")?;
        encoder.record(&Record::Symlink {
            name: b"link".to_vec(),
            attributes: trusted.clone(),
            shared: false,
            target: b"../../nowhere".to_vec(),
        })?;
        encoder.record(&Record::Link {
            name: b"other".to_vec(),
            inode: 0,
        })?;
        encoder.record(&file("\u{ff}"))
    });
    let written = Outcome::Written {
        entries: 9,
        bytes: 5,
    };
    assert_eq!(outcome, written);
    for name in [
        "device",
        "directory",
        "fifo",
        "fifos",
        "file",
        "link",
        "other",
    ] {
        let path = snapshot.path(name);
        let it = fs::symlink_metadata(&path).unwrap();
        assert_eq!((it.uid(), it.gid()), (70_000, 42), "{name}");
        assert_eq!(
            (it.mtime(), it.mtime_nsec()),
            (1_000_000_000, 123_456_789),
            "{name}"
        );
        if name != "link" {
            assert_eq!(it.mode() & 0o7777, 0o4751, "{name}");
        }
        let mut value = [0; 64];
        let length = rustix::fs::lgetxattr(&path, "trusted.note", &mut value[..]).unwrap();
        assert_eq!(&value[..length], b"trusted", "{name}");
    }
    let kind = |name: &str| {
        fs::symlink_metadata(snapshot.path(name))
            .unwrap()
            .file_type()
    };
    assert!(kind("device").is_char_device() && kind("fifo").is_fifo() && kind("fifos").is_socket());
    assert_eq!(fs::read_to_string(snapshot.path("other")).unwrap(), "hello");
    assert_eq!(fs::metadata(snapshot.path("other")).unwrap().nlink(), 2);
    assert_eq!(
        fs::read_link(snapshot.path("link"))
            .unwrap()
            .as_os_str()
            .as_bytes(),
        b"../../nowhere"
    );
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(snapshot.path("file"), "security.capability", &mut value[..]);
    assert_eq!(length.unwrap(), 20);
}

fn holes_stay_holes() {
    let snapshot = Snapshot::new(true);
    let size = 1 << 30;
    let outcome = snapshot.encoded(|encoder| {
        encoder.record(&Record::File {
            name: b"sparse".to_vec(),
            attributes: plain(0o600),
            shared: false,
            size,
        })?;
        encoder.data(size / 2, b"in the middle")
    });
    assert!(is_written(&outcome), "{outcome:?}");
    let metadata = fs::metadata(snapshot.path("sparse")).unwrap();
    assert_eq!(metadata.len(), size);
    assert!(metadata.blocks() < 64, "{} blocks", metadata.blocks());
}

fn deletions() {
    let snapshot = Snapshot::new(true);
    snapshot.make("own", "");
    snapshot.make("own-over-below", "");
    snapshot.make("tree/deep/er", "");
    // By a program: the calls for it differ between the systems this is compiled for.
    let mut mknod = Command::new("mknod");
    let known = mknod.arg(snapshot.path("known")).args(["c", "0", "0"]);
    assert!(known.status().unwrap().success());
    let outcome = snapshot.records(&[
        gone("below", true),
        gone("known", true),
        gone("own", false),
        gone("own-over-below", true),
        gone("tree", false),
        gone("was-never-there", false),
    ]);
    assert!(is_written(&outcome), "{outcome:?}");
    // Only what a layer below still has is to be hidden: overlayfs would show the rest as names.
    assert_eq!(snapshot.names(), ["below", "known", "own-over-below"]);
    for name in snapshot.names() {
        assert!(is_whiteout(&snapshot.path(&name)), "{name}");
        let it = fs::symlink_metadata(snapshot.path(&name)).unwrap();
        assert_eq!((it.uid(), it.gid()), (0, 0), "{name}");
    }
}

fn directories_over_something() {
    let snapshot = Snapshot::new(true);
    snapshot.make("file", "");
    snapshot.make("hidden/old", "");
    symlink(snapshot.outside(), snapshot.path("link")).unwrap();
    let outcome = snapshot.records(&[
        directory("alone", true, false),
        Record::Up,
        directory("file", false, true),
        Record::Up,
        directory("hidden", true, true),
        file("new"),
        Record::Up,
        directory("link", false, false),
        file("new"),
        Record::Up,
        directory("merged", false, true),
        Record::Up,
    ]);
    assert!(is_written(&outcome), "{outcome:?}");
    assert_eq!(
        snapshot.names(),
        [
            "alone",
            "file",
            "hidden",
            "hidden/new",
            "link",
            "link/new",
            "merged"
        ]
    );
    // What hid a directory below goes on hiding it; what hides nothing has no mark.
    for (name, opaque) in [
        ("alone", false),
        ("file", true),
        ("hidden", true),
        ("link", false),
        ("merged", false),
    ] {
        assert_eq!(is_opaque(&snapshot.path(name)), opaque, "{name}");
        assert!(fs::symlink_metadata(snapshot.path(name)).unwrap().is_dir());
    }
}

fn merged_into_what_was_there() {
    let snapshot = Snapshot::new(true);
    snapshot.make("kept/old", "old");
    snapshot.make("kept/changed", "old");
    snapshot.make("kept/was-a-directory/x", "");
    let path = snapshot.path("kept");
    for name in ["trusted.overlay.opaque", "trusted.old"] {
        let value = b"y";
        rustix::fs::setxattr(&path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
    }
    let outcome = snapshot.encoded(|encoder| {
        encoder.record(&Record::Directory {
            name: b"kept".to_vec(),
            attributes: Attributes {
                mode: 0o711,
                ..odd()
            },
            opaque: false,
            below: true,
        })?;
        encoder.record(&Record::File {
            name: b"changed".to_vec(),
            attributes: plain(0o600),
            shared: false,
            size: 3,
        })?;
        encoder.data(0, b"new")?;
        encoder.record(&file("was-a-directory"))?;
        encoder.record(&Record::Up)
    });
    assert!(is_written(&outcome), "{outcome:?}");
    assert_eq!(
        snapshot.names(),
        ["kept", "kept/changed", "kept/old", "kept/was-a-directory"]
    );
    assert_eq!(
        fs::read_to_string(snapshot.path("kept/changed")).unwrap(),
        "new"
    );
    assert_eq!(
        fs::read_to_string(snapshot.path("kept/old")).unwrap(),
        "old"
    );
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o711);
    assert_eq!(fs::metadata(&path).unwrap().mtime(), 1_000_000_000);
    // It hid what is below before, and the container has taken its attribute away.
    assert!(is_opaque(&path));
    assert!(rustix::fs::getxattr(&path, "trusted.old", &mut [0; 8][..]).is_err());
}

fn the_root_itself() {
    let snapshot = Snapshot::new(true);
    let before = fs::metadata(snapshot.path("")).unwrap().mode();
    for changed in [false, true] {
        let outcome = snapshot.told(|guest| {
            let root = Attributes {
                mode: 0o701,
                ..odd()
            };
            let encoder = supermachine_protocol::changes::Encoder::new(guest, &root, changed);
            encoder.unwrap().finish().unwrap();
        });
        assert!(is_written(&outcome), "{outcome:?}");
        let root = fs::metadata(snapshot.path("")).unwrap();
        let expected = if changed { 0o701 } else { before & 0o7777 };
        assert_eq!(root.mode() & 0o7777, expected);
        assert_eq!(root.mtime(), 1_000_000_000);
    }
}

fn a_plain_directory() {
    let snapshot = Snapshot::new(false);
    snapshot.make("own", "");
    snapshot.make("tree/deep/er", "");
    snapshot.make("again/old", "");
    let outcome = snapshot.records(&[
        directory("again", true, false),
        file("new"),
        Record::Up,
        gone("own", false),
        gone("tree", false),
    ]);
    assert!(is_written(&outcome), "{outcome:?}");
    assert_eq!(snapshot.names(), ["again", "again/new"]);
    assert!(!is_opaque(&snapshot.path("again")));
    // Nothing is below it that could be hidden.
    for record in [gone("x", true), directory("x", true, true)] {
        let reason = refused(snapshot.records(&[record, Record::Up]));
        assert!(reason.contains("below"), "{reason}");
    }
}
