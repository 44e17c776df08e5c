//! An empty disk of a confined VM is filled while its guest looks at it.

use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader};

use libtest_mimic::{Failed, Trial};
use supermachine_vmm::control::{DiskSpec, ErrorKind, Exit};

use crate::bare_metal::{guest, kvm_test};
use crate::guests::WATCHES;
use crate::snapshot::refused_as;
use crate::support::{DEADLINE, Outcome, Vm, check_eq};

/// More lines than a guest says before it must have seen anything.
const MANY: usize = 1_000_000;

pub(crate) fn tests() -> Vec<Trial> {
    vec![kvm_test("fill::guest_sees_the_disk", filled)]
}

fn file(sectors: u64) -> Result<File, Failed> {
    let file = tempfile::tempfile()?;
    file.set_len(sectors * 512)?;
    Ok(file)
}

/// Reads lines until this one has come.
fn until(said: &mut BufReader<PipeReader>, expected: [u8; 3]) -> Outcome {
    let mut line = Vec::new();
    for _ in 0..MANY {
        line.clear();
        said.read_until(b'\n', &mut line)?;
        if line.strip_suffix(b"\n") == Some(&expected[..]) {
            return Ok(());
        }
    }
    Err(format!("found {line:?}, expected {expected:?}").into())
}

fn filled() -> Outcome {
    let vm = Vm::spawn("fill")?;
    let (mut spec, serial) = guest(WATCHES)?;
    spec.console = None;
    spec.disks.push(DiskSpec {
        files: vec![file(0)?],
        read_only: false,
        serial: "slot".to_owned(),
    });
    vm.handle.boot(&spec, DEADLINE)?;
    let mut said = BufReader::new(serial);
    until(&mut said, [0, 0, 0])?;

    refused_as(
        vm.handle.fill_disk(1, &[file(16)?]),
        ErrorKind::Invalid,
        "block1 is no disk",
    )?;
    refused_as(
        vm.handle.fill_disk(0, &[file(0)?]),
        ErrorKind::Invalid,
        "a sector",
    )?;
    vm.handle.fill_disk(0, &[file(16)?])?;
    // Configuration changed, for the first time.
    until(&mut said, [16, 2, 1])?;
    refused_as(
        vm.handle.fill_disk(0, &[file(32)?]),
        ErrorKind::State,
        "is not empty",
    )?;
    until(&mut said, [16, 2, 1])?;
    check_eq(vm.handle.stop(DEADLINE), Exit::Stopped)
}
