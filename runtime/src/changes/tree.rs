//! Work on directories that a guest's names lead into: by descriptor, one name at a time, never
//! through a link and never onto another file system.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::vec;

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps,
    UTIME_OMIT, Uid, XattrFlags, chownat, fchmod, fchown, flistxattr, fremovexattr, fsetxattr,
    futimens, mknodat, openat2, statat, unlinkat,
};
use rustix::io::Errno;
use supermachine_protocol::changes::{Attributes, is_carried};

/// By which overlayfs marks a directory that hides those of its name below.
const OPAQUE: &str = "trusted.overlay.opaque";

/// The most bytes of all names of an inode's attributes (linux/limits.h).
const XATTR_LIST_MAX: usize = 64 << 10;

/// Opens a directory in a directory.
pub(super) fn open_directory(parent: impl AsFd, name: &[u8]) -> io::Result<OwnedFd> {
    Ok(openat2(
        parent,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV,
    )?)
}

/// What `name` is, not followed; nothing if it isn't there.
pub(super) fn look(directory: impl AsFd, name: &[u8]) -> io::Result<Option<Stat>> {
    match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// Whether it marks a name as gone: a character device 0:0.
pub(super) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Marks a name as gone, as overlayfs does.
pub(super) fn make_whiteout(directory: impl AsFd, name: &[u8]) -> io::Result<()> {
    let kind = FileType::CharacterDevice;
    mknodat(&directory, name, kind, Mode::empty(), 0)?;
    // The process has an id of its own.
    let (uid, gid) = (Some(Uid::ROOT), Some(Gid::ROOT));
    Ok(chownat(
        directory,
        name,
        uid,
        gid,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// Lets a directory hide what is below, or not.
pub(super) fn set_opaque(directory: impl AsFd, opaque: bool) -> io::Result<()> {
    if opaque {
        return Ok(fsetxattr(directory, OPAQUE, b"y", XattrFlags::empty())?);
    }
    match fremovexattr(directory, OPAQUE) {
        Ok(()) | Err(Errno::NODATA | Errno::NOTSUP) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Gives an open inode these, but for the times: of those attributes that travel, it has no others
/// afterwards. In this order, as a change of the owner takes away what comes after it.
pub(super) fn set_attributes(inode: impl AsFd, attributes: &Attributes) -> io::Result<()> {
    let inode = inode.as_fd();
    let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
    fchown(inode, Some(uid), Some(gid))?;
    fchmod(inode, mode(attributes))?;
    let mut names = vec![0; XATTR_LIST_MAX];
    let length = match flistxattr(inode, &mut names[..]) {
        Err(Errno::NOTSUP) => 0,
        other => other?,
    };
    names.truncate(length);
    let wanted = |name: &[u8]| attributes.xattrs.iter().any(|(wanted, _)| wanted == name);
    for name in names.split(|byte| *byte == 0) {
        if is_carried(name) && !wanted(name) {
            fremovexattr(inode, name)?;
        }
    }
    for (name, value) in &attributes.xattrs {
        fsetxattr(inode, name.as_slice(), value, XattrFlags::empty())?;
    }
    Ok(())
}

pub(super) fn mode(attributes: &Attributes) -> Mode {
    Mode::from_raw_mode(attributes.mode.into())
}

/// Sets when an open inode was modified.
pub(super) fn set_times(inode: impl AsFd, attributes: &Attributes) -> io::Result<()> {
    Ok(futimens(inode, &times(attributes))?)
}

pub(super) fn times(attributes: &Attributes) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: attributes.mtime,
            tv_nsec: attributes.mtime_ns.into(),
        },
    }
}

/// Removes whatever is called `name`, and all that is in it.
pub(super) fn remove(directory: impl AsFd, name: &[u8]) -> io::Result<()> {
    match unlinkat(&directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error.into()),
    }
    clear(open_directory(&directory, name)?)?;
    Ok(unlinkat(directory, name, AtFlags::REMOVEDIR)?)
}

/// Removes everything in a directory.
pub(super) fn clear(directory: OwnedFd) -> io::Result<()> {
    struct Level {
        directory: OwnedFd,
        name: Vec<u8>,
        left: vec::IntoIter<Vec<u8>>,
    }
    let level = |directory: OwnedFd, name: Vec<u8>| -> io::Result<Level> {
        Ok(Level {
            left: names(&directory)?.into_iter(),
            directory,
            name,
        })
    };
    let mut levels = vec![level(directory, Vec::new())?];
    while let Some(last) = levels.last_mut() {
        let Some(name) = last.left.next() else {
            let name = std::mem::take(&mut last.name);
            levels.pop();
            if let Some(parent) = levels.last() {
                unlinkat(&parent.directory, name, AtFlags::REMOVEDIR)?;
            }
            continue;
        };
        match unlinkat(&last.directory, name.as_slice(), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR) => {
                let inside = open_directory(&last.directory, &name)?;
                levels.push(level(inside, name)?);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn names(directory: &OwnedFd) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}
