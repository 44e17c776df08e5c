//! Directories become EROFS images: uncompressed, so that a page of the guest's is a read of the
//! host's page cache and nothing more. Owners, times, capabilities, and overlayfs's marks of
//! deletion (character devices 0:0, `trusted.overlay.*`) come along as they are.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::progress::{Content, Progress};
use super::{Error, MKFS_EROFS};
use crate::sys;

/// From so many bytes of holes on they are kept: files are then in chunks, each of which is read and
/// hashed, as a hole or another's copy takes no space. A sparse file of terabytes would fill the disk.
const HOLES: u64 = 64 << 20;
/// Bytes of a chunk: 8 bytes of the image for each.
const CHUNK: u64 = 64 << 10;

/// Writes an image of `directory` into `image`, an empty file.
pub(super) fn write(directory: &Path, image: &File) -> Result<(), Error> {
    let path = sys::path_for_children(image).map_err(|source| Error::Directory {
        path: directory.to_path_buf(),
        source,
    })?;
    let content = Content::of(directory);
    let mut command = MKFS_EROFS.command();
    // The guest's pages have 4 KiB, whatever the host's have; older programs know nothing else.
    if rustix::param::page_size() != 4096 {
        command.arg("-b4096");
    }
    command.arg("--quiet");
    if content.holes >= HOLES {
        command.arg(format!("--chunksize={CHUNK}"));
    }
    command.arg(path).arg(directory);
    let progress = Progress::new(directory, image, content.bytes);
    MKFS_EROFS.run(command, directory, || progress.tell())
}

/// Writes an image of what an overlay of `directories`, topmost first, shows.
///
/// The overlay is mounted read-only, over `stage`, in a mount namespace that only a thread of
/// ours is in: no other process sees it, and it is gone with the thread. Its directories are
/// layers containerd itself mounts that way for other runtimes; no guest ever wrote to them.
pub(super) fn write_merged(
    directories: &[PathBuf],
    stage: &Path,
    image: &File,
) -> Result<(), Error> {
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            sys::mount_merged(directories, stage).map_err(|source| Error::Merge {
                count: directories.len(),
                source,
            })?;
            write(stage, image)
        });
        work.join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
