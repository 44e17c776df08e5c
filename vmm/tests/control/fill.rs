//! An empty disk of a confined VM is filled while its guest looks at it.

use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader};

use libtest_mimic::{Failed, Trial};
use supermachine_vmm::control::{DiskSpec, ErrorKind, Exit};

use crate::bare_metal::{guest, kvm_test};
use crate::snapshot::refused_as;
use crate::support::{DEADLINE, Outcome, Vm, check_eq};

/// Maps the first virtio device's window, is its driver as far as `DRIVER`, and says on COM1, line
/// after line, the low bytes of capacity, interrupt status and configuration generation.
const WATCHES: &[u8] = &[
    // mov qword [0xa018], 0x300003: a page directory for the fourth GiB
    0x48, 0xc7, 0x04, 0x25, 0x18, 0xa0, 0x00, 0x00, 0x03, 0x00, 0x30, 0x00, //
    0xb8, 0x83, 0x00, 0x00, 0xd0, // mov eax, 0xd0000083: a large page
    0x48, 0x89, 0x04, 0x25, 0x00, 0x04, 0x30, 0x00, // mov [0x300400], rax
    0xbb, 0x00, 0x00, 0x00, 0xd0, // mov ebx, 0xd0000000
    0xc7, 0x43, 0x70, 0x01, 0x00, 0x00, 0x00, // mov dword [rbx + 0x70], 1
    0xc7, 0x43, 0x70, 0x03, 0x00, 0x00, 0x00, // mov dword [rbx + 0x70], 3
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0x8b, 0x83, 0x00, 0x01, 0x00, 0x00, 0xee, // again: mov eax, [rbx + 0x100]; out dx, al
    0x8b, 0x43, 0x60, 0xee, // mov eax, [rbx + 0x60]; out dx, al
    0x8b, 0x83, 0xfc, 0x00, 0x00, 0x00, 0xee, // mov eax, [rbx + 0xfc]; out dx, al
    0xb0, b'\n', 0xee, // mov al, '\n'; out dx, al
    0xeb, 0xe9, // jmp again
];

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
