//! The host's entropy.

use std::fs::File;
use std::io::{self, Read};

/// Fills `bytes` from the host's generator.
///
/// # Errors
/// When it cannot be opened or read.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    File::open("/dev/urandom")?.read_exact(bytes)
}
