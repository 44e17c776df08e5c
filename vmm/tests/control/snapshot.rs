//! A VM that is snapshotted by one confined process and goes on in others.

use std::fs::File;
use std::io::{PipeReader, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use libtest_mimic::{Failed, Trial};
use supermachine_vmm::control::{ControlError, ErrorKind, Exit, RestoreSpec};

use crate::bare_metal::{guest, kvm_test};
use crate::guests::COUNTS;
use crate::support::{DEADLINE, Outcome, Vm, check, check_eq};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        kvm_test("snapshot::goes_on_in_other_processes", goes_on),
        kvm_test("snapshot::diff_goes_on", diff),
        kvm_test("snapshot::of_a_running_vm_is_refused", running),
        kvm_test("snapshot::damaged_is_refused", damaged),
        kvm_test("snapshot::restored_once", once),
    ]
}

/// The next numbers a guest says, all in order; the first of them.
fn count(reader: &mut PipeReader) -> Result<u8, Failed> {
    let mut bytes = [0; 600];
    reader.read_exact(&mut bytes)?;
    let in_order = |pair: &[u8]| pair[1] == pair[0].wrapping_add(1);
    check(bytes.windows(2).all(in_order), format!("{bytes:?}"))?;
    Ok(bytes[0])
}

/// A guest that counts.
fn counting() -> Result<(Vm, PipeReader), Failed> {
    let vm = Vm::spawn("counting")?;
    let (spec, mut serial) = guest(COUNTS)?;
    vm.handle.boot(&spec, DEADLINE)?;
    count(&mut serial)?;
    Ok((vm, serial))
}

/// A process that goes on from the files, and what it says first.
fn clone(files: &[&Path]) -> Result<(Vm, PipeReader, u8), Failed> {
    let (mut reader, writer) = std::io::pipe()?;
    let vm = Vm::spawn("clone")?;
    let mut spec = RestoreSpec::new(File::open(files[0])?);
    for diff in &files[1..] {
        spec.snapshot.push(File::open(diff)?);
    }
    spec.serial = Some(OwnedFd::from(writer));
    vm.handle.restore(&spec, DEADLINE)?;
    let first = count(&mut reader)?;
    Ok((vm, reader, first))
}

fn goes_on() -> Outcome {
    let (vm, _serial) = counting()?;
    let dir = tempfile::tempdir()?;
    vm.handle.pause()?;
    let path = vm.handle.snapshot(dir.path(), &[], DEADLINE)?;
    // A machine may have many clones, and outlives none of them.
    check_eq(vm.handle.stop(DEADLINE), Exit::Stopped)?;
    let clones = [clone(&[&path])?, clone(&[&path])?, clone(&[&path])?];
    for (_, _, first) in &clones {
        check_eq(*first, clones[0].2)?;
    }
    for (clone, mut serial, _) in clones {
        count(&mut serial)?;
        // A clone can be paused and saved like any VM.
        clone.handle.pause()?;
        clone.handle.snapshot(dir.path(), &[], DEADLINE)?;
        check_eq(clone.handle.stop(DEADLINE), Exit::Stopped)?;
    }
    // Each took the other's place, and nothing else is there.
    check_eq(std::fs::read_dir(dir.path())?.count(), 1)
}

fn diff() -> Outcome {
    let (vm, mut serial) = counting()?;
    let (full, later) = (tempfile::tempdir()?, tempfile::tempdir()?);
    vm.handle.pause()?;
    let base = vm.handle.snapshot(full.path(), &[], DEADLINE)?;
    vm.handle.resume()?;
    count(&mut serial)?;
    vm.handle.pause()?;
    let diff = vm
        .handle
        .snapshot(later.path(), &[File::open(&base)?], DEADLINE)?;
    clone(&[&base, &diff]).map(drop)
}

fn running() -> Outcome {
    let (vm, mut serial) = counting()?;
    let dir = tempfile::tempdir()?;
    let refused = vm.handle.snapshot(dir.path(), &[], DEADLINE);
    refused_as(refused.map(drop), ErrorKind::State, "is not paused")?;
    check_eq(std::fs::read_dir(dir.path())?.count(), 0)?;
    count(&mut serial).map(drop)
}

/// It is the child that finds out, and it can be asked for another.
fn damaged() -> Outcome {
    let (vm, _serial) = counting()?;
    let dir = tempfile::tempdir()?;
    vm.handle.pause()?;
    let path = vm.handle.snapshot(dir.path(), &[], DEADLINE)?;
    let mut bytes = std::fs::read(&path)?;
    bytes[9] ^= 1;
    let bad = dir.path().join("bad");
    std::fs::write(&bad, bytes)?;
    let vm = Vm::spawn("damaged")?;
    let refused = vm
        .handle
        .restore(&RestoreSpec::new(File::open(&bad)?), DEADLINE);
    refused_as(refused, ErrorKind::Invalid, "")
}

fn once() -> Outcome {
    let (vm, _serial) = counting()?;
    let dir = tempfile::tempdir()?;
    vm.handle.pause()?;
    let path = vm.handle.snapshot(dir.path(), &[], DEADLINE)?;
    let again = vm
        .handle
        .restore(&RestoreSpec::new(File::open(path)?), DEADLINE);
    refused_as(again, ErrorKind::State, "has been booted already")
}

pub(crate) fn refused_as(result: Result<(), ControlError>, kind: ErrorKind, part: &str) -> Outcome {
    match result {
        Err(ControlError::Refused(error)) => {
            check_eq(error.kind, kind)?;
            check(error.text.contains(part), error.text)
        }
        other => Err(format!("found {other:?}, expected a refusal").into()),
    }
}
