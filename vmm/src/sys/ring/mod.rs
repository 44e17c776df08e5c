//! Files that the kernel reads and writes by itself, several requests at once: io_uring on Linux.
//! Elsewhere there is none, and a disk does one request after the other.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(not(target_os = "linux"))]
mod none;

#[cfg(target_os = "linux")]
pub use linux::{Ring, Spare};
#[cfg(not(target_os = "linux"))]
pub use none::{Ring, Spare};

/// Operations of one ring at once; a disk's queue has as many places.
const DEPTH: u32 = 256;

/// Where disks get their rings.
#[derive(Debug, Default)]
pub enum Rings {
    /// Made when one is asked for.
    #[default]
    OnDemand,
    /// Made before, as a process that is confined can't make any.
    Made(Vec<Spare>),
}

impl Rings {
    /// At most `count`, made now. A kernel that has none makes none.
    pub fn make(count: usize) -> Self {
        let spares = std::iter::repeat_with(|| Spare::new(DEPTH)).take(count);
        Self::Made(spares.map_while(Result::ok).collect())
    }

    /// One for these files.
    ///
    /// # Errors
    /// There is none, or the kernel refuses.
    pub fn take(&mut self, files: &[&std::fs::File]) -> std::io::Result<Ring> {
        let spare = match self {
            Self::OnDemand => Spare::new(DEPTH)?,
            Self::Made(spares) => spares
                .pop()
                .ok_or_else(|| std::io::Error::other("none is left of those made at the start"))?,
        };
        Ring::new(spare, files)
    }
}

/// What to do with the bytes of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the file into memory.
    Read,
    /// From memory into the file.
    Write,
}

/// Something that was started and has ended.
#[derive(Debug)]
pub struct Ended {
    /// What the caller called it.
    pub tag: u64,
    /// Whether all of it was done.
    pub result: std::io::Result<()>,
}
