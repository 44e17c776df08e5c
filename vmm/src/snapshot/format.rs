//! The layout of a snapshot's bytes. Pure: bytes in, typed values or an error out.
//!
//! | from | what |
//! |---|---|
//! | 0 | the head: 64 KiB with magic, version, ids and the table of sections |
//! | 64 KiB | guest RAM: extent after extent, zeroes as holes |
//! | behind it | the sections, in the order of the table, to the end of the file |
//!
//! Numbers are little-endian.

#![deny(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

use std::fmt;

use super::SnapshotError;

/// How a snapshot begins: no text, and spoilt by whatever converts line ends.
pub(super) const MAGIC: [u8; 8] = *b"\x89SMVM\r\n\x1a";

/// The version of this format, which is also that of every state in it.
pub const VERSION: u32 = 3;

/// Bytes of the head. A multiple of every host's page size, so that RAM behind it can be mapped.
pub(super) const HEAD: u64 = 64 << 10;

/// Bytes of all sections together, at most.
pub(super) const MAX_STATE: u64 = 32 << 20;

/// Extents of RAM, at most: each is a mapping when the snapshot is restored, and Linux gives a
/// process 65,530 (`vm.max_map_count`).
pub(super) const MAX_EXTENTS: usize = 16 << 10;

/// Bytes of RAM under one checksum.
pub(super) const CHUNK: u64 = 1 << 20;

/// Guest pages, in which RAM is compared and left out.
pub(super) const PAGE: u64 = 4096;

// Offsets in the head.
const AT_VERSION: usize = 8;
const AT_CHECKSUM: usize = 12;
const AT_ID: usize = 16;
const AT_BASE: usize = 32;
const AT_STATE: usize = 48;
const AT_LENGTH: usize = 56;
const AT_COUNT: usize = 64;
const AT_TABLE: usize = 80;
/// Bytes of a table entry: kind, number, offset, length, checksum, and a word that is 0.
const ENTRY: usize = 32;
/// Sections that fit into the table.
const MAX_SECTIONS: usize = 1024;
/// Bytes of an extent in the section that lists them.
const EXTENT: usize = 24;

/// What a section is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The shape of the machine.
    Machine = 1,
    /// What the hypervisor holds of the VM.
    Vm = 2,
    /// A vCPU, by number.
    Vcpu = 3,
    /// Every device.
    Devices = 4,
    /// Where guest RAM is in the file, and its checksums.
    Memory = 5,
}

impl Kind {
    fn of(number: u32) -> Option<Self> {
        let all = [
            Self::Machine,
            Self::Vm,
            Self::Vcpu,
            Self::Devices,
            Self::Memory,
        ];
        all.into_iter().find(|kind| *kind as u32 == number)
    }
}

/// Tells snapshots apart; random.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Id(pub(super) [u8; 16]);

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Section {
    pub(super) kind: Kind,
    pub(super) index: u32,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) checksum: u32,
}

/// What the head says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) id: Id,
    /// Absent in a full snapshot.
    pub(super) base: Option<Id>,
    /// Where RAM ends and the sections begin.
    pub(super) state: u64,
    /// Bytes of the file.
    pub(super) length: u64,
    pub(super) sections: Vec<Section>,
}

/// A run of guest pages in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) guest: u64,
    pub(super) len: u64,
    pub(super) offset: u64,
}

/// All extents, in order, and the checksum of each [`CHUNK`] of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) extents: Vec<Extent>,
    pub(super) checksums: Vec<u32>,
}

pub(super) fn checksum(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// The checksum of a head, in which the place of the checksum itself counts as zeroes.
fn head_checksum(head: &[u8]) -> u32 {
    let (before, rest) = head.split_at(AT_CHECKSUM.min(head.len()));
    let mut sum = crc32fast::Hasher::new();
    for part in [before, &[0; 4], rest.get(4..).unwrap_or(&[])] {
        sum.update(part);
    }
    sum.finalize()
}

fn unsound(what: impl Into<String>) -> SnapshotError {
    SnapshotError::Unsound(what.into())
}

/// `N` bytes at `at`; zeroes beyond the end.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes
        .get_mut(at..)
        .and_then(|rest| rest.get_mut(..value.len()))
    {
        place.copy_from_slice(value);
    }
}

impl Head {
    /// The head's bytes; the sections are as many as fit, which the writer has seen to.
    pub(super) fn encode(&self) -> Result<Vec<u8>, SnapshotError> {
        if self.sections.len() > MAX_SECTIONS {
            return Err(unsound(format!("{} sections", self.sections.len())));
        }
        let mut bytes = vec![0; usize::try_from(HEAD).unwrap_or(0)];
        put(&mut bytes, 0, &MAGIC);
        put(&mut bytes, AT_VERSION, &VERSION.to_le_bytes());
        put(&mut bytes, AT_ID, &self.id.0);
        put(&mut bytes, AT_BASE, &self.base.map_or([0; 16], |id| id.0));
        put(&mut bytes, AT_STATE, &self.state.to_le_bytes());
        put(&mut bytes, AT_LENGTH, &self.length.to_le_bytes());
        // At most MAX_SECTIONS.
        let count = self.sections.len() as u32;
        put(&mut bytes, AT_COUNT, &count.to_le_bytes());
        let places = (AT_TABLE..).step_by(ENTRY);
        for (at, section) in places.zip(&self.sections) {
            let mut entry = [0; ENTRY];
            put(&mut entry, 0, &(section.kind as u32).to_le_bytes());
            put(&mut entry, 4, &section.index.to_le_bytes());
            put(&mut entry, 8, &section.offset.to_le_bytes());
            put(&mut entry, 16, &section.length.to_le_bytes());
            put(&mut entry, 24, &section.checksum.to_le_bytes());
            put(&mut bytes, at, &entry);
        }
        let sum = head_checksum(&bytes);
        put(&mut bytes, AT_CHECKSUM, &sum.to_le_bytes());
        Ok(bytes)
    }

    /// Reads the first [`HEAD`] bytes of a file of `length` bytes; fewer when it has no more.
    pub(super) fn parse(bytes: &[u8], length: u64) -> Result<Self, SnapshotError> {
        let found = field(bytes, 0);
        if found != MAGIC {
            return Err(SnapshotError::Magic { found });
        }
        // Before the checksum: another version may have another one.
        let found = word(bytes, AT_VERSION);
        if found != VERSION {
            return Err(SnapshotError::Version { found });
        }
        if bytes.len() as u64 != HEAD {
            return Err(SnapshotError::Length {
                found: length,
                expected: HEAD,
            });
        }
        let expected = word(bytes, AT_CHECKSUM);
        let found = head_checksum(bytes);
        if found != expected {
            let part = "head".to_owned();
            return Err(SnapshotError::Checksum {
                part,
                found,
                expected,
            });
        }
        let expected = long(bytes, AT_LENGTH);
        if expected != length {
            return Err(SnapshotError::Length {
                found: length,
                expected,
            });
        }
        let base: [u8; 16] = field(bytes, AT_BASE);
        let head = Self {
            id: Id(field(bytes, AT_ID)),
            base: (base != [0; 16]).then_some(Id(base)),
            state: long(bytes, AT_STATE),
            length,
            sections: sections(bytes)?,
        };
        head.check()?;
        Ok(head)
    }

    /// Sections lie one after the other from RAM to the end, no two are of the same name, and they
    /// are of a size to be read whole.
    fn check(&self) -> Result<(), SnapshotError> {
        let in_place = self.state >= HEAD && self.state.is_multiple_of(PAGE);
        let size = self.length.checked_sub(self.state);
        if !in_place || size.is_none_or(|size| size > MAX_STATE) {
            return Err(unsound(format!(
                "sections from {:#x} to {:#x}",
                self.state, self.length
            )));
        }
        let mut end = self.state;
        let mut last = None;
        for section in &self.sections {
            let name = (section.kind, section.index);
            if section.offset != end || last.is_some_and(|last| last >= name) {
                return Err(unsound(format!("{section:?} is out of place")));
            }
            last = Some(name);
            end = end
                .checked_add(section.length)
                .filter(|end| *end <= self.length)
                .ok_or_else(|| unsound(format!("{section:?} goes beyond the file")))?;
        }
        if end != self.length {
            return Err(unsound("bytes behind the last section"));
        }
        Ok(())
    }
}

fn sections(head: &[u8]) -> Result<Vec<Section>, SnapshotError> {
    let count = word(head, AT_COUNT) as usize;
    if count > MAX_SECTIONS {
        return Err(unsound(format!("{count} sections")));
    }
    let table = head.get(AT_TABLE..).unwrap_or(&[]);
    let entries = table.chunks_exact(ENTRY).take(count);
    entries
        .map(|entry| {
            let number = word(entry, 0);
            let kind =
                Kind::of(number).ok_or_else(|| unsound(format!("a section of kind {number}")))?;
            Ok(Section {
                kind,
                index: word(entry, 4),
                offset: long(entry, 8),
                length: long(entry, 16),
                checksum: word(entry, 24),
            })
        })
        .collect()
}

impl Extent {
    /// Checksums it takes.
    pub(super) fn chunks(&self) -> u64 {
        self.len.div_ceil(CHUNK)
    }
}

impl Image {
    /// The section's bytes: the number of extents, these, the checksums.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // At most MAX_EXTENTS.
        bytes.extend((self.extents.len() as u32).to_le_bytes());
        for extent in &self.extents {
            for value in [extent.guest, extent.len, extent.offset] {
                bytes.extend(value.to_le_bytes());
            }
        }
        for checksum in &self.checksums {
            bytes.extend(checksum.to_le_bytes());
        }
        bytes
    }

    /// Reads the section of a file whose sections begin at `state`.
    pub(super) fn parse(bytes: &[u8], state: u64) -> Result<Self, SnapshotError> {
        let count = word(bytes, 0) as usize;
        let list = bytes.get(4..).unwrap_or(&[]);
        let size = count.saturating_mul(EXTENT);
        let (Some(list), Some(sums)) = (list.get(..size), list.get(size..)) else {
            return Err(unsound(format!("{count} extents")));
        };
        if count > MAX_EXTENTS {
            return Err(unsound(format!("{count} extents")));
        }
        let extents: Vec<Extent> = list
            .chunks_exact(EXTENT)
            .map(|entry| Extent {
                guest: long(entry, 0),
                len: long(entry, 8),
                offset: long(entry, 16),
            })
            .collect();
        let mut offset = HEAD;
        let mut free = 0;
        let mut chunks: u64 = 0;
        for extent in &extents {
            let bad = || unsound(format!("{extent:x?}"));
            let whole = |value: u64| value.is_multiple_of(PAGE);
            if extent.len == 0 || !whole(extent.len) || !whole(extent.guest) {
                return Err(bad());
            }
            if extent.offset != offset || extent.guest < free {
                return Err(bad());
            }
            offset = offset.checked_add(extent.len).ok_or_else(bad)?;
            free = extent.guest.checked_add(extent.len).ok_or_else(bad)?;
            chunks = chunks.saturating_add(extent.chunks());
        }
        if offset != state {
            return Err(unsound(format!(
                "RAM ends at {offset:#x}, sections begin at {state:#x}"
            )));
        }
        if sums.len() as u64 != chunks.saturating_mul(4) {
            return Err(unsound(format!("{} bytes of checksums", sums.len())));
        }
        let checksums = sums.chunks_exact(4).map(|sum| word(sum, 0)).collect();
        Ok(Self { extents, checksums })
    }
}

/// Makes any bytes of a head's size begin like one of a file of `length` bytes.
#[cfg(any(test, feature = "testing"))]
pub(super) fn seal(head: &mut [u8], length: u64) {
    put(head, 0, &MAGIC);
    put(head, AT_VERSION, &VERSION.to_le_bytes());
    put(head, AT_LENGTH, &length.to_le_bytes());
    let sum = head_checksum(head);
    put(head, AT_CHECKSUM, &sum.to_le_bytes());
}
