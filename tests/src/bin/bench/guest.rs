//! A guest that is nothing but its kernel: a program of a few instructions as `/init`.

use supermachine_tests::initramfs::Initramfs;

/// Where `/init` announces itself: CPUID of this leaf. It exits to the host on every VMM, needs no
/// device and no privilege, and KVM's tracepoint shows the leaf.
pub(crate) const MARKER: u32 = 0x534d_4249;

/// What `/init` does after the announcement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Init {
    /// Resets the machine at once.
    Reset,
    /// Sleeps for ever.
    Idle,
}

/// Where the program is loaded, and how far its code lies from there: behind both ELF headers.
const LOAD: u64 = 0x40_0000;
const CODE: u64 = 64 + 56;

const SYS_PAUSE: u32 = 34;
const SYS_REBOOT: u32 = 169;
/// reboot(2): the two magic numbers, and LINUX_REBOOT_CMD_RESTART. Power-off would need ACPI, which
/// the other VMM's machine does without.
const REBOOT: [u32; 3] = [0xfee1_dead, 672_274_793, 0x0123_4567];

/// The initramfs with that `/init`.
pub(crate) fn initramfs(init: Init) -> Vec<u8> {
    Initramfs::new(&program(init)).finish()
}

/// A static ELF program for x86_64: one segment, headers and code.
fn program(init: Init) -> Vec<u8> {
    let code = code(init);
    let size = CODE + code.len() as u64;
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // ET_EXEC, EM_X86_64, EV_CURRENT.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for field in [LOAD + CODE, 64, 0] {
        elf.extend(field.to_le_bytes());
    }
    // Flags; sizes of header and program header, one of these; no sections.
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    // PT_LOAD, readable and executable.
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for field in [0, LOAD, LOAD, size, size, 0x1000] {
        elf.extend(field.to_le_bytes());
    }
    elf.extend(code);
    elf
}

fn code(init: Init) -> Vec<u8> {
    let mut code = Vec::new();
    let move_to = |code: &mut Vec<u8>, opcode: u8, value: u32| {
        code.push(opcode);
        code.extend(value.to_le_bytes());
    };
    // mov eax, MARKER; xor ecx, ecx; cpuid
    move_to(&mut code, 0xb8, MARKER);
    code.extend([0x31, 0xc9, 0x0f, 0xa2]);
    match init {
        Init::Reset => {
            // mov edi, esi and edx; mov eax, SYS_REBOOT
            for (opcode, value) in [0xbf, 0xbe, 0xba].into_iter().zip(REBOOT) {
                move_to(&mut code, opcode, value);
            }
            move_to(&mut code, 0xb8, SYS_REBOOT);
        }
        Init::Idle => move_to(&mut code, 0xb8, SYS_PAUSE),
    }
    // syscall; jmp .
    code.extend([0x0f, 0x05, 0xeb, 0xfe]);
    code
}
