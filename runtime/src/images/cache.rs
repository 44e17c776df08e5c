//! The images kept, shared by every shim of the host without anything running in between.
//!
//! `<identity>.erofs` is an image, complete and synced: it is made in a file without a name, which
//! then gets it. Whoever makes one holds `<identity>.lock`. An image in use is share-locked
//! through the open file that the machine has, so the lock lasts exactly as long as its use, and
//! one that can be locked exclusively may go. A killed process leaves nothing but a lock's name.

use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use rustix::fs::{FlockOperation, flock};

use super::{Error, Identity, erofs, ext4};
use crate::config::Resolved;
use crate::sys;

/// The images of this host.
#[derive(Clone, Debug)]
pub struct Cache {
    directory: PathBuf,
    /// Where files without a name are made for writable layers.
    scratch: PathBuf,
    /// Bytes on disk.
    budget: u64,
}

impl Cache {
    /// Opens the cache the configuration names, making its directories.
    ///
    /// # Errors
    /// [`Error::Directory`]
    pub fn open(config: &Resolved) -> Result<Self, Error> {
        let cache = Self {
            directory: config.images.directory.0.clone(),
            scratch: config.rootfs.directory.0.clone(),
            budget: config.images.budget.0,
        };
        for path in [&cache.directory, &cache.scratch] {
            // Images hold files that only root of the containers may read.
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .map_err(|source| Error::Directory {
                    path: path.clone(),
                    source,
                })?;
        }
        Ok(cache)
    }

    /// The image of a directory that never changes again.
    ///
    /// # Errors
    /// The directory is missing or changing, or the image can't be made.
    pub fn layer(&self, directory: &Path) -> Result<File, Error> {
        self.kept(&[directory], |image| erofs::write(directory, image))
    }

    /// One image of several such directories, topmost first.
    ///
    /// # Errors
    /// As [`Cache::layer`].
    pub fn merged(&self, directories: &[PathBuf]) -> Result<File, Error> {
        self.kept(directories, |image| {
            erofs::write_merged(directories, &self.directory, image)
        })
    }

    /// An image of a directory as it is now, which nobody else gets. It is gone when closed.
    ///
    /// # Errors
    /// As [`Cache::layer`].
    pub fn copy(&self, directory: &Path) -> Result<File, Error> {
        identity(&[directory])?;
        let image = nameless(&self.scratch)?;
        erofs::write(directory, &image)?;
        // The machine gets a file it can't write to.
        let reopened = sys::reopen(&image);
        sys::forget(&image).map_err(|error| self.failed(error))?;
        reopened.map_err(|error| self.failed(error))
    }

    /// An empty ext4 of `size` bytes, for one machine to write to. It is gone when closed.
    ///
    /// # Errors
    /// It can't be made.
    pub fn writable(&self, size: u64) -> Result<File, Error> {
        let name = format!("writable-v{}-{size}", ext4::FORMAT);
        let path = self.directory.join(format!("{name}.ext4"));
        let template = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let _lock = self.lock(&name)?;
                self.make_template(&path, size)?
            }
            other => other.map_err(|error| self.failed(error))?,
        };
        let disk = nameless(&self.scratch)?;
        let copied = sys::forget(&disk).and_then(|()| ext4::copy_data(&template, &disk));
        copied.map_err(|source| Error::Directory {
            path: self.scratch.clone(),
            source,
        })?;
        Ok(disk)
    }

    fn make_template(&self, path: &Path, size: u64) -> Result<File, Error> {
        if let Ok(template) = File::open(path) {
            return Ok(template);
        }
        // mkfs.ext4 wants a name that doesn't change; the lock makes this one ours.
        let new = path.with_extension("new");
        let made = self.make_template_at(&new, size).and_then(|()| {
            std::fs::rename(&new, path).map_err(|error| self.failed(error))?;
            File::open(path).map_err(|error| self.failed(error))
        });
        if made.is_err() {
            let _ = std::fs::remove_file(&new);
        }
        made
    }

    fn make_template_at(&self, new: &Path, size: u64) -> Result<(), Error> {
        let file = File::create(new).map_err(|error| self.failed(error))?;
        file.set_len(size).map_err(|error| self.failed(error))?;
        ext4::make(new)?;
        file.sync_all().map_err(|error| self.failed(error))
    }

    fn kept<P: AsRef<Path>>(
        &self,
        directories: &[P],
        make: impl FnOnce(&File) -> Result<(), Error>,
    ) -> Result<File, Error> {
        let key = identity(directories)?;
        let path = self.directory.join(format!("{}.erofs", key.as_str()));
        if let Some(image) = self.in_use(&path)? {
            return Ok(image);
        }
        let _lock = self.lock(key.as_str())?;
        if let Some(image) = self.in_use(&path)? {
            return Ok(image);
        }
        let started = Instant::now();
        let new = nameless(&self.directory)?;
        make(&new)?;
        let first = directories
            .first()
            .map_or_else(|| Path::new(""), AsRef::as_ref);
        if identity(directories)? != key {
            return Err(Error::Changed {
                path: first.to_path_buf(),
            });
        }
        new.sync_all().map_err(|error| self.failed(error))?;
        sys::publish(&new, &path).map_err(|error| self.failed(error))?;
        drop(new);
        tracing::info!(layer = %first.display(), image = %path.display(),
            ms = started.elapsed().as_millis(), "Made an image");
        let image = self.in_use(&path)?;
        self.shrink();
        image.ok_or_else(|| self.failed(io::ErrorKind::NotFound.into()))
    }

    /// Opens an image, marks it as used now and keeps it from being removed while it is open.
    fn in_use(&self, path: &Path) -> Result<Option<File>, Error> {
        let image = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|error| self.failed(error))?,
        };
        flock(&image, FlockOperation::LockShared).map_err(|error| self.failed(error.into()))?;
        let metadata = image.metadata().map_err(|error| self.failed(error))?;
        if metadata.nlink() == 0 {
            // Removed between the opening and the lock.
            return Ok(None);
        }
        // Only the order of removal hangs on it.
        let _ = image.set_modified(SystemTime::now());
        Ok(Some(image))
    }

    /// Removes the images unused longest until the rest is within the budget.
    fn shrink(&self) {
        let Ok(entries) = std::fs::read_dir(&self.directory) else {
            return;
        };
        let mut images: Vec<(SystemTime, u64, PathBuf)> = entries
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let metadata = path.metadata().ok()?;
                let image = path
                    .extension()
                    .is_some_and(|extension| extension == "erofs");
                image.then_some((metadata.modified().ok()?, metadata.blocks() * 512, path))
            })
            .collect();
        images.sort();
        let mut total: u64 = images.iter().map(|(_, size, _)| size).sum();
        for (_, size, path) in images {
            if total <= self.budget {
                return;
            }
            if remove_unused(&path) {
                tracing::info!(image = %path.display(), size, "Removed an image to keep the budget");
                total -= size;
            }
        }
        if total > self.budget {
            tracing::warn!(
                directory = %self.directory.display(), total, budget = self.budget,
                "The images in use exceed the budget"
            );
        }
    }

    /// Waits for the lock named `name`, which goes with the returned file.
    fn lock(&self, name: &str) -> Result<Lock, Error> {
        let path = self.directory.join(format!("{name}.lock"));
        loop {
            let file = File::options().create(true).append(true).open(&path);
            let file = file.map_err(|error| self.failed(error))?;
            flock(&file, FlockOperation::LockExclusive)
                .map_err(|error| self.failed(error.into()))?;
            // Its last holder has removed the name: then this is no lock any more.
            let held = file.metadata().map_err(|error| self.failed(error))?;
            if held.nlink() > 0 {
                return Ok(Lock { path, _file: file });
            }
        }
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Directory {
            path: self.directory.clone(),
            source,
        }
    }
}

struct Lock {
    path: PathBuf,
    _file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before the file is closed, so that whoever waits for it sees that the name is gone.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn identity<P: AsRef<Path>>(directories: &[P]) -> Result<Identity, Error> {
    for path in directories.iter().map(AsRef::as_ref) {
        std::fs::read_dir(path).map_err(|source| Error::Source {
            path: path.to_path_buf(),
            source,
        })?;
    }
    let path = || {
        directories
            .first()
            .map(|path| path.as_ref().to_path_buf())
            .unwrap_or_default()
    };
    Identity::of_all(directories).map_err(|source| Error::Source {
        path: path(),
        source,
    })
}

/// A file in `directory` that no name leads to.
pub(crate) fn nameless(directory: &Path) -> Result<File, Error> {
    sys::nameless(directory).map_err(|source| Error::Directory {
        path: directory.to_path_buf(),
        source,
    })
}

fn remove_unused(path: &Path) -> bool {
    let Ok(image) = File::open(path) else {
        return false;
    };
    flock(&image, FlockOperation::NonBlockingLockExclusive).is_ok()
        && std::fs::remove_file(path).is_ok()
}
