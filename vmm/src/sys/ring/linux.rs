//! io_uring (io_uring_setup(2)), restricted to what a disk does with the files it was made for.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use vm_memory::VolatileSlice;

use super::{Direction, Ended};
use crate::memory::GuestMemory;
use crate::sys::doorbell::Doorbell;

/// The most slices of one operation (`IOV_MAX`).
const MAX_SLICES: usize = 1024;
/// The kernel's own threads for one ring, for what can't be begun without waiting.
const MAX_WORKERS: u32 = 8;

/// A ring that can't do anything yet.
pub struct Spare {
    ring: IoUring,
    depth: usize,
}

impl Spare {
    /// A ring for `depth` operations at once.
    ///
    /// # Errors
    /// A kernel that has no io_uring, or forbids it (`kernel.io_uring_disabled`, seccomp).
    pub fn new(depth: u32) -> io::Result<Self> {
        Ok(Self {
            ring: IoUring::builder().setup_r_disabled().build(depth)?,
            depth: depth as usize,
        })
    }
}

impl std::fmt::Debug for Spare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spare")
            .field("depth", &self.depth)
            .finish_non_exhaustive()
    }
}

/// Requests to the kernel that are under way, and their files.
pub struct Ring {
    ring: IoUring,
    bell: Doorbell,
    depth: usize,
    /// Operations the kernel has, or will have with the next [`submit`](Self::submit).
    started: usize,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    /// Slots for which the ring had no room.
    waiting: VecDeque<usize>,
}

/// One operation.
struct Slot {
    tag: u64,
    file: u32,
    what: What,
    /// Keeps what the vector points to mapped until the kernel is done with it.
    _memory: Option<GuestMemory>,
}

enum What {
    Transfer {
        direction: Direction,
        offset: u64,
        vector: Vec<libc::iovec>,
        /// The first slice that is not done.
        first: usize,
    },
    Sync,
}

// SAFETY: the pointers are into guest memory that the slot keeps mapped; only the kernel follows
// them.
unsafe impl Send for Slot {}

impl Ring {
    /// Has a ring read, write and sync these files, and do nothing else: whoever gets hold of it
    /// can't open or send anything through it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn new(spare: Spare, files: &[&File]) -> io::Result<Self> {
        let Spare { ring, depth } = spare;
        let bell = Doorbell::new()?;
        let files: Vec<_> = files.iter().map(|file| file.as_raw_fd()).collect();
        let submitter = ring.submitter();
        submitter.register_files(&files)?;
        submitter.register_eventfd(bell.as_fd().as_raw_fd())?;
        // A matter of the host's load; kernels before 5.15 have no such limit.
        let _ = submitter.register_iowq_max_workers(&mut [MAX_WORKERS, MAX_WORKERS]);
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
        ])?;
        submitter.register_enable_rings()?;
        Ok(Self {
            ring,
            bell,
            depth,
            started: 0,
            slots: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
        })
    }

    /// Rings when something has ended.
    pub fn bell(&self) -> &Doorbell {
        &self.bell
    }

    /// What was started and has not been reported by [`ended`](Self::ended).
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Starts to move all bytes of `slices`, which lie in `memory`, from or to a file, by its number
    /// and an offset.
    ///
    /// # Errors
    /// Slices that are not of that memory.
    pub fn transfer(
        &mut self,
        tag: u64,
        direction: Direction,
        (file, offset): (usize, u64),
        slices: &[VolatileSlice<'_>],
        memory: &GuestMemory,
    ) -> io::Result<()> {
        let vector: Vec<_> = slices
            .iter()
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect();
        // The kernel writes there long after this call: what isn't kept must not be started.
        if !vector.iter().all(|slice| is_of(memory, slice)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.start(Slot {
            tag,
            file: u32::try_from(file).map_err(|_| io::ErrorKind::InvalidInput)?,
            what: What::Transfer {
                direction,
                offset,
                vector,
                first: 0,
            },
            _memory: Some(memory.clone()),
        });
        Ok(())
    }

    /// Starts to make durable what was written to a file before.
    pub fn sync(&mut self, tag: u64, file: usize) {
        self.start(Slot {
            tag,
            file: u32::try_from(file).unwrap_or(u32::MAX),
            what: What::Sync,
            _memory: None,
        });
    }

    /// Hands the kernel what was started.
    ///
    /// # Errors
    /// The kernel takes nothing any more.
    pub fn submit(&mut self) -> io::Result<()> {
        self.enter(0)
    }

    /// Waits until something has ended.
    ///
    /// # Errors
    /// The kernel can't be waited for.
    pub fn wait(&mut self) -> io::Result<()> {
        self.enter(1)
    }

    /// The next thing that has ended.
    pub fn ended(&mut self) -> Option<Ended> {
        loop {
            let entry = self.ring.completion().next()?;
            self.started = self.started.saturating_sub(1);
            let index = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
            let ended = self.complete(index, entry.result());
            if let Some(next) = self.waiting.pop_front() {
                self.push(next);
            }
            if ended.is_some() {
                return ended;
            }
        }
    }

    /// Waits until nothing is in flight, and forgets what that was.
    ///
    /// # Errors
    /// The kernel can't be waited for.
    pub fn settle(&mut self) -> io::Result<()> {
        while self.in_flight() > 0 {
            self.enter(1)?;
            while self.ended().is_some() {}
        }
        Ok(())
    }

    fn enter(&mut self, wait: usize) -> io::Result<()> {
        loop {
            if wait == 0 && self.ring.submission().is_empty() {
                return Ok(());
            }
            match self.ring.submit_and_wait(wait) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is short of memory, or wants its completions fetched first.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn start(&mut self, slot: Slot) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[index] = Some(slot);
        self.push(index);
    }

    /// Puts an operation where the kernel will find it, or behind those that wait for that.
    fn push(&mut self, index: usize) {
        let Some(slot) = self.slots.get(index).and_then(Option::as_ref) else {
            return;
        };
        let entry = slot.entry().user_data(index as u64);
        // No more are started than completions have room for.
        let room = self.started < self.depth;
        // SAFETY: file and vector stay as they are until the operation's completion was seen: the
        // slot holds them, and `settle` comes before it is dropped.
        if room && unsafe { self.ring.submission().push(&entry) }.is_ok() {
            self.started += 1;
        } else {
            self.waiting.push_back(index);
        }
    }

    /// The kernel's answer to an operation; a transfer that was done in part goes on.
    fn complete(&mut self, index: usize, result: i32) -> Option<Ended> {
        let slot = self.slots.get_mut(index)?.as_mut()?;
        let result = match u32::try_from(result) {
            Ok(moved) => slot.moved(moved as usize),
            Err(_) => match io::Error::from_raw_os_error(result.saturating_neg()) {
                error if error.kind() == io::ErrorKind::Interrupted => None,
                error => Some(Err(error)),
            },
        };
        let Some(result) = result else {
            self.push(index);
            return None;
        };
        let tag = slot.tag;
        self.slots[index] = None;
        self.free.push(index);
        Some(Ended { tag, result })
    }
}

impl Slot {
    fn entry(&self) -> squeue::Entry {
        let file = types::Fixed(self.file);
        match &self.what {
            What::Transfer {
                direction,
                offset,
                vector,
                first,
            } => {
                let rest = vector.get(*first..).unwrap_or(&[]);
                // At most MAX_SLICES.
                let count = rest.len().min(MAX_SLICES) as u32;
                match direction {
                    Direction::Read => opcode::Readv::new(file, rest.as_ptr(), count)
                        .offset(*offset)
                        .build(),
                    Direction::Write => opcode::Writev::new(file, rest.as_ptr(), count)
                        .offset(*offset)
                        .build(),
                }
            }
            What::Sync => opcode::Fsync::new(file)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        }
    }

    /// So many bytes have gone; answers with the end, if that is reached.
    fn moved(&mut self, mut bytes: usize) -> Option<io::Result<()>> {
        let What::Transfer {
            direction,
            offset,
            vector,
            first,
        } = &mut self.what
        else {
            return Some(Ok(()));
        };
        let none = bytes == 0;
        *offset += bytes as u64;
        while let Some(slice) = vector.get_mut(*first) {
            let here = bytes.min(slice.iov_len);
            slice.iov_base = slice.iov_base.wrapping_byte_add(here);
            slice.iov_len -= here;
            bytes -= here;
            if slice.iov_len > 0 {
                break;
            }
            *first += 1;
        }
        match direction {
            _ if *first == vector.len() => Some(Ok(())),
            Direction::Read if none => Some(Err(io::ErrorKind::UnexpectedEof.into())),
            Direction::Write if none => Some(Err(io::ErrorKind::WriteZero.into())),
            _ => None,
        }
    }
}

/// Whether a slice lies within one region of `memory`.
fn is_of(memory: &GuestMemory, slice: &libc::iovec) -> bool {
    let (start, len) = (slice.iov_base as usize, slice.iov_len);
    memory.host_ranges().any(|(_, host, size)| {
        let Some(from) = start.checked_sub(host as usize) else {
            return false;
        };
        from.checked_add(len).is_some_and(|end| end as u64 <= size)
    })
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.settle().is_err() {
            // The kernel may still write there: that memory stays mapped.
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("depth", &self.depth)
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
