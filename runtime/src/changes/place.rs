//! Where changes go, and where they wait until they are whole.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where changes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The snapshot's directory.
    pub directory: PathBuf,
    /// One that nobody uses and need not exist, on the same file system.
    pub staging: PathBuf,
}

impl Place {
    /// The place for the changes of a container of this name: they are staged beside the directory,
    /// or in it if it is a file system of its own.
    ///
    /// # Errors
    /// There is no such directory.
    pub fn new(directory: &Path, name: &str) -> io::Result<Self> {
        let device = fs::metadata(directory)?.dev();
        let beside = directory
            .parent()
            .filter(|parent| fs::metadata(parent).is_ok_and(|parent| parent.dev() == device));
        Ok(Self {
            directory: directory.to_path_buf(),
            staging: beside
                .unwrap_or(directory)
                .join(format!(".supermachine-changes-{name}")),
        })
    }
}
