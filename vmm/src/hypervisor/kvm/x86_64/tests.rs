//! Guests of a few instructions on the host's KVM. They run at [`CODE`] in 64-bit mode, with the
//! first GiB mapped.

use vm_memory::{Bytes, GuestAddress};

use super::super::tests::Fixture;
use super::super::*;
use crate::arch::current::{self, layout};
use crate::arch::{CpuCaps, VcpuSetup};
use crate::hypervisor::{IrqLine, Vcpu, VcpuExit};
use crate::memory::GuestMemory;

mod state;

pub(in super::super) const CODE: u64 = 0x10_0000;
/// Where nothing is mapped, and guests take for a device.
pub(in super::super) const DEVICE: u64 = 0xd000_0000;
/// Page directory for the fourth GiB, where devices are; made by [`map_devices`].
const DEVICE_DIRECTORY: u64 = 0x8_0000;

guest!(
    ports,
    "mov dx, 0x3f8",
    "mov al, 0x41",
    "out dx, al",
    "in al, dx",
    "inc al",
    "out dx, al",
    "lea rsi, [rip + 2f]",
    "mov ecx, 3",
    "cld",
    "rep outsb",
    "ud2",
    "2: .ascii \"xyz\"",
);

guest!(
    mmio,
    "mov ebx, 0xd0000000",
    "mov eax, [rbx + 4]",
    "inc eax",
    "mov [rbx + 8], eax",
    "mov rax, [rbx]",
    "mov [rbx], ax",
    "ud2",
);

guest!(
    pub(in super::super) doorbells,
    "mov ebx, 0xd0000050",
    "mov dword ptr [rbx], 1",
    "mov dword ptr [rbx], 2",
    "ud2",
);

guest!(pub(in super::super) spin, "2: jmp 2b");

// Enables the local APIC, routes I/O APIC pin 5 to vector 0x40, counts two interrupts.
guest!(
    interrupts,
    "mov esp, 0x90000",
    // Gate 0x40 of an IDT at 0x70000: present, interrupt gate, code selector.
    "lea rax, [rip + 3f]",
    "mov edi, 0x70400",
    "mov word ptr [rdi], ax",
    "mov word ptr [rdi + 2], 0x10",
    "mov word ptr [rdi + 4], 0x8e00",
    "shr rax, 16",
    "mov word ptr [rdi + 6], ax",
    "mov dword ptr [rdi + 8], 0",
    "sub rsp, 16",
    "mov word ptr [rsp], 0xfff",
    "mov qword ptr [rsp + 2], 0x70000",
    "lidt [rsp]",
    "mov ebx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov ecx, 0xfec00000",
    "mov dword ptr [rcx], 0x1b",
    "mov dword ptr [rcx + 0x10], 0",
    "mov dword ptr [rcx], 0x1a",
    "mov dword ptr [rcx + 0x10], 0x40",
    // Ready: the host pulses.
    "mov dx, 0x500",
    "out dx, al",
    "sti",
    "2: hlt",
    "jmp 2b",
    "3: mov dword ptr [rbx + 0xb0], 0",
    "mov dx, 0x501",
    "out dx, al",
    "iretq",
);

/// Page tables for what a guest touches, which runs in 64-bit mode.
pub(in super::super) fn prepare(memory: &GuestMemory) {
    current::write_tables(memory).unwrap();
    map_devices(memory);
}

pub(in super::super) fn setup(caps: &CpuCaps) -> VcpuSetup {
    let entry = current::Entry {
        rip: CODE,
        rsi: 0,
        cr3: layout::PAGE_TABLES.0,
        gdt: layout::GDT.0,
    };
    current::vcpu_setup(caps, 0, 1, entry)
}

/// Identity-maps 3 GiB to 4 GiB with 2 MiB pages.
fn map_devices(memory: &GuestMemory) {
    let pointer = GuestAddress(layout::PAGE_TABLES.0 + 0x1000 + 3 * 8);
    memory.write_obj(DEVICE_DIRECTORY | 3, pointer).unwrap();
    for index in 0..512u64 {
        let page = (0xc000_0000 + index * (2 << 20)) | 0x83;
        memory
            .write_obj(page, GuestAddress(DEVICE_DIRECTORY + index * 8))
            .unwrap();
    }
}

#[test]
fn ports_are_read_and_written() {
    let Some(fixture) = Fixture::new(ports()) else {
        return;
    };
    let mut vcpu = fixture.vcpu();
    match vcpu.run() {
        VcpuExit::PioWrite {
            port: 0x3f8,
            size: 1,
            data: [0x41],
        } => {}
        other => panic!("{other:?}"),
    }
    match vcpu.run() {
        VcpuExit::PioRead {
            port: 0x3f8,
            size: 1,
            data,
        } => data[0] = 0x60,
        other => panic!("{other:?}"),
    }
    match vcpu.run() {
        VcpuExit::PioWrite {
            port: 0x3f8,
            size: 1,
            data: [0x61],
        } => {}
        other => panic!("{other:?}"),
    }
    // A string instruction may come as one exit or as several.
    let mut text = Vec::new();
    loop {
        match vcpu.run() {
            VcpuExit::PioWrite {
                port: 0x3f8,
                size: 1,
                data,
            } => text.extend_from_slice(data),
            VcpuExit::Shutdown => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(text, b"xyz");
}

#[test]
fn device_memory_is_read_and_written_with_its_width() {
    let Some(fixture) = Fixture::new(mmio()) else {
        return;
    };
    let mut vcpu = fixture.vcpu();
    match vcpu.run() {
        VcpuExit::MmioRead {
            address: 0xd000_0004,
            data,
        } => {
            data.copy_from_slice(&0x0102_0304u32.to_le_bytes());
        }
        other => panic!("{other:?}"),
    }
    match vcpu.run() {
        VcpuExit::MmioWrite {
            address: 0xd000_0008,
            data,
        } => {
            assert_eq!(data, 0x0102_0305u32.to_le_bytes());
        }
        other => panic!("{other:?}"),
    }
    match vcpu.run() {
        VcpuExit::MmioRead {
            address: 0xd000_0000,
            data,
        } => {
            data.copy_from_slice(&0x1122_3344_5566_7788u64.to_le_bytes());
        }
        other => panic!("{other:?}"),
    }
    match vcpu.run() {
        VcpuExit::MmioWrite {
            address: 0xd000_0000,
            data,
        } => assert_eq!(data, [0x88, 0x77]),
        other => panic!("{other:?}"),
    }
    assert!(matches!(vcpu.run(), VcpuExit::Shutdown));
}

#[test]
fn lines_of_one_pin_each_interrupt_the_guest() {
    let Some(fixture) = Fixture::new(interrupts()) else {
        return;
    };
    let lines = [
        fixture.vm.irq_line(5).unwrap(),
        fixture.vm.irq_line(5).unwrap(),
    ];
    let mut vcpu = fixture.vcpu();
    let mut expect = |expected: u16| match vcpu.run() {
        VcpuExit::PioWrite { port, .. } => assert_eq!(port, expected),
        other => panic!("{other:?}"),
    };
    expect(0x500);
    for line in &lines {
        line.pulse();
        expect(0x501);
    }
    lines[0].set(true);
    lines[0].set(false);
    expect(0x501);
}
