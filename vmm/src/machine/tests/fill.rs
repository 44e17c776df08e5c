//! Empty disks of a VM are filled while it runs, over the fake.

use super::*;
use crate::devices::virtio::block::FillError;

fn file(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

fn slot(bytes: u64, read_only: bool) -> DiskConfig {
    DiskConfig {
        files: vec![file(bytes)],
        read_only,
        serial: "slot".into(),
    }
}

fn with_slots() -> Running {
    let (_, running) = fake(vec![vec![Step::Forever]], |config| {
        config.disks = vec![slot(1 << 20, false), slot(0, false), slot(0, true)];
        config.rng = true;
    });
    running
}

#[test]
fn empty_disks_are_filled_running_or_paused() {
    let running = with_slots();
    running.fill_disk(1, vec![file(4096)]).unwrap();
    running.pause(LIMIT).unwrap();
    // Of one that is only read, several files make one.
    running.fill_disk(2, vec![file(4096), file(8192)]).unwrap();
    let snapshot = tempfile::tempfile().unwrap();
    running.save(&snapshot, None).unwrap();
    let text = crate::snapshot::SnapshotFile::open(snapshot)
        .unwrap()
        .describe()
        .unwrap()
        .to_string();
    assert!(text.contains("block2"), "{text}");
    let again = running.fill_disk(1, vec![file(4096)]).unwrap_err();
    assert!(
        matches!(again, FillError::NotEmpty { sectors: 8, .. }),
        "{again}"
    );
    let again = running.fill_disk(2, vec![file(4096)]).unwrap_err();
    assert!(
        matches!(again, FillError::NotEmpty { sectors: 24, .. }),
        "{again}"
    );
}

#[test]
fn what_fills_no_disk_is_named() {
    let running = with_slots();
    let refused = |disk, files| running.fill_disk(disk, files).unwrap_err();
    let error = refused(0, vec![file(4096)]);
    assert!(
        matches!(&error, FillError::NotEmpty { device, .. } if device == "block0"),
        "{error}"
    );
    let error = refused(3, vec![file(4096)]);
    assert_eq!(error.to_string(), "block3 is no disk of the VM");
    let error = refused(1, vec![file(100)]);
    assert!(matches!(error, FillError::Nothing { .. }), "{error}");
    for files in [vec![], vec![file(4096), file(4096)]] {
        let error = refused(1, files);
        assert!(matches!(error, FillError::Files { .. }), "{error}");
    }
    running.fill_disk(1, vec![file(4096)]).unwrap();
    running.stop();
    running.wait();
    let error = running.fill_disk(2, vec![file(4096)]).unwrap_err();
    assert!(matches!(error, FillError::Ended), "{error}");
}
