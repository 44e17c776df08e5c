//! Streams of guests that mean harm: refused, with the snapshot as it was, or harmless.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use supermachine_protocol::changes::{Encoder, Record};
use supermachine_runtime::changes::Outcome;

use crate::support::*;

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("hostile::names_that_lead_out", names_that_lead_out),
    ("hostile::links_that_lead_out", links_that_lead_out),
    ("hostile::a_link_swapped_under_it", a_link_swapped_under_it),
    ("hostile::a_name_twice", a_name_twice),
    ("hostile::a_billion_entries", a_billion_entries),
    ("hostile::more_bytes_than_allowed", more_bytes_than_allowed),
    ("hostile::sizes_beyond_measure", sizes_beyond_measure),
    ("hostile::depth_without_end", depth_without_end),
    ("hostile::cut_or_malformed", cut_or_malformed),
    ("hostile::silence", silence),
    ("hostile::a_byte_now_and_then", a_byte_now_and_then),
    ("hostile::a_failure_is_told", a_failure_is_told),
    ("hostile::any_records", any_records),
];

/// The snapshot before all this.
fn snapshot() -> Snapshot {
    let snapshot = Snapshot::new(true);
    snapshot.make("before", "before");
    snapshot
}

#[track_caller]
fn unchanged(snapshot: &Snapshot) {
    assert_eq!(snapshot.names(), ["before"]);
    assert_eq!(
        fs::read_to_string(snapshot.path("before")).unwrap(),
        "before"
    );
}

fn names_that_lead_out() {
    let snapshot = snapshot();
    for name in ["..", ".", "", "/", "../outside/x", "/etc/x", "a/b", "a\0b"] {
        for record in [file(name), gone(name, true), directory(name, false, false)] {
            let reason = refused(snapshot.records(&[gone("\u{1}", false), record]));
            assert!(
                reason.contains("The name of an entry"),
                "{name:?}: {reason}"
            );
        }
        unchanged(&snapshot);
    }
}

/// Links that were there, and links that the guest makes.
fn links_that_lead_out() {
    let snapshot = snapshot();
    symlink(snapshot.outside(), snapshot.path("there")).unwrap();
    let link = |name: &str| Record::Symlink {
        name: name.into(),
        attributes: plain(0o777),
        shared: false,
        target: snapshot.outside().to_str().unwrap().into(),
    };
    let outcome = snapshot.records(&[
        directory("there", false, false),
        file("inside"),
        link("link"),
        Record::Up,
    ]);
    assert!(is_written(&outcome), "{outcome:?}");
    // The same name as a link, and then as a directory to be entered.
    let twice = [
        link("x"),
        directory("x", false, false),
        file("evil"),
        Record::Up,
    ];
    let reason = refused(snapshot.records(&twice));
    assert!(reason.contains("above the last"), "{reason}");
    let outcome = snapshot.records(&[
        directory("there", false, false),
        directory("link", false, false),
        file("inside"),
        Record::Up,
        Record::Up,
    ]);
    assert!(is_written(&outcome), "{outcome:?}");
    assert!(snapshot.path("there/link/inside").is_file());
}

/// Somebody on the host puts a link in the place of a directory, again and again.
fn a_link_swapped_under_it() {
    let snapshot = snapshot();
    let (target, link) = (snapshot.path("d"), snapshot.path("swap"));
    fs::create_dir(&target).unwrap();
    symlink(snapshot.outside(), &link).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use rustix::fs::{CWD, RenameFlags, renameat_with};
            while !over.load(Ordering::Relaxed) {
                // Either may be replaced by the process.
                let _ = renameat_with(CWD, &target, CWD, &link, RenameFlags::EXCHANGE);
            }
        });
        for _ in 0..10 {
            let mut records = vec![directory("d", false, false)];
            records.extend((100..200).map(|n| file(&n.to_string())));
            records.push(Record::Up);
            // Whatever comes of it, `records` looks that nothing is outside.
            snapshot.records(&records);
        }
        over.store(true, Ordering::Relaxed);
    });
}

fn a_name_twice() {
    let snapshot = snapshot();
    for records in [
        [file("x"), file("x")],
        [file("x"), gone("x", false)],
        [file("b"), file("a")],
    ] {
        let reason = refused(snapshot.records(&records));
        assert!(reason.contains("above the last"), "{reason}");
        unchanged(&snapshot);
    }
}

fn a_billion_entries() {
    let snapshot = snapshot();
    let outcome = snapshot.told(|guest| {
        let mut encoder = Encoder::new(guest, &plain(0o755), false).unwrap();
        let sent = (0..1_000_000_000_u64)
            .map(|n| encoder.record(&file(&format!("{n:010}"))))
            .take_while(Result::is_ok)
            .count();
        assert!(sent < 100_000, "{sent} were read");
    });
    assert!(refused(outcome).contains("limit of 1000 entries"));
    unchanged(&snapshot);
}

fn more_bytes_than_allowed() {
    let snapshot = snapshot();
    let outcome = snapshot.told(|guest| {
        let mut encoder = Encoder::new(guest, &plain(0o755), false).unwrap();
        let endless = Record::File {
            name: b"endless".to_vec(),
            attributes: plain(0o644),
            shared: false,
            size: 1 << 40,
        };
        encoder.record(&endless).unwrap();
        let sent = (0..1 << 24)
            .map(|n| encoder.data(n << 16, &[7; 1 << 16]))
            .take_while(Result::is_ok)
            .count();
        assert!(sent < 100, "{sent} were read");
    });
    assert!(refused(outcome).contains("limit of 1048576 bytes"));
    unchanged(&snapshot);
}

fn sizes_beyond_measure() {
    let snapshot = snapshot();
    for size in [u64::MAX, i64::MAX as u64 + 1] {
        let huge = Record::File {
            name: b"huge".to_vec(),
            attributes: plain(0o644),
            shared: false,
            size,
        };
        let reason = refused(snapshot.records(&[huge]));
        assert!(reason.contains("The size of a file"), "{reason}");
        unchanged(&snapshot);
    }
    // Nothing but a hole, if the file system has room for the number; no blocks either way.
    let hole = Record::File {
        name: b"hole".to_vec(),
        attributes: plain(0o644),
        shared: false,
        size: i64::MAX as u64,
    };
    match snapshot.records(&[hole]) {
        Outcome::Refused { .. } => unchanged(&snapshot),
        outcome => {
            use std::os::unix::fs::MetadataExt;
            assert!(is_written(&outcome), "{outcome:?}");
            assert!(fs::metadata(snapshot.path("hole")).unwrap().blocks() < 64);
        }
    }
}

fn depth_without_end() {
    let mut snapshot = snapshot();
    snapshot.job.entries = 1_000_000;
    let outcome = snapshot.told(|guest| {
        let mut encoder = Encoder::new(guest, &plain(0o755), false).unwrap();
        while encoder.record(&directory("d", false, false)).is_ok() {}
    });
    assert!(refused(outcome).contains("limit of 1000 directories within one another"));
    unchanged(&snapshot);
    // As deep as allowed is applied, and removed again.
    let mut records = vec![directory("d", false, false); 1000];
    records.extend(vec![Record::Up; 1000]);
    let outcome = snapshot.records(&records);
    assert!(is_written(&outcome), "{outcome:?}");
    let outcome = snapshot.records(&[gone("d", false)]);
    assert!(is_written(&outcome), "{outcome:?}");
    unchanged(&snapshot);
}

fn cut_or_malformed() {
    let snapshot = snapshot();
    let mut whole = Vec::new();
    let mut encoder = Encoder::new(&mut whole, &plain(0o755), false).unwrap();
    encoder.record(&gone("before", false)).unwrap();
    encoder.record(&file("new")).unwrap();
    encoder.finish().unwrap();
    for length in [0, 1, 8, 30, whole.len() - 1] {
        let part = whole[..length].to_vec();
        let outcome = snapshot.told(move |mut guest| guest.write_all(&part).unwrap());
        let reason = refused(outcome);
        assert!(reason.contains("end before they are complete"), "{reason}");
        unchanged(&snapshot);
    }
    for at in [0, 8, 12] {
        let mut wrong = whole.clone();
        wrong[at] = 0xff;
        let outcome = snapshot.told(move |mut guest| {
            let _ = guest.write_all(&wrong);
        });
        refused(outcome);
        unchanged(&snapshot);
    }
}

fn silence() {
    let mut snapshot = snapshot();
    snapshot.job.silence = Duration::from_millis(200);
    let outcome = snapshot.told(|guest| {
        let mut encoder = Encoder::new(guest.try_clone().unwrap(), &plain(0o755), false).unwrap();
        encoder.record(&gone("before", false)).unwrap();
        // Until it is hung up.
        let _ = std::io::copy(&mut &guest, &mut std::io::sink());
    });
    let reason = refused(outcome);
    assert!(reason.contains("said nothing for 200ms"), "{reason}");
    unchanged(&snapshot);
}

fn a_byte_now_and_then() {
    let mut snapshot = snapshot();
    snapshot.job.time = Duration::from_millis(300);
    let outcome = snapshot.told(|mut guest| {
        Encoder::new(guest.try_clone().unwrap(), &plain(0o755), false).unwrap();
        let endless = gone_bytes();
        for byte in endless.iter().cycle() {
            if guest.write_all(&[*byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    refused(outcome);
    unchanged(&snapshot);
}

/// A record of a deletion.
fn gone_bytes() -> Vec<u8> {
    let (mut without, mut with) = (Vec::new(), Vec::new());
    let encoder = Encoder::new(&mut without, &plain(0o755), false).unwrap();
    drop(encoder);
    let mut encoder = Encoder::new(&mut with, &plain(0o755), false).unwrap();
    encoder.record(&gone(&"x".repeat(255), false)).unwrap();
    drop(encoder);
    with.split_off(without.len())
}

fn a_failure_is_told() {
    let snapshot = snapshot();
    let outcome = snapshot.told(|guest| {
        let mut encoder = Encoder::new(guest, &plain(0o755), false).unwrap();
        encoder.record(&gone("before", false)).unwrap();
        encoder.fail("/etc/x: Input/output error").unwrap();
    });
    let reason = refused(outcome);
    assert!(reason.contains("/etc/x: Input/output error"), "{reason}");
    unchanged(&snapshot);
}

fn record() -> impl Strategy<Value = Record> {
    let name = || prop::sample::select(vec!["..", "a", "b", "before", "c", "d", "link", "x/y"]);
    prop_oneof![
        name().prop_map(file),
        (name(), any::<bool>()).prop_map(|(name, below)| gone(name, below)),
        (name(), any::<bool>(), any::<bool>())
            .prop_map(|(name, opaque, below)| directory(name, opaque, below)),
        Just(Record::Up),
        (name(), 0..3_u64).prop_map(|(name, inode)| Record::Link {
            name: name.into(),
            inode
        }),
        (name(), any::<bool>()).prop_map(|(name, shared)| Record::Symlink {
            name: name.into(),
            attributes: plain(0o777),
            shared,
            target: b"../outside".to_vec(),
        }),
    ]
}

/// Whatever the order, it is written or refused, and nothing is half done.
fn any_records() {
    let mut runner = TestRunner::new(Config {
        cases: 40,
        failure_persistence: None,
        ..Config::default()
    });
    let ran = runner.run(
        &(vec(record(), 0..12), any::<bool>()),
        |(records, overlay)| {
            let snapshot = Snapshot::new(overlay);
            snapshot.make("before", "before");
            symlink("../outside", snapshot.path("link")).unwrap();
            let outcome = snapshot.records(&records);
            match &outcome {
                Outcome::Written { .. } => {}
                Outcome::Refused { reason } => {
                    prop_assert!(!reason.contains("ended early"), "{reason}");
                    prop_assert_eq!(snapshot.names(), ["before", "link"]);
                }
                Outcome::Partial { reason } => prop_assert!(false, "{}", reason),
            }
            Ok(())
        },
    );
    ran.unwrap();
}
