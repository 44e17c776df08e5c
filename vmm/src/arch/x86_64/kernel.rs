//! Recognising a kernel image, and loading it with its initramfs.

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::setup_header;
use linux_loader::elf::{ELFCLASS64, Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::layout;
use crate::arch::image::{self, HEAD, KernelError, Kind, LoadError};
use crate::memory::GuestMemory;

/// Boot protocol 2.12 has xloadflags.
const BZIMAGE_VERSION: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const EM_X86_64: u16 = 62;
/// The 64-bit entry point of a bzImage lies this far into its protected-mode part.
const BZIMAGE_ENTRY_64: u64 = 0x200;

/// A kernel image of a known kind, its headers checked against the file's length.
#[derive(Debug)]
pub(crate) enum KernelImage {
    /// `vmlinux`: loaded at its physical addresses, which end at `end`.
    Elf { end: u64 },
    /// `bzImage`: decompresses itself into `load..end`.
    BzImage { load: u64, end: u64 },
}

/// Where a loaded kernel is entered.
#[derive(Debug)]
pub(crate) struct LoadedKernel {
    pub(crate) entry: u64,
    /// End of all memory the kernel uses before it reads the memory map.
    pub(crate) end: u64,
    /// The setup header of a bzImage.
    pub(crate) header: Option<setup_header>,
}

impl KernelImage {
    /// Looks at the headers of `file`.
    pub(crate) fn recognise(file: &File) -> Result<Self, KernelError> {
        let len = file.metadata()?.len();
        let head = image::head(file)?;
        match Kind::of(&head) {
            Some(Kind::Elf) => Self::recognise_elf(file, len),
            Some(Kind::BzImage) => Self::recognise_bzimage(&head, len),
            Some(other) => Err(wrong_architecture(other.describe())),
            None if head.starts_with(b"MZ") && head.len() < HEAD => Err(KernelError::Truncated {
                what: "setup header",
                needed: HEAD as u64,
                found: len,
            }),
            None => Err(KernelError::Format {
                found: image::describe(&head),
                expected: "an ELF vmlinux or a bzImage",
            }),
        }
    }

    fn recognise_elf(file: &File, len: u64) -> Result<Self, KernelError> {
        let truncated = |what, needed| KernelError::Truncated {
            what,
            needed,
            found: len,
        };
        let mut header = Elf64_Ehdr::default();
        let header_len = size_of::<Elf64_Ehdr>() as u64;
        if len < header_len {
            return Err(truncated("ELF header", header_len));
        }
        file.read_exact_at(header.as_mut_slice(), 0)?;
        let class = header.e_ident[4];
        let (machine, entry) = (header.e_machine, header.e_entry);
        if machine != EM_X86_64 || class != ELFCLASS64 {
            return Err(wrong_architecture(&machine_name(machine, class)));
        }
        let entry_len = size_of::<Elf64_Phdr>() as u64;
        let table = header.e_phoff;
        let table_end = table.saturating_add(u64::from(header.e_phnum).saturating_mul(entry_len));
        if table_end > len {
            return Err(truncated("ELF program header table", table_end));
        }
        let (mut start, mut end) = (u64::MAX, 0);
        for index in 0..u64::from(header.e_phnum) {
            let mut segment = Elf64_Phdr::default();
            file.read_exact_at(segment.as_mut_slice(), table + index * entry_len)?;
            if segment.p_type != PT_LOAD {
                continue;
            }
            let in_file = segment.p_offset.saturating_add(segment.p_filesz);
            if in_file > len {
                return Err(truncated("ELF segment", in_file));
            }
            let size = segment.p_memsz.max(segment.p_filesz);
            start = start.min(segment.p_paddr);
            end = end.max(segment.p_paddr.saturating_add(size));
        }
        if end == 0 {
            return Err(KernelError::Format {
                found: "an ELF file without segments".into(),
                expected: "an ELF vmlinux or a bzImage",
            });
        }
        if start < layout::HIGH_RAM || end > layout::HOLE || !(start..end).contains(&entry) {
            return Err(KernelError::Placement { start, end });
        }
        Ok(Self::Elf { end })
    }

    fn recognise_bzimage(head: &[u8], len: u64) -> Result<Self, KernelError> {
        let mut header = setup_header::default();
        let at = 0x1f1;
        let size = size_of::<setup_header>();
        let Some(bytes) = head.get(at..at + size) else {
            let needed = (at + size) as u64;
            return Err(KernelError::Truncated {
                what: "setup header",
                needed,
                found: len,
            });
        };
        header.as_mut_slice().copy_from_slice(bytes);
        let version = header.version;
        if version < BZIMAGE_VERSION || header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(KernelError::No64BitEntry { version });
        }
        // boot.rst: 0 means 4; the boot sector comes on top; syssize counts 16 bytes.
        let sectors = if header.setup_sects == 0 {
            4
        } else {
            u64::from(header.setup_sects)
        };
        let needed = (sectors + 1) * 512 + u64::from(header.syssize) * 16;
        // The last unit of syssize may reach beyond the file.
        if needed > len + 15 {
            return Err(KernelError::Truncated {
                what: "compressed kernel",
                needed,
                found: len,
            });
        }
        let load = header.pref_address;
        let end = load.saturating_add(u64::from(header.init_size));
        if load < layout::HIGH_RAM || end > layout::HOLE {
            return Err(KernelError::Placement { start: load, end });
        }
        Ok(Self::BzImage { load, end })
    }

    /// End of all memory the kernel uses before it reads the memory map.
    pub(crate) fn end(&self) -> u64 {
        match self {
            Self::Elf { end } | Self::BzImage { end, .. } => *end,
        }
    }

    /// Copies the kernel to its place.
    pub(crate) fn load(
        &self,
        memory: &GuestMemory,
        file: &mut File,
    ) -> Result<LoadedKernel, LoadError> {
        let available = low_ram(memory);
        if self.end() > available {
            return Err(LoadError::MemoryTooSmall {
                needed: self.end(),
                available,
            });
        }
        let (loaded, entry) = match self {
            Self::Elf { .. } => {
                let loaded = Elf::load(memory, None, file, None).map_err(refused)?;
                let entry = loaded.kernel_load.0;
                (loaded, entry)
            }
            Self::BzImage { load, .. } => {
                let loaded = BzImage::load(memory, Some(GuestAddress(*load)), file, None)
                    .map_err(refused)?;
                (loaded, load + BZIMAGE_ENTRY_64)
            }
        };
        Ok(LoadedKernel {
            entry,
            end: self.end(),
            header: loaded.setup_header,
        })
    }
}

/// Copies the initramfs to the top of the RAM below the hole, as far as the kernel can reach.
/// Answers where it is.
pub(crate) fn load_initramfs(
    memory: &GuestMemory,
    kernel: &LoadedKernel,
    file: &mut File,
) -> Result<(u64, u64), LoadError> {
    let reach = kernel
        .header
        .map_or(u64::MAX, |header| u64::from(header.initrd_addr_max) + 1);
    let end = low_ram(memory).min(reach);
    image::load_initramfs(memory, 0, kernel.end.min(end)..end, file)
}

/// End of the RAM below the hole.
fn low_ram(memory: &GuestMemory) -> u64 {
    memory
        .find_region(GuestAddress(0))
        .map_or(0, GuestMemoryRegion::len)
}

fn refused(error: linux_loader::loader::Error) -> KernelError {
    KernelError::Loader(Box::new(error))
}

fn wrong_architecture(found: &str) -> KernelError {
    KernelError::WrongArchitecture {
        found: found.into(),
        expected: "x86_64",
    }
}

/// The processor an ELF header names.
fn machine_name(machine: u16, class: u8) -> String {
    let name = match machine {
        3 => "i386",
        21 => "ppc64",
        22 => "s390",
        40 => "arm",
        EM_X86_64 => "x86_64",
        183 => "aarch64",
        243 => "RISC-V",
        other => return format!("ELF machine {other}"),
    };
    let bits = if class == ELFCLASS64 { 64 } else { 32 };
    format!("{name} (a {bits}-bit ELF file)")
}
