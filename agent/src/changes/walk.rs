//! The walk of an upper directory.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::vec;

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, SeekFrom, Stat, major, minor, openat, readlinkat, seek,
    statat,
};
use rustix::io::Errno;
use supermachine_protocol::changes::{DATA_MAX, Encoder, NodeKind, Record};

use super::attributes;
use super::layers::{Layers, file_type, is_opaque, is_whiteout, open_directory};

/// A directory on the way to the one the walk is in, or that one.
struct Level {
    /// In ascending order.
    names: vec::IntoIter<Vec<u8>>,
    layers: Layers,
    /// Empty for the root.
    name: Vec<u8>,
}

/// Tells everything in `upper`, which lies over `layers`.
pub(super) fn walk(
    upper: OwnedFd,
    layers: Layers,
    encoder: &mut Encoder<impl Write>,
) -> io::Result<()> {
    let mut walk = Walk {
        levels: vec![Level {
            names: names(&upper)?.into_iter(),
            layers,
            name: Vec::new(),
        }],
        directory: upper,
        encoder,
        shared: HashMap::new(),
        buffer: vec![0; DATA_MAX],
    };
    while let Some(level) = walk.levels.last_mut() {
        let Some(name) = level.names.next() else {
            walk.leave()?;
            continue;
        };
        if let Err(error) = walk.entry(&name) {
            let path = walk.path(&name);
            let text = format!("{}: {error}", path.display());
            return Err(io::Error::new(error.kind(), text));
        }
    }
    Ok(())
}

struct Walk<'a, W> {
    levels: Vec<Level>,
    /// The last level's. One descriptor is enough, as nobody else changes the tree: ".." leads back.
    directory: OwnedFd,
    encoder: &'a mut Encoder<W>,
    /// Inodes with several names, by number, as links to them are to name them.
    shared: HashMap<u64, u64>,
    buffer: Vec<u8>,
}

impl<W: Write> Walk<'_, W> {
    /// Where in the container `name` is.
    fn path(&self, name: &[u8]) -> PathBuf {
        let parts = self.levels.iter().map(|level| level.name.as_slice());
        let mut path = PathBuf::from("/");
        path.extend(parts.chain([name]).map(OsStr::from_bytes));
        path
    }

    /// Leaves the last level.
    fn leave(&mut self) -> io::Result<()> {
        self.levels.pop();
        if self.levels.is_empty() {
            return Ok(());
        }
        self.directory = open_directory(&self.directory, b"..")?;
        self.encoder.record(&Record::Up)
    }

    fn entry(&mut self, name: &[u8]) -> io::Result<()> {
        let stat = statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = file_type(&stat);
        if kind == FileType::Directory {
            return self.enter(name, &stat);
        }
        if is_whiteout(&stat) {
            return self.encoder.record(&Record::Whiteout {
                name: name.to_vec(),
                below: self.below(name)?.is_some(),
            });
        }
        if let Some(inode) = self.shared.get(&stat.st_ino) {
            return self.encoder.record(&Record::Link {
                name: name.to_vec(),
                inode: *inode,
            });
        }
        let shared = stat.st_nlink > 1;
        self.inode(name, kind, &stat, shared)?;
        if shared && let Some(number) = self.encoder.last_shared() {
            self.shared.insert(stat.st_ino, number);
        }
        if kind == FileType::RegularFile {
            self.content(name)?;
        }
        Ok(())
    }

    fn below(&self, name: &[u8]) -> io::Result<Option<FileType>> {
        match self.levels.last() {
            Some(level) => level.layers.below(name),
            None => Ok(None),
        }
    }

    fn enter(&mut self, name: &[u8], stat: &Stat) -> io::Result<()> {
        let directory = open_directory(&self.directory, name)?;
        let opaque = is_opaque(&directory)?;
        self.encoder.record(&Record::Directory {
            name: name.to_vec(),
            attributes: attributes::of_path(&self.by_descriptor(name), stat)?,
            opaque,
            below: self.below(name)? == Some(FileType::Directory),
        })?;
        let layers = match self.levels.last() {
            Some(level) => level.layers.enter(name, opaque)?,
            None => Layers::default(),
        };
        self.levels.push(Level {
            names: names(&directory)?.into_iter(),
            layers,
            name: name.to_vec(),
        });
        self.directory = directory;
        Ok(())
    }

    /// A path to an entry that no link in the tree can bend.
    fn by_descriptor(&self, name: &[u8]) -> PathBuf {
        let directory = format!("/proc/self/fd/{}", self.directory.as_raw_fd());
        Path::new(&directory).join(OsStr::from_bytes(name))
    }

    fn inode(&mut self, name: &[u8], kind: FileType, stat: &Stat, shared: bool) -> io::Result<()> {
        let attributes = attributes::of_path(&self.by_descriptor(name), stat)?;
        let name = name.to_vec();
        let (major, minor) = (major(stat.st_rdev), minor(stat.st_rdev));
        let node = match kind {
            FileType::RegularFile => {
                return self.encoder.record(&Record::File {
                    name,
                    attributes,
                    shared,
                    size: u64::try_from(stat.st_size).map_err(io::Error::other)?,
                });
            }
            FileType::Symlink => {
                let target = readlinkat(&self.directory, name.as_slice(), Vec::new())?.into_bytes();
                return self.encoder.record(&Record::Symlink {
                    name,
                    attributes,
                    shared,
                    target,
                });
            }
            FileType::CharacterDevice => NodeKind::Character { major, minor },
            FileType::BlockDevice => NodeKind::Block { major, minor },
            FileType::Fifo => NodeKind::Fifo,
            FileType::Socket => NodeKind::Socket,
            FileType::Directory | FileType::Unknown => {
                return Err(io::Error::other("it is of no known type"));
            }
        };
        self.encoder.record(&Record::Node {
            name,
            attributes,
            shared,
            kind: node,
        })
    }

    /// The content of a file, without its holes.
    fn content(&mut self, name: &[u8]) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NOATIME | OFlags::CLOEXEC;
        let file = File::from(openat(&self.directory, name, flags, Mode::empty())?);
        let mut at = 0;
        loop {
            at = match seek(&file, SeekFrom::Data(at)) {
                Ok(at) => at,
                // Only a hole is left, or nothing.
                Err(Errno::NXIO) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let end = seek(&file, SeekFrom::Hole(at))?;
            while at < end {
                let most = usize::try_from(end - at).unwrap_or(DATA_MAX).min(DATA_MAX);
                let buffer = self.buffer.get_mut(..most).unwrap_or_default();
                let length = file.read_at(buffer, at)?;
                if length == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.encoder
                    .data(at, self.buffer.get(..length).unwrap_or_default())?;
                at += length as u64;
            }
        }
    }
}

/// All names in a directory, in ascending order.
fn names(directory: &OwnedFd) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            names.push(name.to_vec());
        }
    }
    names.sort_unstable();
    Ok(names)
}
