//! Guests of x86_64.

/// Writes "hi" to the first serial port, then meets an undefined instruction with no handler.
pub(crate) const SAY_HI: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'h', 0xee, // mov al, 'h'; out dx, al
    0xb0, b'i', 0xee, // mov al, 'i'; out dx, al
    0x0f, 0x0b, // ud2
];
/// Writes a line's end, so that the line arrives, then waits for interrupts that never come.
pub(crate) const HALT: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'\n', 0xee, // mov al, '\n'; out dx, al
    0xfa, // cli
    0xf4, // hlt
    0xeb, 0xfd, // jmp to the hlt
];

/// Writes a line's end, then never leaves the guest.
pub(crate) const SPIN: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'\n', 0xee, // mov al, '\n'; out dx, al
    0xeb, 0xfe, // jmp to itself
];

/// Lines without end.
pub(crate) const CHATTER: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'\n', // mov al, '\n'
    0xee,  // out dx, al
    0xeb, 0xfd, // jmp to the out
];

/// Counts in memory and says each number's last byte on the serial port.
pub(crate) const COUNTS: &[u8] = &[
    0xbb, 0x00, 0x00, 0x20, 0x00, // mov ebx, 0x200000
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xff, 0x03, // again: inc dword [rbx]
    0x8a, 0x03, // mov al, [rbx]
    0xee, // out dx, al
    0xeb, 0xf9, // jmp again
];

/// Maps the first virtio device's window, is its driver as far as `DRIVER`, and says on the serial port, line
/// after line, the low bytes of capacity, interrupt status and configuration generation.
pub(crate) const WATCHES: &[u8] = &[
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

/// Where no guest's code is, and what counts does.
pub(crate) const COUNTER: u64 = 0x20_0000;

/// An ELF file of one segment, loaded and entered at 16 MiB.
pub(crate) fn image(code: &[u8]) -> Vec<u8> {
    const ENTRY: u64 = 16 << 20;
    const HEADERS: u64 = 64 + 56;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes()); // ET_EXEC
    file.extend(62u16.to_le_bytes()); // EM_X86_64
    file.extend(1u32.to_le_bytes());
    for word in [ENTRY, 64, 0] {
        file.extend(word.to_le_bytes()); // entry, program headers, section headers
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes()); // sizes and counts of headers
    }
    file.extend(1u32.to_le_bytes()); // PT_LOAD
    file.extend(7u32.to_le_bytes());
    let size = code.len() as u64;
    for word in [HEADERS, ENTRY, ENTRY, size, size, 4096] {
        file.extend(word.to_le_bytes()); // offset, addresses, sizes, alignment
    }
    file.extend(code);
    file
}
