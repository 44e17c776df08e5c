//! Guest RAM in a snapshot: written with holes, compared with a base, verified, mapped.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::format::{CHUNK, Extent, HEAD, Head, Id, Image, Kind, MAX_EXTENTS, PAGE, Section};
use super::format::{MAX_STATE, checksum};
use super::{SnapshotError, SnapshotFile};
use crate::memory::{FileRange, GuestMemory};
use crate::sys::random;

const PAGE_BYTES: usize = PAGE as usize;
const CHUNK_BYTES: usize = CHUNK as usize;
static ZEROES: [u8; CHUNK_BYTES] = [0; CHUNK_BYTES];

/// Pages between two runs of a diff that are worth an extent less.
const GAP: u64 = 4;

/// Writes a snapshot of `memory`, which nobody changes meanwhile, and of `sections` in the order of
/// their kinds and numbers. With a base, only the pages are written that are different there.
/// Answers its id.
pub(crate) fn write(
    file: &File,
    memory: &GuestMemory,
    sections: Vec<(Kind, u32, Vec<u8>)>,
    base: Option<&[SnapshotFile]>,
) -> Result<Id, SnapshotError> {
    // What another attempt left must not show through the holes.
    file.set_len(0).map_err(SnapshotError::file("empty"))?;
    let runs = match base {
        Some(base) => differences(memory, &map(base)?)?,
        None => whole(memory),
    };
    let mut image = write_runs(file, memory, &runs)?;
    let state = image
        .extents
        .last()
        .map_or(HEAD, |extent| extent.offset + extent.len);

    let mut all = sections;
    all.push((Kind::Memory, 0, std::mem::take(&mut image).encode()));
    let mut bytes = Vec::new();
    let mut table = Vec::with_capacity(all.len());
    for (kind, index, content) in all {
        table.push(Section {
            kind,
            index,
            offset: state + bytes.len() as u64,
            length: content.len() as u64,
            checksum: checksum(&content),
        });
        bytes.extend(content);
    }
    if bytes.len() as u64 > MAX_STATE {
        return Err(SnapshotError::Unsound(format!(
            "{} bytes of state",
            bytes.len()
        )));
    }
    let mut id = Id([0; 16]);
    random::fill(&mut id.0).map_err(SnapshotError::file("name"))?;
    let head = Head {
        id,
        base: base.and_then(|chain| Some(chain.last()?.id())),
        state,
        length: state + bytes.len() as u64,
        sections: table,
    };
    let written = file
        .write_all_at(&bytes, state)
        .and_then(|()| file.write_all_at(&head.encode().map_err(std::io::Error::other)?, 0));
    written.map_err(SnapshotError::file("write"))?;
    Ok(id)
}

impl Extent {
    fn range(&self) -> FileRange {
        FileRange {
            start: GuestAddress(self.guest),
            size: self.len,
            offset: self.offset,
        }
    }
}

/// First guest address and bytes.
pub(super) type Run = (u64, u64);

fn whole(memory: &GuestMemory) -> Vec<Run> {
    let regions = memory.iter();
    regions
        .map(|region| (region.start_addr().0, region.len()))
        .collect()
}

/// Runs of pages that are not the same in both, few enough to be mapped one by one.
fn differences(memory: &GuestMemory, base: &GuestMemory) -> Result<Vec<Run>, SnapshotError> {
    if whole(memory) != whole(base) {
        return Err(SnapshotError::Unsound(
            "the base is of a machine with other memory".to_owned(),
        ));
    }
    let mut runs: Vec<Run> = Vec::new();
    let (mut ours, mut theirs) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    for chunk in whole(memory).into_iter().flat_map(chunks) {
        let ours = read(memory, chunk, &mut ours)?;
        let theirs = read(base, chunk, &mut theirs)?;
        if ours == theirs {
            continue;
        }
        let pages = ours.chunks(PAGE_BYTES).zip(theirs.chunks(PAGE_BYTES));
        for (guest, (a, b)) in (chunk.0..).step_by(PAGE_BYTES).zip(pages) {
            if a != b {
                add(&mut runs, (guest, PAGE), GAP * PAGE, memory);
            }
        }
    }
    Ok(fitted(runs, MAX_EXTENTS, memory))
}

/// Joins runs with more and more between them until there are at most `most`.
pub(super) fn fitted(mut runs: Vec<Run>, most: usize, memory: &GuestMemory) -> Vec<Run> {
    let mut gap = GAP * PAGE;
    while runs.len() > most.max(memory.num_regions()) {
        gap *= 2;
        let mut fewer = Vec::new();
        for run in runs {
            add(&mut fewer, run, gap, memory);
        }
        runs = fewer;
    }
    runs
}

/// Adds a run behind the others, or to the last if that is of the same region and no more than `gap`
/// bytes before it.
fn add(runs: &mut Vec<Run>, (start, len): Run, gap: u64, memory: &GuestMemory) {
    match runs.last_mut() {
        Some((first, before))
            if start - (*first + *before) <= gap && same_region(memory, *first, start) =>
        {
            *before = start + len - *first;
        }
        _ => runs.push((start, len)),
    }
}

fn same_region(memory: &GuestMemory, a: u64, b: u64) -> bool {
    memory
        .find_region(GuestAddress(a))
        .is_some_and(|region| region.to_region_addr(GuestAddress(b)).is_some())
}

/// Parts of a run that have a checksum each.
fn chunks((start, len): Run) -> impl Iterator<Item = Run> {
    let offsets = (0..len).step_by(CHUNK_BYTES);
    offsets.map(move |offset| (start + offset, CHUNK.min(len - offset)))
}

fn read<'a>(
    memory: &GuestMemory,
    (start, len): Run,
    buffer: &'a mut [u8],
) -> Result<&'a [u8], SnapshotError> {
    let place = usize::try_from(len)
        .ok()
        .and_then(|len| buffer.get_mut(..len))
        .ok_or_else(|| SnapshotError::Unsound(format!("a run of {len} bytes")))?;
    memory
        .read_slice(place, GuestAddress(start))
        .map_err(|error| SnapshotError::Unsound(error.to_string()))?;
    Ok(place)
}

fn write_runs(file: &File, memory: &GuestMemory, runs: &[Run]) -> Result<Image, SnapshotError> {
    let mut image = Image::default();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut offset = HEAD;
    for &run in runs {
        image.extents.push(Extent {
            guest: run.0,
            len: run.1,
            offset,
        });
        for chunk in chunks(run) {
            let bytes = read(memory, chunk, &mut buffer)?;
            image.checksums.push(checksum(bytes));
            write_sparsely(file, bytes, offset).map_err(SnapshotError::file("write"))?;
            offset += chunk.1;
        }
    }
    Ok(image)
}

/// Leaves pages of zeroes out, and writes what is between them in one go.
fn write_sparsely(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    let is_zero = |page: &[u8]| ZEROES.get(..page.len()) == Some(page);
    let pages: Vec<_> = bytes.chunks(PAGE_BYTES).collect();
    let mut at = 0;
    for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let end = at + run.iter().map(|page| page.len()).sum::<usize>();
        if run.first().is_some_and(|page| !is_zero(page)) {
            file.write_all_at(&bytes[at..end], offset + at as u64)?;
        }
        at = end;
    }
    Ok(())
}

/// Guest RAM of a full snapshot and the diffs on it, oldest first: mapped, private, not read.
pub(crate) fn map(chain: &[SnapshotFile]) -> Result<GuestMemory, SnapshotError> {
    let mut below = None;
    for file in chain {
        if file.base() != below {
            return Err(SnapshotError::base(below, file.base()));
        }
        below = Some(file.id());
    }
    let Some(full) = chain.first() else {
        return Err(SnapshotError::base(None, None));
    };
    let ranges: Vec<_> = full.image.extents.iter().map(Extent::range).collect();
    let memory = GuestMemory::from_file(&full.file, &ranges)?;
    for diff in chain.iter().skip(1) {
        for extent in &diff.image.extents {
            memory.overlay(&diff.file, extent.range())?;
        }
    }
    Ok(memory)
}

impl SnapshotFile {
    /// Reads all guest RAM of the file and compares its checksums; holes are passed over.
    ///
    /// # Errors
    /// RAM that is not what was written.
    pub fn verify_memory(&self) -> Result<(), SnapshotError> {
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut sums = self.image.checksums.iter();
        let mut data = HEAD;
        for extent in &self.image.extents {
            for (offset, len) in chunks((extent.offset, extent.len)) {
                let Some(&expected) = sums.next() else {
                    return Err(SnapshotError::Unsound("too few checksums".to_owned()));
                };
                if data < offset + len {
                    data = self.next_data(data.max(offset));
                }
                let bytes = usize::try_from(len)
                    .ok()
                    .and_then(|len| buffer.get_mut(..len))
                    .unwrap_or_default();
                if data < offset + len {
                    self.file
                        .read_exact_at(bytes, offset)
                        .map_err(SnapshotError::file("read"))?;
                } else {
                    bytes.fill(0);
                }
                let found = checksum(bytes);
                if found != expected {
                    let guest = extent.guest + (offset - extent.offset);
                    return Err(SnapshotError::Checksum {
                        part: format!("RAM from {guest:#x}"),
                        found,
                        expected,
                    });
                }
            }
        }
        Ok(())
    }

    /// Where data begins at or after `offset`; `offset` itself on a file system that can't tell.
    fn next_data(&self, offset: u64) -> u64 {
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => u64::MAX,
            Err(_) => offset,
        }
    }
}
