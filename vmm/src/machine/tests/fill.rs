//! Empty disks of a VM are filled while it runs, over the fake.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::arch::current::MIN_MEMORY;
use crate::devices::virtio::DeviceState;
use crate::devices::virtio::block::FillError;
use crate::devices::virtio::transport::mmio::TransportState;
use crate::error::SaveError;
use crate::snapshot::{Kind, SnapshotFile};

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
        config.memory = MIN_MEMORY;
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
    let text = SnapshotFile::open(snapshot)
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

/// Sectors of each disk.
fn sectors(devices: &[TransportState]) -> Vec<u64> {
    let disks = devices.iter().filter_map(|device| match &device.device {
        DeviceState::Block(block) => Some(block.sectors),
        _ => None,
    });
    disks.collect()
}

#[test]
fn a_disk_is_filled_once_a_snapshot_lets_devices_go() {
    let running = with_slots();
    running.pause(LIMIT).unwrap();
    let still = running.shared.devices.quiesce().unwrap();
    thread::scope(|scope| {
        let (sender, filled) = mpsc::channel();
        let running = &running;
        scope.spawn(move || sender.send(running.fill_disk(1, vec![file(4096)])));
        // As long as it would take several times over.
        let early = filled.recv_timeout(Duration::from_millis(100));
        assert!(early.is_err(), "filled while devices are held: {early:?}");
        assert_eq!(sectors(&still.save()), [2048, 0, 0]);
        drop(still);
        filled.recv_timeout(WAIT).unwrap().unwrap();
    });
    let still = running.shared.devices.quiesce().unwrap();
    assert_eq!(sectors(&still.save()), [2048, 8, 0]);
}

#[test]
fn disks_filled_while_others_pause_and_snapshot_are_in_all_later_snapshots() {
    const ROUNDS: usize = 10;
    for round in 0..ROUNDS {
        let running = with_slots();
        let begin = Barrier::new(4);
        let filled = [AtomicBool::new(false), AtomicBool::new(false)];
        let save = || {
            let before = filled.each_ref().map(|done| done.load(Ordering::SeqCst));
            running.pause(LIMIT).unwrap();
            let snapshot = tempfile::tempfile().unwrap();
            // Another may have let the VM go on.
            let saved = running.save(&snapshot, None);
            running.resume();
            match saved {
                Ok(_) => {}
                Err(SaveError::Running) => return,
                Err(error) => panic!("{error}"),
            }
            let snapshot = SnapshotFile::open(snapshot).unwrap();
            let devices: Vec<TransportState> = snapshot.state(Kind::Devices, 0).unwrap();
            let sectors = sectors(&devices);
            for (before, (found, whole)) in before.iter().zip([(sectors[1], 8), (sectors[2], 16)]) {
                assert!(found == whole || found == 0 && !before, "{sectors:?}");
            }
        };
        thread::scope(|scope| {
            for disk in [1, 2] {
                let (running, begin, done) = (&running, &begin, &filled[disk - 1]);
                scope.spawn(move || {
                    begin.wait();
                    // At another moment of the other's each time.
                    thread::sleep(Duration::from_micros((round * disk * 97) as u64));
                    running
                        .fill_disk(disk, vec![file(4096 * disk as u64)])
                        .unwrap();
                    done.store(true, Ordering::SeqCst);
                });
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    begin.wait();
                    for _ in 0..2 {
                        save();
                    }
                });
            }
        });
        running.pause(LIMIT).unwrap();
        let still = running.shared.devices.quiesce().unwrap();
        assert_eq!(sectors(&still.save()), [2048, 8, 16]);
    }
}
