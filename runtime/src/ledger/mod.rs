//! What was acquired for a sandbox, written down before it is acquired.
//!
//! A ledger is a directory of its own, `<state>/<namespace>/<id>`, with a list of entries in it.
//! Undoing takes them newest first. It happens when a [`Ledger`] is dropped before
//! [`Ledger::commit`], at [`Ledger::undo`], and, after its owner was killed, in another process
//! that opens the directory: an entry whose thing never came to be is simply passed over.
//!
//! The list is replaced as a whole by a rename, so a reader sees it before or after a record and
//! never in between. It is not synced: it has nothing to say after the host went down.

mod undo;

use std::fs::File;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::hooks::Poststop;

pub use undo::start_time;

const LIST: &str = "ledger.json";
const NEW_LIST: &str = "ledger.json.new";

/// Something of the host's that must not outlive its sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// A directory, removed if it is empty: whatever is made in it has an entry of its own.
    Directory { path: PathBuf },
    /// A file, socket or fifo.
    File { path: PathBuf },
    /// A directory that only a process listed after it writes to, with all that is in it.
    Tree { path: PathBuf },
    /// A process, killed. The start time ([`start_time`]) tells it from a later one of its number.
    Child { pid: u32, start_time: u64 },
    /// A process that ends by itself once the sandbox has; killed only if it takes too long.
    Logger { pid: u32, start_time: u64 },
    /// A cgroup without processes, once those of the sandbox are gone.
    Cgroup { path: PathBuf },
    /// Programs that the container's configuration wants run at its end. Recorded first, so last.
    Poststop(Poststop),
}

/// Why a ledger can't be kept or undone.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another sandbox of that name exists, or has left something behind.
    #[error("{} exists: a container of this name is there already", directory.display())]
    Exists { directory: PathBuf },
    #[error("{} is in use by a process that still runs", directory.display())]
    InUse { directory: PathBuf },
    #[error("There is no ledger at {}", directory.display())]
    NotFound { directory: PathBuf },
    #[error("Cannot keep the ledger {}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} is not a ledger", path.display())]
    Malformed {
        path: PathBuf,
        source: serde_json::Error,
    },
    /// Some entries could not be undone; they stay in the list.
    #[error("{} is left behind: {}", directory.display(), failures.join("; "))]
    Left {
        directory: PathBuf,
        failures: Vec<String>,
    },
}

/// The open ledger of one sandbox. Undoes everything when dropped, unless committed.
#[derive(Debug)]
pub struct Ledger {
    directory: PathBuf,
    entries: Vec<Entry>,
    committed: bool,
    /// The directory itself, locked: one process at a time keeps or undoes a ledger.
    _lock: Lock,
}

impl Ledger {
    /// Starts a ledger at `directory`, which must not exist yet; its parents are made.
    ///
    /// # Errors
    /// [`Error::Exists`], or the directory can't be made.
    pub fn create(directory: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Io {
            path: directory.to_path_buf(),
            source,
        };
        let mut shared = std::fs::DirBuilder::new();
        shared.mode(0o711).recursive(true);
        let mut own = std::fs::DirBuilder::new();
        own.mode(0o700);
        loop {
            if let Some(parent) = directory.parent()
                && let Err(error) = shared.create(parent)
            {
                // It was there, and went before that was looked at.
                if error.kind() == io::ErrorKind::AlreadyExists && !parent.is_file() {
                    continue;
                }
                return Err(failed(error));
            }
            match own.create(directory) {
                Ok(()) => break,
                // The namespace's last container has just taken its directory along.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(Error::Exists {
                        directory: directory.to_path_buf(),
                    });
                }
                Err(error) => return Err(failed(error)),
            }
        }
        let lock = lock(directory)?;
        let directory = directory.to_path_buf();
        Ok(Self {
            directory,
            entries: Vec::new(),
            committed: false,
            _lock: lock,
        })
    }

    /// Opens the ledger of an owner that is gone, as it stands. It counts as committed: dropping
    /// it changes nothing.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::InUse`] while its owner lives, or the list can't be read.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let lock = lock(directory).inspect_err(|error| {
            // Its owner may have come no further than the namespace's directory.
            if matches!(error, Error::NotFound { .. }) {
                remove_namespace(directory);
            }
        })?;
        let entries = read(directory)?;
        let directory = directory.to_path_buf();
        Ok(Self {
            directory,
            entries,
            committed: true,
            _lock: lock,
        })
    }

    /// The sandbox's state directory, which is the ledger's own.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What is recorded, oldest first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Writes down what is about to be acquired.
    ///
    /// A [`Entry::Child`] has its number only afterwards, and is recorded then: until it is, the
    /// end of its control socket is what ends it.
    ///
    /// # Errors
    /// It can't be written; then it must not be acquired.
    pub fn record(&mut self, entry: Entry) -> Result<(), Error> {
        self.entries.push(entry);
        let written = self.write();
        if written.is_err() {
            self.entries.pop();
        }
        written
    }

    /// From here on the entries stay until [`Ledger::undo`].
    pub fn commit(&mut self) {
        self.committed = true;
    }

    /// Undoes everything, newest first, and removes the ledger. What can't be undone doesn't keep
    /// the rest from it.
    ///
    /// Blocks until a killed process is gone: seconds at most.
    ///
    /// # Errors
    /// [`Error::Left`] names what is left; the ledger stays, with those entries.
    pub fn undo(mut self) -> Result<(), Error> {
        self.committed = true;
        self.undo_entries()
    }

    fn undo_entries(&mut self) -> Result<(), Error> {
        let mut failures = Vec::new();
        let mut left = Vec::new();
        for entry in std::mem::take(&mut self.entries).into_iter().rev() {
            if let Err(reason) = undo::undo(&entry) {
                failures.push(reason);
                left.push(entry);
            }
        }
        left.reverse();
        self.entries = left;
        if self.entries.is_empty()
            && let Err(error) = self.remove()
        {
            failures.push(format!("{}: {error}", self.directory.display()));
        }
        if failures.is_empty() {
            return Ok(());
        }
        self.write()?;
        Err(Error::Left {
            directory: self.directory.clone(),
            failures,
        })
    }

    fn write(&self) -> Result<(), Error> {
        let new = self.directory.join(NEW_LIST);
        let failed = |source| Error::Io {
            path: new.clone(),
            source,
        };
        let text = serde_json::to_vec(&self.entries).map_err(|error| failed(error.into()))?;
        std::fs::write(&new, text).map_err(failed)?;
        std::fs::rename(&new, self.directory.join(LIST)).map_err(failed)
    }

    fn remove(&self) -> io::Result<()> {
        for name in [NEW_LIST, LIST] {
            undo::absent_is_fine(std::fs::remove_file(self.directory.join(name)))?;
        }
        undo::absent_is_fine(std::fs::remove_dir(&self.directory))?;
        remove_namespace(&self.directory);
        Ok(())
    }
}

/// The namespace's directory goes with its last container.
fn remove_namespace(directory: &Path) {
    if let Some(namespace) = directory.parent() {
        let _ = std::fs::remove_dir(namespace);
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        if !self.committed
            && let Err(error) = self.undo_entries()
        {
            tracing::error!(%error, "Cleaning up after a failed start did not succeed");
        }
    }
}

/// The entries of a ledger, oldest first, whether its owner lives or not.
///
/// # Errors
/// The list can't be read, or isn't one.
pub fn read(directory: &Path) -> Result<Vec<Entry>, Error> {
    let path = directory.join(LIST);
    match std::fs::read(&path) {
        Ok(text) => {
            serde_json::from_slice(&text).map_err(|source| Error::Malformed { path, source })
        }
        // Nothing was recorded yet.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(Error::Io { path, source }),
    }
}

/// A locked directory. Unlocked by hand when dropped: a process being forked elsewhere has a copy of
/// the descriptor until it executes its program, and closing ours alone would leave the lock to it.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

fn lock(directory: &Path) -> Result<Lock, Error> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => Error::NotFound {
            directory: directory.to_path_buf(),
        },
        io::ErrorKind::WouldBlock => Error::InUse {
            directory: directory.to_path_buf(),
        },
        _ => Error::Io {
            path: directory.to_path_buf(),
            source,
        },
    };
    let file = File::open(directory).map_err(failed)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| failed(error.into()))?;
    Ok(Lock(file))
}

#[cfg(test)]
mod tests;
