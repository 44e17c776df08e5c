use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::thread;

use proptest::prelude::*;
use vm_memory::Bytes;

use super::psci::{Awake, Call, Outcome, Processors};
use super::*;
use crate::arch::image::KernelError;

const MIB: u64 = 1 << 20;

fn memory(size: u64) -> GuestMemory {
    GuestMemory::anonymous(&layout::ram_ranges(size)).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// An Image of `len` bytes whose header says this.
fn image(text_offset: u64, size: u64, flags: u64, len: usize) -> Vec<u8> {
    let mut image: Vec<u8> = (0..len).map(|byte| byte as u8).collect();
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = image.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, b"MZ");
    put(8, &text_offset.to_le_bytes());
    put(16, &size.to_le_bytes());
    put(24, &flags.to_le_bytes());
    put(0x38, b"ARM\x64");
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
    platform: Platform,
) -> Result<Entry, LoadError> {
    let mut kernel_file = file(image);
    let kernel = KernelImage::recognise(&kernel_file)?;
    let mut initramfs = initramfs.map(file);
    let seed = std::array::from_fn(|index| index as u8);
    let source = BootSource {
        kernel: &kernel,
        kernel_file: &mut kernel_file,
        initramfs: initramfs.as_mut(),
        command_line,
        seed,
    };
    load(memory, source, platform)
}

const PLATFORM: Platform = Platform {
    vcpus: 18,
    virtio_devices: 3,
    serial: true,
    gic: Gic::V3,
    levels: false,
};

#[test]
fn what_is_no_image_for_arm64_is_named() {
    let mut bzimage = vec![0; 0x300];
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    let mut riscv = vec![0; 0x300];
    riscv[0x38..0x3c].copy_from_slice(b"RSC\x05");
    for (image, text) in [
        (
            &bzimage[..],
            "Kernel image is for x86_64 (a bzImage), expected arm64",
        ),
        (
            &riscv,
            "Kernel image is for RISC-V (an Image), expected arm64",
        ),
        (
            b"\x7fELF\x02\x01\x01",
            "Kernel image is an ELF file, expected an arm64 Image",
        ),
        (
            b"\x1f\x8b\x08",
            "Kernel image is a gzip file, expected an arm64 Image",
        ),
        (
            b"MZ\0\0zimg",
            "Kernel image is an EFI program with a compressed kernel in it, expected an arm64 Image",
        ),
        (b"", "Kernel image is empty, expected an arm64 Image"),
    ] {
        assert_eq!(refusal(image).to_string(), text);
    }
}

#[test]
fn headers_that_cannot_be_are_refused_by_field() {
    for (image, field) in [
        (image(0, 0, 0, 4096), "image_size"),
        (image(0, u64::MAX, 0, 4096), "image_size"),
        (image(0, 4095, 0, 4096), "image_size"),
        (image(2 << 20, 8192, 0, 4096), "text_offset"),
        (image(0x8_0001, 8192, 0, 4096), "text_offset"),
        (image(0, 8192, 1, 4096), "flags"),
    ] {
        match refusal(&image) {
            KernelError::Header { field: found, .. } => assert_eq!(found, field),
            other => panic!("{other}"),
        }
    }
    let whole = image(0, 8192, 0, 64);
    assert!(KernelImage::recognise(&file(&whole)).is_ok());
    let cut = refusal(&whole[..63]);
    assert!(matches!(cut, KernelError::Truncated { needed: 64, .. }));
}

#[test]
fn a_kernel_lies_where_its_header_says() {
    let memory = memory(64 * MIB);
    let image = image(0x8_0000, 3 * MIB, 0xa, 5000);
    let initramfs = [0xab; 5000];
    let entry = boot(&memory, &image, Some(&initramfs), "quiet", PLATFORM).unwrap();
    assert_eq!(entry.pc, layout::RAM + 0x8_0000);
    let mut loaded = vec![0; image.len()];
    memory
        .read_slice(&mut loaded, GuestAddress(entry.pc))
        .unwrap();
    assert_eq!(loaded, image);
    assert_eq!(entry.x0, layout::RAM + 62 * MIB);
}

#[test]
fn too_little_memory_says_how_much_it_would_take() {
    let image = image(0, 40 * MIB, 0, 5000);
    for (size, fits) in [(32, false), (40, false), (42, true)] {
        let loaded = boot(&memory(size * MIB), &image, None, "", PLATFORM);
        match loaded {
            Ok(_) => assert!(fits, "{size}"),
            Err(LoadError::MemoryTooSmall { available, .. }) => {
                assert!(!fits && available == size * MIB, "{size}: {available}");
            }
            Err(other) => panic!("{size}: {other}"),
        }
    }
    let initramfs = vec![1; MIB as usize + 1];
    let loaded = boot(&memory(42 * MIB), &image, Some(&initramfs), "", PLATFORM);
    assert!(matches!(loaded, Err(LoadError::MemoryTooSmall { .. })));
    assert!(boot(&memory(44 * MIB), &image, Some(&initramfs), "", PLATFORM).is_ok());
}

#[test]
fn a_command_line_too_long_is_refused() {
    let image = image(0, 8192, 0, 4096);
    let memory = memory(64 * MIB);
    assert!(boot(&memory, &image, None, &"x".repeat(2047), PLATFORM).is_ok());
    match boot(&memory, &image, None, &"x".repeat(2048), PLATFORM) {
        Err(LoadError::CommandLine {
            len: 2048,
            max: 2047,
        }) => {}
        other => panic!("{other:?}"),
    }
}

/// Nodes by path, each with its properties: a reader of its own, by the Devicetree Specification.
fn parse(tree: &[u8]) -> BTreeMap<String, BTreeMap<String, Vec<u8>>> {
    let word = |at: usize| u32::from_be_bytes(tree[at..at + 4].try_into().unwrap());
    let text = |at: usize| {
        let end = tree[at..].iter().position(|byte| *byte == 0).unwrap();
        String::from_utf8(tree[at..at + end].to_vec()).unwrap()
    };
    assert_eq!(word(0), 0xd00d_feed);
    let (mut at, strings) = (word(8) as usize, word(12) as usize);
    let mut nodes: BTreeMap<String, BTreeMap<String, Vec<u8>>> = BTreeMap::new();
    let mut path: Vec<String> = Vec::new();
    loop {
        let token = word(at);
        at += 4;
        match token {
            1 => {
                let name = text(at);
                at = (at + name.len() + 1).next_multiple_of(4);
                path.push(name);
                nodes.insert(path.join("/"), BTreeMap::new());
            }
            2 => {
                path.pop();
            }
            3 => {
                let (len, name) = (word(at) as usize, word(at + 4) as usize);
                at += 8;
                let value = tree[at..at + len].to_vec();
                at = (at + len).next_multiple_of(4);
                let node = nodes.get_mut(&path.join("/")).unwrap();
                node.insert(text(strings + name), value);
            }
            9 => return nodes,
            other => panic!("token {other}"),
        }
    }
}

fn cells(value: &[u8]) -> Vec<u32> {
    let cells = value.chunks_exact(4);
    cells
        .map(|cell| u32::from_be_bytes(cell.try_into().unwrap()))
        .collect()
}

fn quads(value: &[u8]) -> Vec<u64> {
    let quads = value.chunks_exact(8);
    quads
        .map(|quad| u64::from_be_bytes(quad.try_into().unwrap()))
        .collect()
}

fn tree(platform: Platform) -> BTreeMap<String, BTreeMap<String, Vec<u8>>> {
    let memory = memory(64 * MIB);
    let image = image(0, 8192, 0, 4096);
    let initramfs = [0xab; 5000];
    let entry = boot(&memory, &image, Some(&initramfs), "a=b quiet", platform).unwrap();
    let mut tree = vec![0; layout::DEVICE_TREE_MAX as usize];
    memory
        .read_slice(&mut tree, GuestAddress(entry.x0))
        .unwrap();
    parse(&tree)
}

#[test]
fn the_tree_says_what_is_there() {
    let tree = tree(PLATFORM);
    let chosen = &tree["/chosen"];
    assert_eq!(chosen["bootargs"], b"a=b quiet\0");
    assert_eq!(chosen["stdout-path"], b"/pl011@9000000\0");
    assert!(tree.contains_key("/pl011@9000000"));
    let seed: Vec<u8> = (0..40).collect();
    assert_eq!(chosen["kaslr-seed"], seed[..8]);
    assert_eq!(chosen["rng-seed"], seed[8..]);
    let (start, end) = (
        quads(&chosen["linux,initrd-start"])[0],
        quads(&chosen["linux,initrd-end"])[0],
    );
    assert_eq!((start % 4096, end - start), (0, 5000));
    assert_eq!(
        quads(&tree["/memory@40000000"]["reg"]),
        [layout::RAM, 64 * MIB]
    );

    // Sixteen to a cluster.
    let reg = |name: &str| quads(&tree[name]["reg"]);
    assert_eq!(reg("/cpus/cpu@f"), [15]);
    assert_eq!(reg("/cpus/cpu@101"), [0x101]);
    let processors = tree
        .keys()
        .filter(|name| name.starts_with("/cpus/"))
        .count();
    assert_eq!(processors, 18);
    assert_eq!(tree["/psci"]["method"], b"hvc\0");

    let gic = &tree["/intc@8000000"];
    assert_eq!(gic["compatible"], b"arm,gic-v3\0");
    assert_eq!(
        quads(&gic["reg"]),
        [0x0800_0000, 0x1_0000, 0x1000_0000, 18 * 0x2_0000]
    );
    let timer = cells(&tree["/timer"]["interrupts"]);
    assert_eq!(timer, [1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4]);
    for slot in 0..3 {
        let address = 0x0a00_0000 + slot * 0x1000;
        let device = &tree[&format!("/virtio_mmio@{address:x}")];
        assert_eq!(cells(&device["interrupts"]), [0, 16 + slot as u32, 1]);
        assert_eq!(quads(&device["reg"]), [address, 0x1000]);
    }
}

#[test]
fn an_old_interrupt_controller_names_its_processors() {
    let tree = tree(Platform {
        vcpus: 2,
        gic: Gic::V2,
        serial: false,
        levels: true,
        ..PLATFORM
    });
    let gic = &tree["/intc@8000000"];
    assert_eq!(gic["compatible"], b"arm,cortex-a15-gic\0");
    assert_eq!(
        quads(&gic["reg"]),
        [0x0800_0000, 0x1000, 0x0801_0000, 0x2000]
    );
    assert_eq!(cells(&tree["/timer"]["interrupts"])[..3], [1, 13, 0x304]);
    let device = &tree["/virtio_mmio@a000000"];
    assert_eq!(cells(&device["interrupts"]), [0, 16, 4]);
    assert!(!tree["/chosen"].contains_key("stdout-path"));
    assert!(!tree.contains_key("/pl011@9000000"));
}

#[test]
fn the_largest_machine_has_a_tree() {
    let tree = tree(Platform {
        vcpus: MAX_VCPUS,
        virtio_devices: layout::MAX_VIRTIO_DEVICES,
        ..PLATFORM
    });
    assert_eq!(tree.len(), 7 + 2 + 254 + 512);
    let redistributors = quads(&tree["/intc@8000000"]["reg"])[3];
    assert!(layout::GIC_REDISTRIBUTORS + redistributors <= layout::GIC_REDISTRIBUTORS_END);
    assert!(layout::virtio_address(layout::MAX_VIRTIO_DEVICES) <= layout::GIC_REDISTRIBUTORS);
    // As many as a GIC can have.
    const { assert!(layout::INTERRUPTS <= 1020) };
}

proptest! {
    #[test]
    fn any_header_is_loaded_within_memory_or_refused(
        text_offset in prop_oneof![0..4 * MIB, Just(0x8_0000), any::<u64>()],
        size in prop_oneof![0..80 * MIB, any::<u64>()],
        flags: u64,
        len in 0usize..70_000,
        ram in 32u64..80,
        initramfs in proptest::option::of(0usize..3 << 20),
    ) {
        let ram = ram * MIB;
        let memory = memory(ram);
        let image = image(text_offset, size, flags, len);
        let initramfs = initramfs.map(|size| vec![1; size]);
        let loaded = boot(&memory, &image, initramfs.as_deref(), "", PLATFORM);
        if let Ok(entry) = loaded {
            prop_assert_eq!(entry.pc, layout::RAM + text_offset);
            prop_assert!(entry.x0 >= entry.pc + size);
            prop_assert!(entry.x0 + layout::DEVICE_TREE_MAX <= layout::RAM + ram);
        }
    }

    #[test]
    fn any_bytes_are_recognised_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..900)) {
        let _ = KernelImage::recognise(&file(&bytes));
    }

    #[test]
    fn any_call_has_an_answer(calls in proptest::collection::vec(
        (0usize..3, prop_oneof![0x8400_0000u64..0x8400_0010, 0xc400_0000u64..0xc400_0010, any::<u64>()], 0u64..5, any::<u64>()),
        0..40,
    )) {
        let processors = Processors::default();
        for index in 0..3 {
            processors.add(layout::affinity(index));
        }
        processors.set_on(0);
        for (place, function, first, second) in calls {
            let outcome = processors.call(place, Call::decode([function, first, second, 7]));
            if outcome == Outcome::Off {
                prop_assert!(!processors.is_on(place));
            }
        }
    }
}

/// The answer to a call of the first processor.
fn answer(processors: &Processors, call: [u64; 4]) -> i64 {
    match processors.call(0, Call::decode(call)) {
        Outcome::Return(value) => value.cast_signed(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn power_calls_answer_as_psci_has_them() {
    let processors = Processors::default();
    let first = processors.add(0);
    let second = processors.add(0x101);
    processors.set_on(first);
    let ask = |call| answer(&processors, call);
    assert_eq!(ask([0x8400_0000, 0, 0, 0]), 0x1_0000);
    for (function, there) in [
        (0x8400_0000, 0),
        (0x8400_0001, 0),
        (0xc400_0003, 0),
        (0x8400_0003, 0),
        (0x8400_0008, 0),
        (0x8400_0009, 0),
        // SYSTEM_RESET2, SYSTEM_SUSPEND, SMCCC_VERSION; a wide identifier of what has none.
        (0x8400_0012, -1),
        (0x8400_000e, -1),
        (0x8000_0000, -1),
        (0xc400_0002, -1),
    ] {
        assert_eq!(ask([0x8400_000a, function, 0, 0]), there, "{function:#x}");
    }
    assert_eq!(ask([0xc400_0004, 0, 0, 0]), 0);
    assert_eq!(ask([0xc400_0004, 0x101, 0, 0]), 1);
    assert_eq!(ask([0xc400_0004, 0x102, 0, 0]), -2);
    assert_eq!(ask([0xc400_0004, 0x101, 1, 0]), -2);
    assert_eq!(ask([0xc400_0003, 9, 0x4000, 1]), -2);
    assert_eq!(ask([0xc400_0003, 0, 0x4000, 1]), -4);
    assert_eq!(ask([0xc400_0003, 0x101, 0x4000_0000, 7]), 0);
    assert_eq!(ask([0xc400_0003, 0x101, 0x4000_0000, 7]), -5);
    assert_eq!(ask([0xc400_0004, 0x101, 0, 0]), 2);
    assert_eq!(ask([0x8400_0006, 0, 0, 0]), 2);
    let entry = Entry {
        pc: 0x4000_0000,
        x0: 7,
    };
    assert_eq!(processors.wait(second), Awake::Started(entry));
    assert_eq!(processors.wait(second), Awake::On);
    assert_eq!(ask([0xc400_0004, 0x101, 0, 0]), 0);
    let off = processors.call(second, Call::decode([0x8400_0002, 0, 0, 0]));
    assert_eq!(off, Outcome::Off);
    assert_eq!(ask([0x8400_0004, 0x101, 0, 0]), 1);
    for (function, outcome) in [
        (0x8400_0008, Outcome::SystemOff),
        (0x8400_0009, Outcome::SystemReset),
    ] {
        let call = Call::decode([function, 0, 0, 0]);
        assert_eq!(processors.call(first, call), outcome);
    }
}

#[test]
fn a_processor_waits_until_it_is_switched_on_or_kicked() {
    let processors = Arc::new(Processors::default());
    let place = processors.add(0);
    processors.kick(place);
    assert_eq!(processors.wait(place), Awake::Kicked);
    let waiting = Arc::clone(&processors);
    let waiter = thread::spawn(move || waiting.wait(place));
    let entry = Entry { pc: 8, x0: 9 };
    assert_eq!(answer(&processors, [0xc400_0003, 0, 8, 9]), 0);
    assert_eq!(waiter.join().unwrap(), Awake::Started(entry));
}
