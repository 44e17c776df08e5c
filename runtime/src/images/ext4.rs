//! The disk a container writes to: an empty ext4 that is nearly all hole.
//!
//! It has no journal, as it dies with its machine and is never mounted again after a crash. Its
//! inode tables are marked as zeroed, which in a new file they are: otherwise the guest's kernel
//! would write zeros over them in the background, 128 MiB of them for 8 GiB.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::{Error, MKFS_EXT4};

/// Part of a template's name: raised when it is made differently.
pub(super) const FORMAT: u32 = 1;

/// Makes the file system in `template`, which is `size` bytes of hole.
pub(super) fn make(template: &Path) -> Result<(), Error> {
    let mut command = MKFS_EXT4.command();
    command
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode"])
        .args(["-E", "lazy_itable_init=0,discard"])
        .arg(template);
    MKFS_EXT4.run(command, template, || 0)
}

/// Makes a file system that stays, in `disk`, which is a hole.
pub(super) fn make_own(disk: &Path, uuid: Option<&str>, about: &Path) -> Result<(), Error> {
    let mut command = MKFS_EXT4.command();
    command.args(["-q", "-F"]);
    if let Some(uuid) = uuid {
        command.args(["-U", uuid]);
    }
    command.arg(disk);
    MKFS_EXT4.run(command, about, || 0)
}

/// Copies what isn't a hole of `from` to the same places of `to`.
pub(super) fn copy_data(from: &File, to: &File) -> io::Result<()> {
    let size = from.metadata()?.len();
    to.set_len(size)?;
    let mut buffer = vec![0u8; 64 << 10];
    let mut position = 0;
    while position < size {
        let data = match seek(from, SeekFrom::Data(position)) {
            Err(Errno::NXIO) => break,
            other => other?,
        };
        let hole = seek(from, SeekFrom::Hole(data))?;
        position = data;
        while position < hole {
            let part = usize::try_from(hole - position)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            from.read_exact_at(&mut buffer[..part], position)?;
            to.write_all_at(&buffer[..part], position)?;
            position += part as u64;
        }
    }
    Ok(())
}
