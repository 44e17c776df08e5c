//! Guest RAM in the guest's address space, in pieces that can go alone.

use std::collections::BTreeMap;
use std::io;
use std::ptr::with_exposed_provenance_mut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use applevisor::error::HypervisorError as HvError;
use applevisor_sys::{
    HV_MEMORY_EXEC, HV_MEMORY_READ, HV_MEMORY_WRITE, hv_return_t, hv_vm_map, hv_vm_unmap,
};
use vm_memory::GuestAddress;

use super::Machine;
use crate::memory::StageTwo;

/// Bytes of a piece, and its alignment in the guest. The framework unmaps what was mapped as one
/// only as one.
pub(super) const CHUNK: u64 = 2 << 20;

/// All that is mapped for a VM, by slot.
#[derive(Debug, Default)]
pub(super) struct Slots(Mutex<BTreeMap<u32, Vec<Piece>>>);

/// A piece of a slot. The host keeps its memory, at this address, for as long as the slot is there.
#[derive(Debug)]
struct Piece {
    guest: u64,
    host: usize,
    size: usize,
    place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Mapped,
    /// Taken out for a moment, to get fresh memory.
    Away,
    /// Taken out, and the framework would not have it back.
    Lost,
}

impl Slots {
    /// Maps `len` bytes of `host` from `guest` on, in place of what the slot had; all of them or none.
    ///
    /// # Safety
    /// The memory stays mapped in the host until the slot is unmapped or the VM is gone.
    pub(super) unsafe fn map(
        &self,
        slot: u32,
        guest: u64,
        host: *mut u8,
        len: u64,
    ) -> Result<(), HvError> {
        let end = guest.checked_add(len).ok_or(HvError::BadArgument)?;
        let mut pieces = Vec::new();
        let mut at = guest;
        while at < end {
            // Up to the next multiple of a piece.
            let size = (CHUNK - at % CHUNK).min(end - at) as usize;
            let mut piece = Piece {
                guest: at,
                host: host.wrapping_add((at - guest) as usize).expose_provenance(),
                size,
                place: Place::Away,
            };
            // SAFETY: the caller keeps this memory mapped.
            if let Err(error) = unsafe { piece.map() } {
                // What fails here is in the log.
                let _ = unmap(pieces);
                return Err(error);
            }
            pieces.push(piece);
            at += size as u64;
        }
        self.lock().insert(slot, pieces);
        Ok(())
    }

    /// Takes a slot away from the guest; the first error if there are some.
    pub(super) fn unmap(&self, slot: u32) -> Result<(), HvError> {
        self.lock().remove(&slot).map_or(Ok(()), unmap)
    }

    /// Takes all away.
    pub(super) fn clear(&self) {
        let slots = std::mem::take(&mut *self.lock());
        // What fails here is in the log.
        let _ = unmap(slots.into_values().flatten().collect());
    }

    /// Whether there is RAM at an address, though a guest may have found none a moment ago: what
    /// went wrong there goes right when it is done again.
    pub(super) fn has(&self, address: u64) -> bool {
        self.lock().values().flatten().any(|piece| {
            piece.place != Place::Lost && (piece.guest..piece.end()).contains(&address)
        })
    }

    /// Calls `act` with the pieces that a range is made of, all of one slot.
    fn with<T>(
        &self,
        start: GuestAddress,
        len: u64,
        act: impl FnOnce(&mut [Piece]) -> Result<T, HvError>,
    ) -> io::Result<T> {
        let start = start.0;
        let end = start.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        let mut slots = self.lock();
        for pieces in slots.values_mut() {
            let from = pieces.partition_point(|piece| piece.guest < start);
            let to = pieces.partition_point(|piece| piece.guest < end);
            let range = pieces.get_mut(from..to).unwrap_or_default();
            let begins = range.first().is_some_and(|piece| piece.guest == start);
            if begins && range.last().is_some_and(|piece| piece.end() == end) {
                return act(range).map_err(io::Error::other);
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Vec<Piece>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Piece {
    fn end(&self) -> u64 {
        self.guest + self.size as u64
    }

    /// # Safety
    /// The piece's memory is mapped in the host until the piece is unmapped or the VM is gone.
    unsafe fn map(&mut self) -> Result<(), HvError> {
        let rights = HV_MEMORY_READ | HV_MEMORY_WRITE | HV_MEMORY_EXEC;
        let host = with_exposed_provenance_mut(self.host);
        // SAFETY: the caller keeps this memory mapped.
        check(unsafe { hv_vm_map(host, self.guest, self.size, rights) })?;
        self.place = Place::Mapped;
        Ok(())
    }

    fn unmap(&mut self) -> Result<(), HvError> {
        // SAFETY: takes no pointer; the guest loses what it was given.
        check(unsafe { hv_vm_unmap(self.guest, self.size) })?;
        self.place = Place::Away;
        Ok(())
    }

    /// Gives the guest back what was taken, or notes that it has lost it.
    fn back(&mut self) -> Result<(), HvError> {
        if self.place != Place::Away {
            return Err(HvError::BadArgument);
        }
        // SAFETY: the slot is there, and for as long its memory is.
        let done = unsafe { self.map() };
        if let Err(error) = &done {
            self.place = Place::Lost;
            tracing::error!(%error, "A guest has lost its memory at {:#x}", self.guest);
        }
        done
    }
}

/// Takes pieces away for good; the first error if there are some.
fn unmap(pieces: Vec<Piece>) -> Result<(), HvError> {
    let mut result = Ok(());
    for mut piece in pieces {
        if piece.place == Place::Mapped {
            let done = piece.unmap();
            if let Err(error) = &done {
                tracing::error!(%error, "hv_vm_unmap failed at {:#x}", piece.guest);
            }
            result = result.and(done);
        }
    }
    result
}

/// Guest RAM as the balloon gives it back: piece by piece, out of the guest and into it again.
#[derive(Debug)]
pub(super) struct Pieces(pub(super) Arc<Machine>);

impl StageTwo for Pieces {
    fn unit(&self) -> u64 {
        CHUNK
    }

    fn unmap(&self, start: GuestAddress, len: u64) -> io::Result<()> {
        self.0.slots.with(start, len, |pieces| {
            if pieces.iter().any(|piece| piece.place != Place::Mapped) {
                return Err(HvError::BadArgument);
            }
            for at in 0..pieces.len() {
                let Err(error) = pieces[at].unmap() else {
                    continue;
                };
                // All or none.
                for piece in &mut pieces[..at] {
                    piece.back()?;
                }
                return Err(error);
            }
            Ok(())
        })
    }

    fn map(&self, start: GuestAddress, len: u64) -> io::Result<()> {
        self.0.slots.with(start, len, |pieces| {
            let mut result = Ok(());
            for piece in pieces {
                // Each of them, whatever became of the others.
                let done = piece.back();
                result = result.and(done);
            }
            result
        })
    }
}

fn check(code: hv_return_t) -> Result<(), HvError> {
    match code {
        0 => Ok(()),
        code => Err(HvError::from(code)),
    }
}
