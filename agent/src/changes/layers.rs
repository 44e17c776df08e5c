//! What lies below a directory of the upper one, as overlayfs would show it without that.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, fgetxattr, openat, statat};
use rustix::io::Errno;

/// By which overlayfs marks a directory that hides those of its name below.
const OPAQUE: &str = "trusted.overlay.opaque";

/// The directories of one name, layer by layer, that show through one another.
#[derive(Debug, Default)]
pub(super) struct Layers {
    /// The snapshot's own, which hides what is below as any layer does.
    own: Option<OwnedFd>,
    /// Of the layers below the snapshot, topmost first.
    below: Vec<OwnedFd>,
}

impl Layers {
    /// The roots of layers.
    pub(super) fn open(own: Option<&Path>, below: &[PathBuf]) -> io::Result<Self> {
        let open = |path: &Path| File::open(path).map(OwnedFd::from);
        Ok(Self {
            own: own.map(open).transpose()?,
            below: below
                .iter()
                .map(|path| open(path))
                .collect::<io::Result<_>>()?,
        })
    }

    /// What a layer below the snapshot shows under `name`.
    pub(super) fn below(&self, name: &[u8]) -> io::Result<Option<FileType>> {
        for layer in &self.below {
            if let Some(stat) = look(layer, name)? {
                return Ok((!is_whiteout(&stat)).then(|| file_type(&stat)));
            }
        }
        Ok(None)
    }

    /// What lies below a directory called `name`, which hides all of it if it is `opaque`.
    pub(super) fn enter(&self, name: &[u8], opaque: bool) -> io::Result<Self> {
        let mut inside = Self::default();
        if opaque {
            return Ok(inside);
        }
        if let Some(own) = &self.own
            && let Some(stat) = look(own, name)?
        {
            if file_type(&stat) != FileType::Directory {
                return Ok(inside);
            }
            let directory = open_directory(own, name)?;
            let hides = is_opaque(&directory)?;
            inside.own = Some(directory);
            if hides {
                return Ok(inside);
            }
        }
        for layer in &self.below {
            let Some(stat) = look(layer, name)? else {
                continue;
            };
            if file_type(&stat) != FileType::Directory {
                break;
            }
            let directory = open_directory(layer, name)?;
            let hides = is_opaque(&directory)?;
            inside.below.push(directory);
            if hides {
                break;
            }
        }
        Ok(inside)
    }
}

/// What `name` is in a directory, not followed; nothing if it isn't there.
fn look(directory: &OwnedFd, name: &[u8]) -> io::Result<Option<Stat>> {
    match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Whether it marks a name as gone: a character device 0:0.
pub(super) fn is_whiteout(stat: &Stat) -> bool {
    file_type(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Whether a directory hides what is below.
pub(super) fn is_opaque(directory: impl AsFd) -> io::Result<bool> {
    let mut value = [0; 8];
    match fgetxattr(directory, OPAQUE, &mut value[..]) {
        Ok(length) => Ok(value.get(..length) == Some(b"y")),
        // Longer than any that counts; another file system's.
        Err(Errno::NODATA | Errno::RANGE | Errno::NOTSUP) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A directory in a directory, never by a link.
pub(super) fn open_directory(parent: impl AsFd, name: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(parent, name, flags, Mode::empty())?)
}
