use std::io::Write;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::arch::image::KernelError;
use crate::memory::GuestMemory;

const MIB: u64 = 1 << 20;

fn memory(size: u64) -> GuestMemory {
    GuestMemory::anonymous(&layout::ram_ranges(size)).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// An ELF file with one segment.
fn elf(machine: u16, class: u8, address: u64, filesz: u64, memsz: u64) -> Vec<u8> {
    let mut image = vec![0; 0x1000];
    image[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, 1, 1]);
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &2u16.to_le_bytes());
    put(18, &machine.to_le_bytes());
    put(24, &address.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes());
    put(72, &0x1000u64.to_le_bytes());
    put(80, &address.to_le_bytes());
    put(88, &address.to_le_bytes());
    put(96, &filesz.to_le_bytes());
    put(104, &memsz.to_le_bytes());
    image.extend((0..filesz).map(|byte| byte as u8));
    image
}

/// A bzImage of 4 setup sectors and `payload` bytes.
fn bzimage(payload: usize) -> Vec<u8> {
    let mut image = vec![0; 5 * 512 + payload];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[4]);
    put(0x1f4, &(payload as u32).div_ceil(16).to_le_bytes());
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &(16 * MIB).to_le_bytes());
    put(0x260, &(8 * MIB as u32).to_le_bytes());
    image[5 * 512..].fill(0x90);
    image
}

fn refusal(image: &[u8]) -> KernelError {
    KernelImage::recognise(&file(image)).unwrap_err()
}

fn boot(
    memory: &GuestMemory,
    image: &[u8],
    initramfs: Option<&[u8]>,
    command_line: &str,
) -> Result<Entry, LoadError> {
    let mut kernel_file = file(image);
    let kernel = KernelImage::recognise(&kernel_file)?;
    let mut initramfs = initramfs.map(file);
    let source = BootSource {
        kernel: &kernel,
        kernel_file: &mut kernel_file,
        initramfs: initramfs.as_mut(),
        command_line,
        seed: [7; 32],
    };
    load(
        memory,
        source,
        Platform {
            vcpus: 2,
            virtio_devices: 3,
            com1: true,
        },
    )
}

#[test]
fn kernels_of_other_processors_are_named() {
    for (machine, class, name) in [
        (183, 2, "aarch64"),
        (3, 1, "i386"),
        (62, 1, "x86_64 (a 32-bit"),
        (243, 2, "RISC-V"),
        (4711, 2, "ELF machine 4711"),
    ] {
        match refusal(&elf(machine, class, MIB, 16, 16)) {
            KernelError::WrongArchitecture { found, .. } => {
                assert!(found.contains(name), "{found}")
            }
            other => panic!("{other}"),
        }
    }
    let mut image = vec![0; 4096];
    image[..2].copy_from_slice(b"MZ");
    image[0x38..0x3c].copy_from_slice(b"ARM\x64");
    let error = refusal(&image);
    assert_eq!(
        error.to_string(),
        "Kernel image is for arm64 (an Image), expected x86_64"
    );
}

#[test]
fn what_is_no_kernel_is_described() {
    for (image, found) in [
        (&b""[..], "empty"),
        (b"\x1f\x8b\x08", "a gzip file"),
        (b"\x28\xb5\x2f\xfd", "a zstd file"),
        (b"#!/bin/sh\n", "a file that starts with [23, 21, 2f, 62]"),
    ] {
        match refusal(image) {
            KernelError::Format { found: what, .. } => assert_eq!(what, found),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn truncation_is_told_at_every_length() {
    let image = elf(62, 2, MIB, 5000, 5000);
    assert!(KernelImage::recognise(&file(&image)).is_ok());
    for len in [4, 63, 64, 119, 120, 0x1000, image.len() - 1] {
        match refusal(&image[..len]) {
            KernelError::Truncated { needed, found, .. } => {
                assert!(found == len as u64 && needed > found, "{len}");
            }
            other => panic!("{len}: {other}"),
        }
    }
    let image = bzimage(10_000);
    assert!(KernelImage::recognise(&file(&image)).is_ok());
    for len in [0x206, 0x260, 5 * 512, image.len() - 512] {
        assert!(
            matches!(refusal(&image[..len]), KernelError::Truncated { .. }),
            "{len}"
        );
    }
}

#[test]
fn kernels_that_cannot_be_placed_or_entered_are_refused() {
    for (address, size) in [
        (0, 16),
        (MIB - 1, 16),
        (layout::HOLE - 8, 16),
        (u64::MAX - 4, 16),
        (MIB, u64::MAX),
    ] {
        let error = refusal(&elf(62, 2, address, 16, size));
        assert!(
            matches!(error, KernelError::Placement { .. }),
            "{address:#x}: {error}"
        );
    }
    let mut old = bzimage(1000);
    old[0x206] = 0x0b;
    assert!(matches!(
        refusal(&old),
        KernelError::No64BitEntry { version: 0x020b }
    ));
    let mut only_32_bit = bzimage(1000);
    only_32_bit[0x236] = 0;
    assert!(matches!(
        refusal(&only_32_bit),
        KernelError::No64BitEntry { .. }
    ));
}

#[test]
fn too_little_memory_says_how_much_it_would_take() {
    let image = elf(62, 2, MIB, 16, 100 * MIB);
    match boot(&memory(64 * MIB), &image, None, "") {
        Err(LoadError::MemoryTooSmall { needed, available }) => {
            assert_eq!((needed, available), (101 * MIB, 64 * MIB));
        }
        other => panic!("{other:?}"),
    }
    let image = elf(62, 2, MIB, 16, 16);
    let initramfs = vec![1; 63 * MIB as usize];
    match boot(&memory(64 * MIB), &image, Some(&initramfs), "") {
        Err(LoadError::MemoryTooSmall { available, .. }) => assert_eq!(available, 64 * MIB),
        other => panic!("{other:?}"),
    }
    assert!(boot(&memory(65 * MIB), &image, Some(&initramfs), "").is_ok());
}

#[test]
fn the_boot_parameters_say_where_everything_is() {
    for (image, entry) in [
        (elf(62, 2, 2 * MIB, 64, 4096), 2 * MIB),
        (bzimage(1000), 16 * MIB + 0x200),
    ] {
        let memory = memory(5 << 30);
        let initramfs = [0xab; 5000];
        let start = boot(&memory, &image, Some(&initramfs), "quiet init=/x").unwrap();
        assert_eq!((start.rip, start.rsi), (entry, layout::BOOT_PARAMS.0));

        let read = |at: u64| memory.read_obj::<u32>(GuestAddress(layout::BOOT_PARAMS.0 + at));
        let word = |at| read(at).unwrap();
        assert_eq!(word(0x202), 0x5372_6448);
        assert_eq!(word(0x228), layout::COMMAND_LINE.0 as u32);
        let mut command_line = [0; 22];
        memory
            .read_slice(&mut command_line, layout::COMMAND_LINE)
            .unwrap();
        assert_eq!(&command_line, b"pci=off quiet init=/x\0");
        let (at, size) = (word(0x218), word(0x21c));
        assert_eq!((at % 4096, size), (0, 5000));
        let mut loaded = [0; 5000];
        memory
            .read_slice(&mut loaded, GuestAddress(u64::from(at)))
            .unwrap();
        assert_eq!(loaded, initramfs);
        assert_eq!(word(0x70), layout::ACPI.0 as u32);

        let count = memory
            .read_obj::<u8>(GuestAddress(layout::BOOT_PARAMS.0 + 0x1e8))
            .unwrap();
        let mut ram = 0;
        let mut last = 0;
        for index in 0..u64::from(count) {
            let at = GuestAddress(layout::BOOT_PARAMS.0 + 0x2d0 + index * 20);
            let start = memory.read_obj::<u64>(at).unwrap();
            let size = memory.read_obj::<u64>(GuestAddress(at.0 + 8)).unwrap();
            let kind = memory.read_obj::<u32>(GuestAddress(at.0 + 16)).unwrap();
            assert!(start >= last, "entries overlap");
            last = start + size;
            if kind == 1 {
                ram += size;
                assert!(last <= layout::HOLE || start >= layout::HOLE_END);
            }
        }
        assert_eq!(ram, (5 << 30) - (MIB - layout::LOW_RAM_END));
        assert_eq!(last, 6 << 30);
    }
}

#[test]
fn a_command_line_too_long_is_refused() {
    let image = elf(62, 2, MIB, 16, 16);
    let memory = memory(64 * MIB);
    // "pci=off " goes before it.
    assert!(boot(&memory, &image, None, &"x".repeat(2039)).is_ok());
    match boot(&memory, &image, None, &"x".repeat(2040)) {
        Err(LoadError::CommandLine {
            len: 2048,
            max: 2047,
        }) => {}
        other => panic!("{other:?}"),
    }
}

/// Reads a table and checks its length and checksum.
fn table(memory: &GuestMemory, at: u64, signature: &[u8; 4]) -> Vec<u8> {
    let len = memory.read_obj::<u32>(GuestAddress(at + 4)).unwrap();
    let mut bytes = vec![0; len as usize];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    assert_eq!(&bytes[..4], signature);
    assert_eq!(
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
        0
    );
    bytes
}

fn quad(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn tables(platform: Platform) -> [Vec<u8>; 3] {
    let memory = memory(64 * MIB);
    let rsdp = acpi::write(&memory, platform).unwrap();
    let xsdt = table(
        &memory,
        memory.read_obj::<u64>(GuestAddress(rsdp.0 + 24)).unwrap(),
        b"XSDT",
    );
    let fadt = table(&memory, quad(&xsdt, 36), b"FACP");
    let madt = table(&memory, quad(&xsdt, 44), b"APIC");
    let dsdt = table(&memory, quad(&fadt, 140), b"DSDT");
    [fadt, madt, dsdt]
}

#[test]
fn the_tables_are_whole_and_say_what_is_not_there() {
    let [fadt, madt, dsdt] = tables(Platform {
        vcpus: 3,
        virtio_devices: 40,
        com1: true,
    });
    let boot_arch = u16::from_le_bytes([fadt[109], fadt[110]]);
    assert_eq!(boot_arch & (1 << 5), 1 << 5, "no CMOS RTC");
    assert_eq!(boot_arch & (1 << 1), 0, "no i8042");
    let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
    assert_ne!(flags & (1 << 20), 0, "hardware-reduced");
    assert_ne!(flags & (1 << 10), 0, "reset register");
    assert_eq!((fadt[116], quad(&fadt, 120), fadt[128]), (1, 0x602, 1));

    let mut ids = Vec::new();
    let mut at = 44;
    while at < madt.len() {
        if madt[at] == 0 {
            ids.push(madt[at + 3]);
        }
        at += usize::from(madt[at + 1]);
    }
    assert_eq!(ids, [0, 1, 2]);

    let count = |needle: &[u8]| {
        dsdt.windows(needle.len())
            .filter(|part| *part == needle)
            .count()
    };
    assert_eq!(count(b"LNRO0005"), 40);
    for slot in [0u32, 18, 19, 39] {
        // Memory32Fixed, and an interrupt that is edge-triggered, active high and shared.
        let base = (0xd000_0000u32 + slot * 0x1000).to_le_bytes();
        assert_eq!(count(&[&[0x86, 9, 0, 1][..], &base].concat()), 1);
    }
    let interrupts = dsdt
        .windows(9)
        .filter(|part| part[..5] == [0x89, 6, 0, 0b1011, 1]);
    let mut pins: Vec<_> = interrupts.map(|part| part[5]).collect();
    assert_eq!(pins.len(), 40);
    assert!(pins.iter().all(|pin| (5..24).contains(pin)));
    pins.sort_unstable();
    pins.dedup();
    assert_eq!(pins.len(), 19);
    assert_eq!(count(b"COM1"), 1);
    let [.., dsdt] = tables(Platform {
        vcpus: 1,
        virtio_devices: 0,
        com1: false,
    });
    assert_eq!(dsdt.windows(4).filter(|part| part == b"COM1").count(), 0);
}

#[test]
fn more_devices_than_tables_hold_are_refused_and_the_most_fit() {
    let most = layout::MAX_VIRTIO_DEVICES;
    let platform = Platform {
        vcpus: MAX_VCPUS,
        virtio_devices: most,
        com1: true,
    };
    assert!(acpi::write(&memory(64 * MIB), platform).is_ok());
    let platform = Platform {
        virtio_devices: 4 * most,
        ..platform
    };
    let error = acpi::write(&memory(64 * MIB), platform).unwrap_err();
    assert!(matches!(error, LoadError::Tables { .. }), "{error}");
}

#[test]
fn each_vcpu_is_a_core_of_its_own() {
    let leaf = |function, index| Leaf {
        function,
        index,
        indexed: true,
        ..Leaf::default()
    };
    let supported = [
        Leaf {
            function: 0,
            eax: 0x1f,
            ..Leaf::default()
        },
        Leaf {
            function: 1,
            ebx: 0xff00_0800,
            ..Leaf::default()
        },
        Leaf {
            function: 0x4000_0001,
            eax: u32::MAX,
            ..Leaf::default()
        },
        Leaf {
            eax: 0x4000_0121,
            ..leaf(4, 0)
        },
        Leaf {
            eax: 0x4000_0163,
            ..leaf(4, 3)
        },
        Leaf {
            ecx: u32::MAX,
            edx: u32::MAX,
            ..leaf(7, 0)
        },
        Leaf {
            eax: 7,
            edx: 99,
            ..leaf(0xb, 0)
        },
        Leaf {
            function: 0x8000_0001,
            ecx: u32::MAX,
            ..Leaf::default()
        },
        Leaf {
            function: 0x8000_0008,
            ..Leaf::default()
        },
        Leaf {
            eax: 0x163,
            ..leaf(0x8000_001d, 3)
        },
        leaf(0x8000_001e, 0),
    ];
    let leaves = cpuid::for_vcpu(&supported, true, 5, 6);
    let find = |function, index| {
        let mut found = leaves
            .iter()
            .filter(|l| l.function == function && l.index == index);
        let leaf = *found.next().unwrap();
        assert!(
            found.next().is_none(),
            "leaf {function:#x}.{index} is there twice"
        );
        leaf
    };
    assert_eq!(!find(0x4000_0001, 0).eax, 0x4410);
    let basic = find(1, 0);
    assert_eq!(
        (
            basic.ebx >> 24,
            (basic.ebx >> 16) & 0xff,
            basic.ebx & 0xffff
        ),
        (5, 6, 0x800)
    );
    assert_eq!(basic.ecx, 1 << 31 | 1 << 24);
    assert_ne!(basic.edx & (1 << 28), 0);
    assert_eq!(
        (find(4, 0).eax >> 14) & 0xfff,
        0,
        "the first level is the core's"
    );
    assert_eq!(
        (find(4, 3).eax >> 14) & 0xfff,
        7,
        "the last level is everybody's"
    );
    assert_eq!(find(4, 3).eax >> 26, 7);
    for function in [0xb, 0x1f] {
        let (thread, core, end) = (find(function, 0), find(function, 1), find(function, 2));
        assert_eq!(
            (thread.eax, thread.ebx, thread.ecx, thread.edx),
            (0, 1, 0x100, 5)
        );
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 5));
        assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
    }
    assert_eq!(find(0x8000_0008, 0).ecx, 3 << 12 | 5);
    assert_eq!(find(0x8000_001e, 0).eax, 5);
    assert_eq!(find(7, 0).ecx & (1 << 7), 0);

    let alone = cpuid::for_vcpu(&supported, false, 0, 1);
    let basic = alone.iter().find(|leaf| leaf.function == 1).unwrap();
    assert_eq!((basic.edx & (1 << 28), basic.ecx & (1 << 24)), (0, 0));
}

#[test]
fn pins_are_shared_only_when_they_have_run_out() {
    let pins: Vec<_> = (0..19).map(layout::virtio_pin).collect();
    let mut unique = pins.clone();
    unique.dedup();
    assert_eq!(
        (pins.len(), unique.len(), pins[0], pins[18]),
        (19, 19, 5, 23)
    );
    assert_eq!(layout::virtio_pin(19), 5);
    assert_eq!(layout::virtio_address(layout::MAX_VIRTIO_DEVICES) % 4096, 0);
    assert!(layout::virtio_address(layout::MAX_VIRTIO_DEVICES) <= u64::from(layout::IOAPIC));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// No file makes the loader panic or write outside guest RAM.
    #[test]
    fn no_image_breaks_the_loader(
        elf_file in any::<bool>(),
        edits in prop::collection::vec((0..0x300usize, any::<u8>()), 0..12),
        cut in 0..0x3000usize,
    ) {
        let mut image = if elf_file { elf(62, 2, MIB, 4096, 8192) } else { bzimage(4096) };
        for (at, byte) in edits {
            image[at] = byte;
        }
        image.truncate(image.len() - cut.min(image.len()) / 4);
        let _ = boot(&memory(64 * MIB), &image, Some(&[1; 100]), "x");
    }
}
