//! What kernel images of all architectures have in common: how a file is recognised, why one is
//! refused, where the initramfs goes.

use std::fs::File;
use std::io::{self, Seek};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMemory;

/// What is wrong with a kernel image.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It cannot be read.
    #[error("Cannot read the kernel image")]
    Read(#[from] io::Error),
    /// It is for another processor.
    #[error("Kernel image is for {found}, expected {expected}")]
    WrongArchitecture {
        /// The processor it is for.
        found: String,
        /// This machine's.
        expected: &'static str,
    },
    /// It ends before what its headers promise.
    #[error("Kernel image is truncated: its {what} ends at byte {needed}, the file has {found}")]
    Truncated {
        /// The part that is cut off.
        what: &'static str,
        /// Bytes the file should have at least.
        needed: u64,
        /// Bytes it has.
        found: u64,
    },
    /// It is something else.
    #[error("Kernel image is {found}, expected {expected}")]
    Format {
        /// What it looks like.
        found: String,
        /// The kinds that can be loaded.
        expected: &'static str,
    },
    /// A field of its header says something that cannot be.
    #[error("Kernel image has {field} {found:#x}, expected {expected}")]
    Header {
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
        /// What it should be.
        expected: &'static str,
    },
    /// It is a bzImage that cannot be entered in 64-bit mode.
    #[error("Kernel image has no 64-bit entry point (boot protocol {version:#06x})")]
    No64BitEntry {
        /// Its boot protocol version.
        version: u16,
    },
    /// It cannot be placed where it says.
    #[error("Kernel image wants {start:#x}..{end:#x}, which is not free guest RAM from 1 MiB on")]
    Placement {
        /// First guest address.
        start: u64,
        /// End of the range.
        end: u64,
    },
    /// The loader refused it all the same.
    #[error("Kernel image refused")]
    Loader(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Why kernel and initramfs could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The kernel image is at fault.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initramfs cannot be read.
    #[error("Cannot read the initramfs")]
    Initramfs(#[source] io::Error),
    /// There is not enough RAM where the kernel can use it.
    #[error(
        "Guest memory is too small: kernel and initramfs need {needed} bytes, {available} are there"
    )]
    MemoryTooSmall {
        /// Bytes needed within the kernel's reach.
        needed: u64,
        /// Bytes there.
        available: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("Kernel command line has {len} bytes, at most {max} fit")]
    CommandLine {
        /// Its bytes.
        len: usize,
        /// The most that fit.
        max: usize,
    },
    /// The firmware tables outgrew their place.
    #[error("{tables} need {needed} bytes, {available} are there")]
    Tables {
        /// Which.
        tables: &'static str,
        /// Bytes needed.
        needed: usize,
        /// Bytes there.
        available: usize,
    },
    /// The device tree can't say this.
    #[error("Cannot write the device tree")]
    DeviceTree(#[from] vm_fdt::Error),
    /// A write into guest RAM failed.
    #[error("Cannot write to guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Bytes at a file's start within which every kind of image has its magic.
pub(crate) const HEAD: usize = 0x300;

/// An image's kind, by its magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An ELF file.
    Elf,
    /// Documentation/arch/x86/boot.rst.
    BzImage,
    /// Documentation/arch/arm64/booting.rst.
    Arm64,
    /// Documentation/arch/riscv/boot-image-header.rst.
    RiscV,
}

impl Kind {
    /// The kind of a file that starts with `head`.
    pub(crate) fn of(head: &[u8]) -> Option<Self> {
        let magic = |at: usize, bytes: &[u8]| head.get(at..at + bytes.len()) == Some(bytes);
        // Images for arm64 and RISC-V may start with the MZ of an EFI stub, as a bzImage does.
        [
            (0, &b"\x7fELF"[..], Self::Elf),
            (0x38, b"ARM\x64", Self::Arm64),
            (0x38, b"RSC\x05", Self::RiscV),
            (0x202, b"HdrS", Self::BzImage),
        ]
        .into_iter()
        .find(|(at, bytes, _)| magic(*at, bytes))
        .map(|(.., kind)| kind)
    }

    /// What an image of this kind is called where another is expected.
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Elf => "an ELF file",
            Self::BzImage => "x86_64 (a bzImage)",
            Self::Arm64 => "arm64 (an Image)",
            Self::RiscV => "RISC-V (an Image)",
        }
    }
}

/// What a file looks like that is no kernel image.
pub(crate) fn describe(head: &[u8]) -> String {
    match head {
        [] => "empty".into(),
        [0x1f, 0x8b, ..] => "a gzip file".into(),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "a zstd file".into(),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "an xz file".into(),
        [b'M', b'Z', _, _, b'z', b'i', b'm', b'g', ..] => {
            "an EFI program with a compressed kernel in it".into()
        }
        [b'M', b'Z', ..] => "an EFI program without a Linux header".into(),
        start => format!(
            "a file that starts with {:02x?}",
            &start[..start.len().min(4)]
        ),
    }
}

/// The first bytes of a file, at most [`HEAD`].
pub(crate) fn head(file: &File) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; HEAD];
    let mut have = 0;
    while have < HEAD {
        match file.read_at(&mut buffer[have..], have as u64) {
            Ok(0) => break,
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer.truncate(have);
    Ok(buffer)
}

/// Copies the initramfs to the end of `free`, which lies within RAM that begins at `ram`. Answers
/// its address and bytes.
pub(crate) fn load_initramfs(
    memory: &GuestMemory,
    ram: u64,
    free: Range<u64>,
    file: &mut File,
) -> Result<(u64, u64), LoadError> {
    let size = file.metadata().map_err(LoadError::Initramfs)?.len();
    let start = free.end.checked_sub(size).map_or(0, |start| start & !0xfff);
    if start < free.start {
        return Err(LoadError::MemoryTooSmall {
            needed: (free.start - ram).saturating_add(size.next_multiple_of(4096)),
            available: free.end - ram,
        });
    }
    let bytes = usize::try_from(size).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge));
    let bytes = bytes.map_err(LoadError::Initramfs)?;
    file.rewind().map_err(LoadError::Initramfs)?;
    memory.read_exact_volatile_from(GuestAddress(start), file, bytes)?;
    Ok((start, size))
}
