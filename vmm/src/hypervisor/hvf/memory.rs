//! Guest RAM in the guest's address space, in pieces that can go alone.

use applevisor::error::HypervisorError as HvError;
use applevisor_sys::{
    HV_MEMORY_EXEC, HV_MEMORY_READ, HV_MEMORY_WRITE, hv_return_t, hv_vm_map, hv_vm_unmap,
};

/// Bytes of a piece, and its alignment in the guest. The framework unmaps what was mapped as one
/// only as one.
pub(super) const CHUNK: u64 = 2 << 20;

/// What was mapped for a slot. Dropping it leaves it mapped.
#[derive(Debug, Default)]
pub(super) struct Chunks(Vec<(u64, usize)>);

impl Chunks {
    /// Maps `len` bytes of `host` from `guest` on; all of them or none.
    ///
    /// # Safety
    /// The memory stays mapped in the host until the pieces are unmapped or the VM is gone.
    pub(super) unsafe fn map(guest: u64, host: *mut u8, len: u64) -> Result<Self, HvError> {
        let end = guest.checked_add(len).ok_or(HvError::BadArgument)?;
        let mut chunks = Self::default();
        let mut at = guest;
        while at < end {
            // Up to the next multiple of a piece.
            let size = (CHUNK - at % CHUNK).min(end - at) as usize;
            let address = host.wrapping_add((at - guest) as usize);
            let rights = HV_MEMORY_READ | HV_MEMORY_WRITE | HV_MEMORY_EXEC;
            // SAFETY: the caller keeps this memory mapped.
            if let Err(error) = check(unsafe { hv_vm_map(address.cast(), at, size, rights) }) {
                if let Err(error) = chunks.unmap() {
                    tracing::error!(%error, "hv_vm_unmap failed");
                }
                return Err(error);
            }
            chunks.0.push((at, size));
            at += size as u64;
        }
        Ok(chunks)
    }

    /// Takes all pieces away from the guest; the first error if there are some.
    pub(super) fn unmap(self) -> Result<(), HvError> {
        let mut result = Ok(());
        for (guest, size) in self.0 {
            // SAFETY: takes no pointer; the guest loses what it was given.
            let done = check(unsafe { hv_vm_unmap(guest, size) });
            result = result.and(done);
        }
        result
    }
}

fn check(code: hv_return_t) -> Result<(), HvError> {
    match code {
        0 => Ok(()),
        code => Err(HvError::from(code)),
    }
}
