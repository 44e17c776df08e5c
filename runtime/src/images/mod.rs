//! File-system images made from directories of the host.
//!
//! A layer of an image never changes, so its EROFS image is made once and kept: [`Cache`]. What a
//! container writes goes to a sparse ext4 of its own: [`Cache::writable`]. Making either takes
//! `mkfs.erofs` (erofs-utils 1.5 or later) and `mkfs.ext4` (e2fsprogs 1.43 or later).

mod cache;
mod erofs;
mod ext4;
mod identity;
mod mounted;
mod own;
mod progress;
mod sweep;

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

pub use cache::Cache;
pub(crate) use cache::nameless;
pub(crate) use identity::Identity;
pub(crate) use mounted::mounted;
pub(crate) use own::{disk as own_disk, image as own_image, size};
pub(crate) use sweep::sweep;

/// Why an image can't be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A layer, or the root directory, that the snapshotter named isn't there.
    #[error("The root's directory {} cannot be read", path.display())]
    Source { path: PathBuf, source: io::Error },
    /// It was written to while its image was made.
    #[error("The layer {} changed while it was read", path.display())]
    Changed { path: PathBuf },
    #[error("Cannot use {} for images", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("Cannot run {program}; install the package {package}")]
    Missing {
        program: &'static str,
        package: &'static str,
        source: io::Error,
    },
    #[error("{program} failed on {}: {reason}", path.display())]
    Mkfs {
        program: &'static str,
        path: PathBuf,
        reason: String,
    },
    #[error("Cannot mount {count} layers as one")]
    Merge { count: usize, source: io::Error },
    /// The disk, or a layer, that the snapshotter has made.
    #[error("Cannot use the snapshot's disk {}", path.display())]
    Disk { path: PathBuf, source: io::Error },
    #[error("The snapshot's disk {} is in use by another container", path.display())]
    InUse { path: PathBuf },
}

/// Runs a mkfs to its end; `about` is what an error names, `tell` is called while it takes long.
fn mkfs(mut command: Command, tool: &Tool, about: &Path, tell: impl FnMut()) -> Result<(), Error> {
    let ended = progress::run(&mut command, progress::EVERY, tell);
    let (status, text) = ended.map_err(|source| Error::Missing {
        program: tool.program,
        package: tool.package,
        source,
    })?;
    if status.success() {
        return Ok(());
    }
    let said = text.lines().rev().find(|line| !line.trim().is_empty());
    let reason = said.map_or_else(|| status.to_string(), str::to_owned);
    Err(Error::Mkfs {
        program: tool.program,
        path: about.to_path_buf(),
        reason,
    })
}

/// A program images are made with.
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    pub(crate) package: &'static str,
}

pub(crate) const MKFS_EROFS: Tool = Tool {
    program: "mkfs.erofs",
    package: "erofs-utils",
};
pub(crate) const MKFS_EXT4: Tool = Tool {
    program: "mkfs.ext4",
    package: "e2fsprogs",
};

impl Tool {
    /// containerd's PATH may lack the directories administrators' tools are in.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(self.program);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut directories: Vec<PathBuf> = std::env::split_paths(&path).collect();
        directories.extend(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from));
        if let Ok(path) = std::env::join_paths(directories) {
            command.env("PATH", path);
        }
        command
    }
}

#[cfg(test)]
mod tests;
