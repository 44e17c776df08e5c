//! The state Linux expects at its 64-bit entry point (Documentation/arch/x86/boot.rst, "64-bit Boot
//! Protocol"): page tables, descriptors, boot parameters.

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::acpi::RESET_VALUE;
use super::kernel::LoadedKernel;
use super::{SEED_LEN, layout};
use crate::arch::image::LoadError;
use crate::memory::GuestMemory;

/// Selectors boot.rst asks for: `__BOOT_CS` and `__BOOT_DS`.
pub(crate) const CODE_SELECTOR: u16 = 0x10;
pub(crate) const DATA_SELECTOR: u16 = 0x18;
/// 64-bit code, and flat data; descriptor 1 stays empty.
pub(crate) const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const PAGE: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const E820_ACPI: u32 = 3;

/// `type_of_loader`: none of the registered ones.
const LOADER_OTHER: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// The protocol this fills in for an ELF kernel, which has no setup header of its own: 2.15.
const PROTOCOL: u16 = 0x020f;
/// `COMMAND_LINE_SIZE` of x86, its zero included.
const COMMAND_LINE_SIZE: usize = 2048;
/// `setup_data` type: entropy for the kernel's generator.
const SETUP_RNG_SEED: u32 = 9;

/// How the boot processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub rip: u64,
    /// The boot parameters.
    pub rsi: u64,
    /// The page tables.
    pub cr3: u64,
    /// The address of the GDT, a null descriptor and flat 64-bit segments.
    pub gdt: u64,
}

/// Identity-maps the first GiB with 2 MiB pages and writes the GDT.
pub(crate) fn write_tables(memory: &GuestMemory) -> Result<(), LoadError> {
    let pml4 = layout::PAGE_TABLES;
    let pointers = GuestAddress(pml4.0 + PAGE);
    let directory = GuestAddress(pointers.0 + PAGE);
    memory.write_obj(pointers.0 | PRESENT_WRITABLE, pml4)?;
    memory.write_obj(directory.0 | PRESENT_WRITABLE, pointers)?;
    let mut entries = [0; 512 * 8];
    for (index, entry) in entries.chunks_exact_mut(8).enumerate() {
        let page = (index as u64 * LARGE_PAGE) | PRESENT_WRITABLE | LARGE;
        entry.copy_from_slice(&page.to_le_bytes());
    }
    memory.write_slice(&entries, directory)?;
    for (index, descriptor) in GDT.iter().enumerate() {
        memory.write_obj(*descriptor, GuestAddress(layout::GDT.0 + index as u64 * 8))?;
    }
    Ok(())
}

/// Puts a write to the reset register where firmware would start over. A kernel with EFI support
/// passes by the FADT on a hardware-reduced platform, finds no EFI, and comes here in real mode.
pub(crate) fn write_reset_vector(memory: &GuestMemory) -> Result<(), LoadError> {
    let [low, high] = (layout::POWER + 2).to_le_bytes();
    // mov dx, RESET; mov al, RESET_VALUE; out dx, al; hlt; jmp to the hlt
    let code = [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd];
    memory.write_slice(&code, layout::RESET_VECTOR)?;
    Ok(())
}

/// What the boot parameters tell the kernel.
pub(crate) struct Parameters<'a> {
    pub(crate) kernel: &'a LoadedKernel,
    /// Address and bytes.
    pub(crate) initramfs: Option<(u64, u64)>,
    pub(crate) command_line: &'a str,
    pub(crate) rsdp: GuestAddress,
    /// Entropy the kernel mixes in before anything runs.
    pub(crate) seed: [u8; SEED_LEN],
}

/// Writes boot parameters, command line and setup data; answers how to enter the kernel.
pub(crate) fn write_parameters(
    memory: &GuestMemory,
    parameters: &Parameters<'_>,
) -> Result<Entry, LoadError> {
    let mut zero_page = boot_params::default();
    let header = &mut zero_page.hdr;
    let command_line_max = match parameters.kernel.header {
        Some(own) => {
            *header = own;
            own.cmdline_size as usize
        }
        None => {
            header.boot_flag = BOOT_FLAG;
            header.header = HEADER_MAGIC;
            header.version = PROTOCOL;
            header.kernel_alignment = LARGE_PAGE as u32;
            COMMAND_LINE_SIZE - 1
        }
    };
    header.type_of_loader = LOADER_OTHER;

    let command_line = parameters.command_line.as_bytes();
    let max = command_line_max.min((layout::SETUP_DATA.0 - layout::COMMAND_LINE.0) as usize - 1);
    if command_line.len() > max {
        return Err(LoadError::CommandLine {
            len: command_line.len(),
            max,
        });
    }
    memory.write_slice(command_line, layout::COMMAND_LINE)?;
    memory.write_obj(
        0u8,
        GuestAddress(layout::COMMAND_LINE.0 + command_line.len() as u64),
    )?;
    header.cmd_line_ptr = layout::COMMAND_LINE.0 as u32;
    header.cmdline_size = command_line.len() as u32;

    if let Some((address, size)) = parameters.initramfs {
        // Both lie below the hole, so below 4 GiB.
        header.ramdisk_image = address as u32;
        header.ramdisk_size = size as u32;
    }
    header.setup_data = write_seed(memory, &parameters.seed)?.0;
    zero_page.acpi_rsdp_addr = parameters.rsdp.0;

    let map = memory_map(memory);
    zero_page.e820_entries = map.len() as u8;
    zero_page.e820_table[..map.len()].copy_from_slice(&map);
    memory.write_obj(zero_page, layout::BOOT_PARAMS)?;

    Ok(Entry {
        rip: parameters.kernel.entry,
        rsi: layout::BOOT_PARAMS.0,
        cr3: layout::PAGE_TABLES.0,
        gdt: layout::GDT.0,
    })
}

/// A `struct setup_data`: next, type, length, then the data.
fn write_seed(memory: &GuestMemory, seed: &[u8; SEED_LEN]) -> Result<GuestAddress, LoadError> {
    let at = layout::SETUP_DATA;
    memory.write_obj(0u64, at)?;
    memory.write_obj(SETUP_RNG_SEED, GuestAddress(at.0 + 8))?;
    memory.write_obj(SEED_LEN as u32, GuestAddress(at.0 + 12))?;
    memory.write_slice(seed, GuestAddress(at.0 + 16))?;
    Ok(at)
}

/// The E820 map: conventional memory, what a PC keeps below 1 MiB, then each region of RAM.
fn memory_map(memory: &GuestMemory) -> Vec<boot_e820_entry> {
    let entry = |addr, end: u64, r#type| boot_e820_entry {
        addr,
        size: end - addr,
        r#type,
    };
    let mut map = vec![
        entry(0, layout::LOW_RAM_END, E820_RAM),
        entry(layout::LOW_RAM_END, layout::ACPI.0, E820_RESERVED),
        entry(layout::ACPI.0, layout::HIGH_RAM, E820_ACPI),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0;
        map.push(entry(
            start.max(layout::HIGH_RAM),
            start + region.len(),
            E820_RAM,
        ));
    }
    map
}
