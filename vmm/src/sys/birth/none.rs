//! A system without cgroups.

use std::fs::File;
use std::io;

use super::Program;

/// There is no cgroup.
///
/// # Errors
/// Always.
pub(crate) fn into_cgroup(_: &File, _: &Program<'_>) -> io::Result<u32> {
    Err(io::ErrorKind::Unsupported.into())
}
