//! What is only of x86_64: ports, real mode, the hole below 4 GiB.

#![allow(unsafe_code)]

use std::arch::global_asm;

use super::*;

/// `ud2`, without an IDT.
const CRASH: [u8; 2] = [0x0f, 0x0b];

/// `mov dx, port; mov al, value; out dx, al` for each pair.
fn out(writes: &[(u16, u8)]) -> Vec<u8> {
    let mut code = Vec::new();
    for (port, value) in writes {
        code.extend_from_slice(&[0x66, 0xba]);
        code.extend_from_slice(&port.to_le_bytes());
        code.extend_from_slice(&[0xb0, *value, 0xee]);
    }
    code
}

// Leaves 64-bit mode for real mode and jumps to f000:fff0, as Linux does as a last resort.
global_asm!(
    ".pushsection .rodata.guests",
    "vmm_guest_restart:",
    // The rest runs below 1 MiB.
    "lea rsi, [rip + vmm_guest_restart_32]",
    "mov edi, 0x8000",
    "mov ecx, 64",
    "cld",
    "rep movsb",
    // A GDT with 16-bit segments: 0x08 code, 0x10 data, and 0x18 32-bit code.
    "mov rax, 0",
    "mov [0x8100], rax",
    "movabs rax, 0x00009b000000ffff",
    "mov [0x8108], rax",
    "movabs rax, 0x000093000000ffff",
    "mov [0x8110], rax",
    "movabs rax, 0x00cf9b000000ffff",
    "mov [0x8118], rax",
    "mov word ptr [0x8120], 0x1f",
    "mov qword ptr [0x8122], 0x8100",
    "lgdt [0x8120]",
    // To compatibility mode.
    "mov esp, 0x7000",
    "push 0x18",
    "mov eax, 0x8000",
    "push rax",
    "retfq",
    "vmm_guest_restart_32:",
    ".code32",
    "mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    "mov ecx, 0xc0000080",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    ".byte 0xea",
    ".long vmm_guest_restart_16 - vmm_guest_restart_32 + 0x8000",
    ".word 8",
    ".code16",
    "vmm_guest_restart_16:",
    "mov ax, 0x10",
    "mov ds, ax",
    "mov ss, ax",
    "mov eax, cr0",
    "and al, 0xfe",
    "mov cr0, eax",
    ".byte 0xea",
    ".word 0xfff0, 0xf000",
    "vmm_guest_restart_end:",
    ".code64",
    ".popsection",
);

fn real_mode_restart() -> Vec<u8> {
    unsafe extern "C" {
        #[link_name = "vmm_guest_restart"]
        static START: u8;
        #[link_name = "vmm_guest_restart_end"]
        static END: u8;
    }
    let (start, end) = (&raw const START, &raw const END);
    // SAFETY: both symbols are of this binary's read-only data, one after the other.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }.to_vec()
}

fn run(code: &[u8]) -> Option<Exit> {
    Some(wait(&build(config(code))?.start().unwrap()))
}

#[test]
fn every_end_has_its_reason() {
    for (code, expected) in [
        (out(&[(0x600, 0x34)]), Exit::PowerOff),
        (out(&[(0x602, 1)]), Exit::Reset),
        (out(&[(0x64, 0xfe)]), Exit::Reset),
        (CRASH.to_vec(), Exit::TripleFault),
        (real_mode_restart(), Exit::Reset),
    ] {
        // Whatever comes after the end is not run.
        let code = [code, vec![0xeb, 0xfe]].concat();
        let Some(exit) = run(&code) else { return };
        assert_eq!(exit, expected);
    }
}

#[test]
fn ram_beyond_the_hole_is_mapped_above_4_gib() {
    let (hypervisor, running) = fake(vec![vec![Step::SystemOff]], |config| {
        config.memory = 5 << 30
    });
    running.wait();
    let record = hypervisor.record();
    assert_eq!(record.mapped[&0], (0, 3 << 30));
    assert_eq!(record.mapped[&1], (4 << 30, 2 << 30));
}

#[test]
fn a_kernel_of_another_architecture_is_named() {
    let mut image = guests::image(SPIN);
    // EM_AARCH64.
    image[18] = 183;
    let mut kernel = tempfile::tempfile().unwrap();
    kernel.write_all(&image).unwrap();
    let Err(Error::Kernel(error)) = Vm::new(VmConfig::new(kernel)) else {
        panic!("it is taken");
    };
    let found = error.to_string();
    assert!(
        found.contains("aarch64") && found.contains("expected x86_64"),
        "{found}"
    );
}
