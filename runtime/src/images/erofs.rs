//! Directories become EROFS images: uncompressed, so that a page of the guest's is a read of the
//! host's page cache and nothing more. Owners, times, capabilities, and overlayfs's marks of
//! deletion (character devices 0:0, `trusted.overlay.*`) come along as they are.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

use super::cache::own_path;
use super::progress::{Content, Progress};
use super::{Error, MKFS_EROFS, mkfs};

/// From so many bytes of holes on they are kept: files are then in chunks, each of which is read and
/// hashed, as a hole or another's copy takes no space. A sparse file of terabytes would fill the disk.
const HOLES: u64 = 64 << 20;
/// Bytes of a chunk: 8 bytes of the image for each.
const CHUNK: u64 = 64 << 10;

/// Writes an image of `directory` into `image`, an empty file.
pub(super) fn write(directory: &Path, image: &File) -> Result<(), Error> {
    let content = Content::of(directory);
    let mut command = MKFS_EROFS.command();
    command.arg("--quiet");
    if content.holes >= HOLES {
        command.arg(format!("--chunksize={CHUNK}"));
    }
    command.arg(path_of(image)).arg(directory);
    let progress = Progress::new(directory, image, content.bytes);
    mkfs(command, &MKFS_EROFS, directory, || progress.tell())
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
            mount_merged(directories, stage).map_err(|source| Error::Merge {
                count: directories.len(),
                source,
            })?;
            write(stage, image)
        });
        work.join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn mount_merged(directories: &[PathBuf], stage: &Path) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    // By descriptor the option is short: all of a mount's options must fit into one page. They
    // are opened here because the directories must lie in the namespace they are mounted in.
    let layers = directories
        .iter()
        .map(File::open)
        .collect::<io::Result<Vec<_>>>()?;
    let lower: Vec<String> = layers.iter().map(own_path).collect();
    let options = CString::new(format!("lowerdir={}", lower.join(":")))?;
    Ok(mount(
        "overlay",
        stage,
        "overlay",
        MountFlags::RDONLY,
        Some(options.as_c_str()),
    )?)
}

/// A path to an open file that holds for this process's children as well.
pub(super) fn path_of(file: &File) -> PathBuf {
    PathBuf::from(format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        file.as_raw_fd()
    ))
}
