//! What makes a directory or file the one it was: not its name, which snapshotters use again.

use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use sha2::{Digest, Sha256};

/// Raised when images of the same content are made differently.
const FORMAT: u32 = 1;

/// A name for the content found at a path at one time.
///
/// It is made of the canonical path, the device, the inode with the time of its birth, and the
/// time of its last change. A committed snapshot is never written to again, so that its root
/// directory is the same tells that everything below is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity(String);

impl Identity {
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        Self::of_all(std::slice::from_ref(&path))
    }

    /// Of several directories together, in order.
    pub(crate) fn of_all<P: AsRef<Path>>(paths: &[P]) -> io::Result<Self> {
        let mut hash = Sha256::new();
        hash.update(FORMAT.to_le_bytes());
        for path in paths {
            let path = path.as_ref().canonicalize()?;
            let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
            let stat = statx(CWD, &path, AtFlags::empty(), wanted)?;
            let name = path.as_os_str().as_encoded_bytes();
            hash.update(name.len().to_le_bytes());
            hash.update(name);
            for number in [u64::from(stat.stx_dev_major), u64::from(stat.stx_dev_minor)] {
                hash.update(number.to_le_bytes());
            }
            hash.update(stat.stx_ino.to_le_bytes());
            hash.update(stat.stx_size.to_le_bytes());
            // A file system that keeps no time of birth says zero.
            for time in [stat.stx_btime, stat.stx_ctime] {
                hash.update(time.tv_sec.to_le_bytes());
                hash.update(time.tv_nsec.to_le_bytes());
            }
        }
        let digest = hash.finalize();
        Ok(Self(
            digest
                .iter()
                .take(16)
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        ))
    }

    /// 32 hexadecimal digits.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}
