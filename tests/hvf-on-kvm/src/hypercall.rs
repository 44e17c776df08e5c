//! A guest's HVCs: BRKs in their place.

use std::ffi::c_void;
use std::ptr::with_exposed_provenance_mut;

use applevisor_sys::hv_error_t;

use crate::vm::Piece;
use crate::world::Answer;

/// `hvc #0` (Arm ARM, "HVC").
const HVC: u32 = 0xd400_0002;
/// What a BRK in an HVC's place says: nothing that Linux says with one.
pub(crate) const COMMENT: u32 = 0xd0b1;
/// `brk #COMMENT` (Arm ARM, "BRK").
const BRK: u32 = 0xd420_0000 | COMMENT << 5;

/// Replaces all in a piece of guest memory, as far as the host has it: a page that nobody has
/// touched stays so.
pub(crate) fn replace(piece: &Piece) -> Answer {
    // SAFETY: asks for a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let page = usize::try_from(page).map_err(|_| hv_error_t::HV_ERROR)?;
    let start: *mut c_void = with_exposed_provenance_mut(piece.host);
    let mut resident = vec![0_u8; piece.size.div_ceil(page)];
    // SAFETY: the memory is mapped, and there is a byte for each of its pages.
    if unsafe { libc::mincore(start, piece.size, resident.as_mut_ptr()) } != 0 {
        return Err(hv_error_t::HV_BAD_ARGUMENT);
    }
    let there = resident.iter().enumerate();
    for (index, _) in there.filter(|(_, byte)| **byte & 1 == 1) {
        let words = start.wrapping_byte_add(index * page).cast::<u32>();
        for word in (0..page / size_of::<u32>()).map(|word| words.wrapping_add(word)) {
            // SAFETY: aligned, in a page that is mapped, and no vCPU has run yet.
            unsafe {
                if word.read_volatile() == HVC {
                    word.write_volatile(BRK);
                }
            }
        }
    }
    Ok(())
}
