//! What makes a directory or file the one it was: not its name, which snapshotters use again.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};

/// Raised when images of the same content are made differently.
const FORMAT: u32 = 2;

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
            let found = path.metadata()?;
            let name = path.as_os_str().as_encoded_bytes();
            hash.update(name.len().to_le_bytes());
            hash.update(name);
            for number in [found.dev(), found.ino(), found.size()] {
                hash.update(number.to_le_bytes());
            }
            // A file system that keeps no time of birth has none.
            let birth = found.created().ok();
            let birth = birth.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            hash.update(birth.unwrap_or_default().as_nanos().to_le_bytes());
            for part in [found.ctime(), found.ctime_nsec()] {
                hash.update(part.to_le_bytes());
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
