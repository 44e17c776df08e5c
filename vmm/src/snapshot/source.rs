//! A snapshot that is there: its head and sections are read and checked when it is opened.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::de::DeserializeOwned;

use super::format::{HEAD, Head, Id, Image, Kind, Section, checksum};
use super::{SnapshotError, state};

/// An open snapshot, whose state is whole. Its RAM is as the file has it: see
/// [`verify_memory`](Self::verify_memory).
#[derive(Debug)]
pub struct SnapshotFile {
    pub(super) file: File,
    pub(super) head: Head,
    pub(super) image: Image,
    /// The bytes of all sections.
    state: Vec<u8>,
}

impl SnapshotFile {
    /// Reads and checks a snapshot's head and sections.
    ///
    /// # Errors
    /// Whatever is wrong with it: no snapshot, another version, truncated, damaged, hostile.
    pub fn open(file: File) -> Result<Self, SnapshotError> {
        let metadata = file.metadata().map_err(SnapshotError::file("look at"))?;
        if !metadata.is_file() {
            return Err(SnapshotError::Unsound("it is no regular file".to_owned()));
        }
        let length = metadata.len();
        let mut bytes = vec![0; usize::try_from(length.min(HEAD)).unwrap_or(0)];
        file.read_exact_at(&mut bytes, 0)
            .map_err(SnapshotError::file("read"))?;
        let head = Head::parse(&bytes, length)?;
        // At most MAX_STATE, as the head was checked.
        let size = length.saturating_sub(head.state);
        let mut state = vec![0; usize::try_from(size).unwrap_or(0)];
        file.read_exact_at(&mut state, head.state)
            .map_err(SnapshotError::file("read"))?;
        let mut opened = Self {
            file,
            head,
            image: Image::default(),
            state,
        };
        for section in &opened.head.sections {
            let found = checksum(opened.bytes(section));
            if found != section.checksum {
                return Err(SnapshotError::Checksum {
                    part: format!("section {:?} {}", section.kind, section.index),
                    found,
                    expected: section.checksum,
                });
            }
        }
        opened.image = Image::parse(opened.section(Kind::Memory, 0)?, opened.head.state)?;
        Ok(opened)
    }

    /// What tells it from all others.
    pub fn id(&self) -> Id {
        self.head.id
    }

    /// The snapshot this one is a diff of.
    pub fn base(&self) -> Option<Id> {
        self.head.base
    }

    /// Bytes of guest RAM it has, holes included.
    pub fn memory_len(&self) -> u64 {
        self.image.extents.iter().map(|extent| extent.len).sum()
    }

    /// Kind, number and bytes of each section.
    pub fn sections(&self) -> impl Iterator<Item = (Kind, u32, &[u8])> {
        let sections = self.head.sections.iter();
        sections.map(|section| (section.kind, section.index, self.bytes(section)))
    }

    /// The bytes of a section.
    ///
    /// # Errors
    /// There is none.
    pub fn section(&self, kind: Kind, index: u32) -> Result<&[u8], SnapshotError> {
        let sections = self.head.sections.iter();
        let mut found = sections.filter(|section| (section.kind, section.index) == (kind, index));
        match found.next() {
            Some(section) => Ok(self.bytes(section)),
            None => Err(SnapshotError::Missing { kind, index }),
        }
    }

    /// A section's state.
    pub(crate) fn state<T: DeserializeOwned>(
        &self,
        kind: Kind,
        index: u32,
    ) -> Result<T, SnapshotError> {
        let bytes = self.section(kind, index)?;
        state::decode(bytes).map_err(|source| SnapshotError::Section {
            kind,
            index,
            source,
        })
    }

    fn bytes(&self, section: &Section) -> &[u8] {
        let from = section.offset.saturating_sub(self.head.state);
        let to = from.saturating_add(section.length);
        let range =
            usize::try_from(from).unwrap_or(usize::MAX)..usize::try_from(to).unwrap_or(usize::MAX);
        self.state.get(range).unwrap_or(&[])
    }
}
