//! Recognising an arm64 Image (Documentation/arch/arm64/booting.rst), and loading it.

use std::fs::File;
use std::io::Seek;

use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::arch::image::{self, KernelError, Kind, LoadError};
use crate::memory::GuestMemory;

/// Bytes of the header.
const HEADER: usize = 64;
const ALIGNMENT: u64 = 2 << 20;
/// Bit 0 of the flags: the kernel is big-endian.
const BIG_ENDIAN: u64 = 1;

/// The kinds a user can choose from.
const EXPECTED: &str = "an arm64 Image";

/// An arm64 Image, its header checked against the file's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelImage {
    /// Where it starts from a multiple of 2 MiB on.
    text_offset: u64,
    /// Bytes it takes from there on, what is not in the file included.
    size: u64,
    /// Bytes of the file.
    len: u64,
}

/// Where a loaded kernel is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoadedKernel {
    pub(crate) entry: u64,
    /// End of all memory the kernel uses before it reads the device tree.
    pub(crate) end: u64,
}

impl KernelImage {
    /// Looks at the header of `file`.
    ///
    /// # Errors
    /// The image is of another kind, for another processor, cut off or contradicts itself.
    pub fn recognise(file: &File) -> Result<Self, KernelError> {
        let len = file.metadata()?.len();
        let head = image::head(file)?;
        match Kind::of(&head) {
            Some(Kind::Arm64) => Self::parse(&head, len),
            Some(Kind::Elf) => Err(KernelError::Format {
                found: Kind::Elf.describe().into(),
                expected: EXPECTED,
            }),
            Some(other) => Err(KernelError::WrongArchitecture {
                found: other.describe().into(),
                expected: "arm64",
            }),
            None => Err(KernelError::Format {
                found: image::describe(&head),
                expected: EXPECTED,
            }),
        }
    }

    /// Reads the header that starts a file of `len` bytes.
    fn parse(head: &[u8], len: u64) -> Result<Self, KernelError> {
        let Some(header) = head.first_chunk::<HEADER>() else {
            return Err(KernelError::Truncated {
                what: "header",
                needed: HEADER as u64,
                found: len,
            });
        };
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let (text_offset, size, flags) = (word(8), word(16), word(24));
        // Before Linux 3.17 there was no size, and the kernel could not say where it goes.
        if size == 0 || size > layout::REACH {
            return Err(KernelError::Header {
                field: "image_size",
                found: size,
                expected: "1 to 4 GiB",
            });
        }
        if text_offset >= ALIGNMENT || !text_offset.is_multiple_of(4096) {
            return Err(KernelError::Header {
                field: "text_offset",
                found: text_offset,
                expected: "whole pages below 2 MiB",
            });
        }
        if flags & BIG_ENDIAN != 0 {
            return Err(KernelError::Header {
                field: "flags",
                found: flags,
                expected: "a little-endian kernel (bit 0 clear)",
            });
        }
        if len > size {
            return Err(KernelError::Header {
                field: "image_size",
                found: size,
                expected: "no less than the file has",
            });
        }
        Ok(Self {
            text_offset,
            size,
            len,
        })
    }

    /// Copies the kernel to its place. A file that is shorter than its kernel leaves the rest zero,
    /// which is what the header's size is for; one that was cut off can't be told from that.
    pub(crate) fn load(
        &self,
        memory: &GuestMemory,
        file: &mut File,
    ) -> Result<LoadedKernel, LoadError> {
        let entry = layout::RAM + self.text_offset;
        let end = entry + self.size;
        let available = memory.size();
        if end - layout::RAM > available {
            return Err(LoadError::MemoryTooSmall {
                needed: end - layout::RAM,
                available,
            });
        }
        let bytes = usize::try_from(self.len).unwrap_or(usize::MAX);
        file.rewind().map_err(KernelError::Read)?;
        memory.read_exact_volatile_from(GuestAddress(entry), file, bytes)?;
        Ok(LoadedKernel { entry, end })
    }
}
