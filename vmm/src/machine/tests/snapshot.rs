//! A VM goes on from a snapshot: over the fake, and a small guest on the host's KVM.

use std::io::PipeReader;
use std::os::unix::net::UnixListener;
use std::sync::OnceLock;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::restore::RestoreConfig;
use super::guests::{COUNTER, COUNTS};
use super::*;
use crate::devices::virtio::balloon::BalloonConfig;
use crate::devices::virtio::console::{ConsoleConfig, PortConfig, PortEnds};
use crate::devices::virtio::transport::mmio::TransportState;
use crate::devices::virtio::vsock::VsockConfig;
use crate::error::SaveError;
use crate::hypervisor::fake::{FakeVcpu, FakeVm};
use crate::hypervisor::{State, Vcpu, VmBackend};
use crate::machine::MachineState;
use crate::snapshot::{Kind, SnapshotError, SnapshotFile, image, state};

fn pipe() -> (PipeReader, Option<std::os::fd::OwnedFd>) {
    let (reader, writer) = std::io::pipe().unwrap();
    (reader, Some(writer.into()))
}

/// The next `N` numbers a guest says, all in order.
fn count<const N: usize>(reader: &mut PipeReader) -> [u8; N] {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes).unwrap();
    for pair in bytes.windows(2) {
        assert_eq!(pair[1], pair[0].wrapping_add(1));
    }
    bytes
}

/// A counting guest, paused after a while.
fn counting() -> Option<(RunningVm, PipeReader)> {
    let mut config = config(COUNTS);
    let (mut reader, writer) = pipe();
    config.serial = writer;
    config.rng = true;
    let running = build(config)?.start().unwrap();
    count::<600>(&mut reader);
    running.pause(LIMIT).unwrap();
    Some((running, reader))
}

fn opened(path: &std::path::Path) -> SnapshotFile {
    SnapshotFile::open(File::open(path).unwrap()).unwrap()
}

/// Starts a clone and hears it go on from the number in the snapshot.
fn clone_counts(files: &[&std::path::Path]) -> RunningVm {
    let chain: Vec<_> = files.iter().map(|path| opened(path)).collect();
    let memory = image::map(&chain).unwrap();
    let saved: u32 = memory.read_obj(GuestAddress(COUNTER)).unwrap();
    let (mut reader, writer) = pipe();
    let mut config = RestoreConfig::new(File::open(files[0]).unwrap());
    let diffs = files.iter().skip(1);
    config
        .snapshot
        .extend(diffs.map(|path| File::open(path).unwrap()));
    config.serial = writer;
    let running = Vm::restore(config).unwrap().start().unwrap();
    let said = count::<600>(&mut reader);
    // It may have been paused before it said the number, or after.
    let next = [saved as u8, (saved as u8).wrapping_add(1)];
    assert!(next.contains(&said[0]), "{} after {saved}", said[0]);
    running
}

#[test]
fn a_guest_goes_on_any_number_of_times() {
    let Some((source, mut reader)) = counting() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let path = source.snapshot(dir.path(), None).unwrap();
    for _ in 0..20 {
        clone_counts(&[&path]);
    }
    let at_once: Vec<_> = (0..5).map(|_| clone_counts(&[&path])).collect();
    drop(at_once);
    // So does the one that was saved, where it was.
    source.resume();
    count::<600>(&mut reader);
    opened(&path).verify_memory().unwrap();
}

#[test]
fn a_clone_can_be_saved_and_a_diff_is_small() {
    let Some((source, mut reader)) = counting() else {
        return;
    };
    let (base, later) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let full = source.snapshot(base.path(), None).unwrap();
    source.resume();
    count::<600>(&mut reader);
    source.pause(LIMIT).unwrap();
    let diff = source
        .snapshot(later.path(), Some(&[opened(&full)]))
        .unwrap();
    assert!(opened(&diff).memory_len() <= 4 * 4096);
    let clone = clone_counts(&[&full, &diff]);

    let third = tempfile::tempdir().unwrap();
    clone.pause(LIMIT).unwrap();
    let of_clone = clone.snapshot(third.path(), None).unwrap();
    clone_counts(&[&of_clone]);
}

#[test]
fn only_a_paused_vm_is_saved() {
    let Some((source, _reader)) = counting() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    source.resume();
    let error = source.snapshot(dir.path(), None).unwrap_err();
    assert!(matches!(error, SaveError::Running), "{error}");
    source.stop();
    source.wait();
    let error = source.snapshot(dir.path(), None).unwrap_err();
    assert!(matches!(error, SaveError::Ended), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn damage_is_told_and_nothing_runs() {
    let Some((source, _reader)) = counting() else {
        return;
    };
    let file = tempfile::tempfile().unwrap();
    source.snapshot_to(&file, None).unwrap();
    let at = (64 << 10) + COUNTER - ram() + 5;
    std::os::unix::fs::FileExt::write_all_at(&file, &[1], at).unwrap();
    let refused = |verify| {
        let mut config = RestoreConfig::new(file.try_clone().unwrap());
        config.verify_memory = verify;
        Vm::restore(config).map(drop)
    };
    assert!(matches!(
        refused(true),
        Err(Error::Snapshot(SnapshotError::Checksum { .. }))
    ));
    refused(false).unwrap();
    file.set_len(1 << 20).unwrap();
    assert!(matches!(
        refused(false),
        Err(Error::Snapshot(SnapshotError::Length { .. }))
    ));
}

/// A VM of the fake with every device and three vCPUs, saved in the first step of each.
fn saved() -> File {
    let (_, running) = fake(vec![vec![Step::Forever]; 3], every_device);
    running.pause(LIMIT).unwrap();
    let file = tempfile::tempfile().unwrap();
    running.save(&file, None).unwrap();
    file
}

fn disk() -> DiskConfig {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    DiskConfig {
        files: vec![file],
        read_only: false,
        serial: "disk".into(),
    }
}

fn vsock() -> VsockConfig {
    let dir = tempfile::tempdir().unwrap();
    VsockConfig {
        cid: 7,
        listener: UnixListener::bind(dir.path().join("vsock")).unwrap(),
    }
}

fn every_device(config: &mut VmConfig) {
    config.memory = 32 << 20;
    config.rng = true;
    config.balloon = Some(BalloonConfig::default());
    config.disks = vec![disk(), disk()];
    config.vsock = Some(vsock());
    config.serial = pipe().1;
    config.console = Some(ConsoleConfig {
        ports: vec![PortConfig { name: "log".into() }],
        max_ports: 3,
        events: Box::new(|_| ()),
    });
}

fn with_everything(file: &File) -> RestoreConfig {
    let mut config = RestoreConfig::new(file.try_clone().unwrap());
    config.disks = vec![disk(), disk()];
    config.vsock = Some(vsock());
    config.ports = vec![(0, PortEnds::default())];
    config
}

#[test]
fn all_vcpus_go_on_where_they_were() {
    let file = saved();
    // What was played is not played again.
    let steps = vec![Step::UntilKicked, Step::SystemOff];
    let hypervisor = Fake::new(vec![steps; 3]);
    let assembly = Assembly::restore(&hypervisor, with_everything(&file)).unwrap();
    let running = assembly.start().unwrap();
    assert_eq!(running.wait(), Exit::PowerOff);
    let record = hypervisor.record();
    assert_eq!(record.booted.len(), 0);
    assert_eq!(record.resumed, 3, "each is told that time has passed");
    assert!(running.handles.console.is_some() && running.handles.balloon.is_some());
}

#[test]
fn a_snapshot_is_described() {
    let text = SnapshotFile::open(saved()).unwrap().describe().unwrap();
    let text = text.to_string();
    for part in [
        "a full snapshot",
        "3 vCPUs, 32768 KiB of RAM",
        "console0: status 0x0, 0 of 8 queues",
        "block1",
        "Vcpu 2: ",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn what_does_not_fit_the_snapshot_is_named() {
    let file = saved();
    let refused = |change: &dyn Fn(&mut RestoreConfig)| {
        let mut config = with_everything(&file);
        change(&mut config);
        let hypervisor = Fake::new(vec![vec![Step::Forever]; 3]);
        match Assembly::restore(&hypervisor, config) {
            Ok(_) => panic!("it was taken"),
            Err(error) => {
                assert!(hypervisor.record().booted.is_empty());
                error.to_string()
            }
        }
    };
    let found = refused(&|config| drop(config.disks.pop()));
    assert_eq!(
        found,
        "Snapshot has 2 disks, and 1 was given to restore it with"
    );
    assert!(refused(&|config| config.vsock = None).contains("no socket"));
    assert!(refused(&|config| config.snapshot.clear()).contains("none"));
    let found = refused(&|config| config.disks[1].read_only = true);
    assert_eq!(found, "Cannot restore device block1");
    let found = refused(&|config| config.ports.push((3, PortEnds::default())));
    assert_eq!(found, "Cannot make device console0");
    let file = config(SPIN).kernel;
    let found = refused(&move |config| config.snapshot = vec![file.try_clone().unwrap()]);
    assert!(found.contains("no snapshot"), "{found}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// With every checksum right, sections say anything.
    #[test]
    fn no_state_does_harm(
        section in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..12),
        spoilt in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..2),
    ) {
        static SAVED: OnceLock<File> = OnceLock::new();
        let file = SAVED.get_or_init(saved).try_clone().unwrap();
        let source = SnapshotFile::open(file).unwrap();
        let memory = image::map(std::slice::from_ref(&source)).unwrap();
        let mut sections: Vec<_> = source
            .sections()
            .filter(|(kind, ..)| *kind != Kind::Memory)
            .map(|(kind, index, bytes)| (kind, index, bytes.to_vec()))
            .collect();
        let place = section.index(sections.len());
        let (kind, _, bytes) = &mut sections[place];
        *bytes = match kind {
            Kind::Machine => edited::<MachineState>(bytes, &edits),
            Kind::Vm => edited::<FakeVmState>(bytes, &edits),
            Kind::Vcpu => edited::<FakeVcpuState>(bytes, &edits),
            Kind::Devices | Kind::Memory => edited::<Vec<TransportState>>(bytes, &edits),
        };
        for (at, with) in spoilt {
            let place = at.index(bytes.len());
            bytes[place] = with;
        }
        let file = tempfile::tempfile().unwrap();
        image::write(&file, &memory, sections, None).unwrap();
        let hypervisor = Fake::new(vec![vec![Step::SystemOff]; 3]);
        let mut config = with_everything(&file);
        config.verify_memory = false;
        if let Ok(assembly) = Assembly::restore(&hypervisor, config) {
            let running = assembly.start().unwrap();
            running.stop();
            running.wait();
        }
    }
}

type FakeVmState = <FakeVm as VmBackend>::State;
type FakeVcpuState = <FakeVcpu as Vcpu>::State;

/// A state with other leaves, as far as its type can have them.
fn edited<T: State>(bytes: &[u8], edits: &[(prop::sample::Index, prop::sample::Index)]) -> Vec<u8> {
    let mut state: T = state::decode(bytes).unwrap();
    for (at, with) in edits {
        let mut value = serde_json::to_value(&state).unwrap();
        edit(&mut value, at, with);
        state = serde_json::from_value(value).unwrap_or(state);
    }
    state::encode(&state).unwrap()
}

/// Puts something else in place of a leaf.
fn edit(value: &mut serde_json::Value, at: &prop::sample::Index, with: &prop::sample::Index) {
    use serde_json::{Value, json};
    fn leaves(value: &mut Value) -> Vec<&mut Value> {
        let empty = value.as_object().is_some_and(serde_json::Map::is_empty);
        if empty || value.as_array().is_none_or(Vec::is_empty) && !value.is_object() {
            return vec![value];
        }
        match value {
            Value::Array(items) => items.iter_mut().flat_map(leaves).collect(),
            Value::Object(items) => items.values_mut().flat_map(leaves).collect(),
            _ => Vec::new(),
        }
    }
    let choices = [
        json!(0),
        json!(1),
        json!(4),
        json!(15),
        json!(u32::MAX),
        json!(u64::MAX),
        json!(-1),
        json!(true),
        json!(null),
        json!("open"),
        json!([]),
        json!([[0, 1_u64 << 40]]),
    ];
    let mut found = leaves(value);
    let place = at.index(found.len());
    *found[place] = with.get(&choices).clone();
}
