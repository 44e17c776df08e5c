//! Disks that belong to a snapshot: what the snapshotter made is used as it is.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use super::cache::nameless;
use super::{Error, ext4};
use crate::plan::MakeExt4;
use crate::sys;

/// An image that the snapshotter keeps. It is only read, by any number of machines.
///
/// # Errors
/// [`Error::Disk`]
pub(crate) fn image(path: &Path) -> Result<File, Error> {
    open(path, false)
}

/// The ext4 of a snapshot, made now if it isn't there and `make` says how. One machine at a time
/// writes to it, as two kernels would destroy it, and none reads meanwhile: the lock goes with the
/// file.
///
/// # Errors
/// [`Error::Disk`], [`Error::InUse`], or it can't be made.
pub(crate) fn disk(path: &Path, make: Option<&MakeExt4>, read_only: bool) -> Result<File, Error> {
    if let Some(make) = make {
        ensure(path, make)?;
    }
    let file = open(path, !read_only)?;
    let lock = match read_only {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    match flock(&file, lock) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(Error::InUse {
            path: path.to_path_buf(),
        }),
        Err(error) => Err(failed(path)(error.into())),
    }
}

fn open(path: &Path, write: bool) -> Result<File, Error> {
    // A fifo in its place would keep us waiting.
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let mut options = File::options();
    let file = options
        .read(true)
        .write(write)
        .custom_flags(flags)
        .open(path);
    let file = file.map_err(failed(path))?;
    let kind = file.metadata().map_err(failed(path))?.file_type();
    match kind.is_file() || kind.is_block_device() {
        true => Ok(file),
        false => Err(failed(path)(io::Error::new(
            io::ErrorKind::InvalidInput,
            "neither a file nor a block device",
        ))),
    }
}

/// Bytes of an image, in a file or on a block device.
///
/// # Errors
/// [`Error::Disk`]
pub(crate) fn size(mut image: &File) -> Result<u64, Error> {
    image.seek(SeekFrom::End(0)).map_err(|source| {
        let path = sys::path_of(image).unwrap_or_default();
        Error::Disk { path, source }
    })
}

/// Whole or not at all: it gets its name when it is a file system.
fn ensure(path: &Path, make: &MakeExt4) -> Result<(), Error> {
    if path.exists() {
        return Ok(());
    }
    let directory = path.parent().unwrap_or_else(|| Path::new("/"));
    let new = nameless(directory)?;
    new.set_len(make.size).map_err(failed(path))?;
    let place = sys::path_for_children(&new).map_err(failed(path))?;
    ext4::make_own(&place, make.uuid.as_deref(), path)?;
    new.sync_all().map_err(failed(path))?;
    match sys::publish(&new, path) {
        // Another container of the same snapshot was faster; the lock decides who gets it.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map_err(failed(path)),
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Disk { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAKE: MakeExt4 = MakeExt4 {
        size: 16 << 20,
        uuid: None,
    };

    #[test]
    fn a_disk_is_made_once_and_kept() {
        let root = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = root.path().join("rwlayer.img");
        let make = MakeExt4 {
            uuid: Some("0f9e1d2c-3b4a-5968-7766-554433221100".to_owned()),
            ..MAKE
        };
        let first = disk(&path, Some(&make), false).unwrap();
        let mut superblock = [0; 0x78];
        std::os::unix::fs::FileExt::read_exact_at(&first, &mut superblock, 1024).unwrap();
        assert_eq!(superblock[0x38..0x3a], [0x53, 0xef], "the magic of ext4");
        assert_eq!(superblock[0x68..0x6c], [0x0f, 0x9e, 0x1d, 0x2c], "its UUID");
        // A journal: what is on it outlives its machine, however that ends.
        assert_eq!(superblock[0x5c] & 4, 4);
        drop(first);
        std::fs::write(&path, "kept").unwrap();
        disk(&path, Some(&make), false).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"kept");
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn one_machine_at_a_time_writes() {
        let root = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = root.path().join("disk");
        std::fs::write(&path, "disk").unwrap();
        let readers = [disk(&path, None, true), disk(&path, None, true)];
        assert!(matches!(disk(&path, None, false), Err(Error::InUse { .. })));
        drop(readers);
        let writer = disk(&path, None, false).unwrap();
        let error = disk(&path, None, true).unwrap_err();
        assert!(matches!(error, Error::InUse { .. }), "{error}");
        drop(writer);
        disk(&path, None, true).unwrap();
    }

    #[test]
    fn what_is_no_disk_is_named() {
        let root = tempfile::tempdir_in("/var/tmp").unwrap();
        let fifo = root.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [root.path(), &fifo, &root.path().join("missing")] {
            let errors = [
                image(path).unwrap_err(),
                disk(path, None, true).unwrap_err(),
            ];
            for error in errors {
                assert!(
                    error.to_string().contains(&path.display().to_string()),
                    "{error}"
                );
            }
        }
    }
}
