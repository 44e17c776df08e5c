//! What inodes of all kinds have.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{
    Gid, Mode, Stat, Uid, XattrFlags, fchmod, fchown, fgetxattr, flistxattr, fsetxattr, fstat,
    lgetxattr, llistxattr,
};
use rustix::io::Errno;
use supermachine_protocol::changes::{Attributes, is_carried};

/// The most bytes the kernel has for one attribute, and for the names of all of an inode's
/// (linux/limits.h): with room for them, nothing has to be asked for twice.
const XATTR_MAX: usize = 64 << 10;

/// Of an open directory.
pub(super) fn of_directory(directory: &File) -> io::Result<Attributes> {
    let xattrs = xattrs(
        |buffer| flistxattr(directory, buffer),
        |name, buffer| fgetxattr(directory, name, buffer),
    )?;
    of(&fstat(directory)?, xattrs)
}

/// Of what `path` names, which is not followed if it is a link; `stat` is its own.
pub(super) fn of_path(path: &Path, stat: &Stat) -> io::Result<Attributes> {
    let xattrs = xattrs(
        |buffer| llistxattr(path, buffer),
        |name, buffer| lgetxattr(path, name, buffer),
    )?;
    of(stat, xattrs)
}

fn of(stat: &Stat, xattrs: Vec<(Vec<u8>, Vec<u8>)>) -> io::Result<Attributes> {
    Ok(Attributes {
        mode: u16::try_from(stat.st_mode & 0o7777).map_err(io::Error::other)?,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: stat.st_mtime,
        mtime_ns: u32::try_from(stat.st_mtime_nsec).map_err(io::Error::other)?,
        xattrs,
    })
}

/// Those that travel, by name.
fn xattrs(
    list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
    get: impl Fn(&[u8], &mut [u8]) -> rustix::io::Result<usize>,
) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = vec![0; XATTR_MAX];
    let length = match list(&mut names) {
        // A file system without any.
        Err(Errno::NOTSUP) => 0,
        other => other?,
    };
    names.truncate(length);
    let mut found = Vec::new();
    let carried = names
        .split(|byte| *byte == 0)
        .filter(|name| is_carried(name));
    for name in carried {
        let mut value = vec![0; XATTR_MAX];
        let length = get(name, &mut value)?;
        value.truncate(length);
        found.push((name.to_vec(), value));
    }
    found.sort();
    Ok(found)
}

/// Gives a directory these, but for the times.
pub(super) fn write(directory: &Path, attributes: &Attributes) -> io::Result<()> {
    let directory = File::open(directory)?;
    let fd = directory.as_fd();
    let (uid, gid) = (attributes.uid, attributes.gid);
    fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    fchmod(fd, Mode::from_raw_mode(attributes.mode.into()))?;
    for (name, value) in &attributes.xattrs {
        fsetxattr(fd, name.as_slice(), value, XattrFlags::empty())?;
    }
    Ok(())
}
