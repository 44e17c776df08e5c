//! What a snapshotter's mounts show, without mounting any of them.
//!
//! containerd's overlayfs snapshotter gives one `overlay` mount; its native one (and `ctr run
//! --rootfs`) a directory; the blockfile one an ext4 file; the erofs one images, which an overlay
//! stacks. Since containerd 2.2 mounts build on each other by templates ([`super::template`]), which
//! `-info` tells it to leave to us.

mod mount;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::template::Place;
use super::{Error, MakeExt4, NewDirectory};
use crate::request::Mount;
use mount::{Overlay, Reader, Shown};

/// What a container's root is made of.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Tree {
    /// Layers that are only read, topmost first, at least one; what is written goes elsewhere.
    Stack {
        lower: Vec<Layer>,
        upper: Upper,
        read_only: bool,
    },
    /// A directory of a file system that belongs to the snapshot.
    Whole {
        disk: Disk,
        directory: String,
        read_only: bool,
    },
}

/// One read-only layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Layer {
    /// What a committed snapshot holds, or what `may_change` once the container is gone.
    Directory { path: PathBuf, may_change: bool },
    /// An EROFS image, and the directory that shows its content if there is one.
    Image {
        file: PathBuf,
        shown: Option<PathBuf>,
    },
}

/// Where an overlay's changes go.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Upper {
    None,
    /// To a directory of the host, in the end.
    Directory(PathBuf),
    /// To two directories of a file system that belongs to the snapshot.
    Disk {
        disk: Disk,
        upper: String,
        work: String,
    },
}

/// An ext4 in a file or on a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) file: PathBuf,
    /// How to make it, if it isn't there yet.
    pub(super) make: Option<MakeExt4>,
    /// What to make on it.
    pub(super) directories: Vec<NewDirectory>,
}

/// What `mounts` show together. `images` has the directories of the host that are mounts of an EROFS
/// image, each with that image's file.
pub(super) fn tree(mounts: &[Mount], images: &BTreeMap<PathBuf, PathBuf>) -> Result<Tree, Error> {
    check_list(mounts)?;
    let mut shown: Vec<Shown> = Vec::with_capacity(mounts.len());
    for (at, mount) in mounts.iter().enumerate() {
        let earlier = mounts.get(..at).unwrap_or_default();
        let next = Reader::new(mount, earlier)?.read(&mut shown)?;
        shown.push(next);
    }
    let list = List {
        shown: &shown,
        images,
    };
    list.root()
}

/// Several mounts serve the last one, which names them; anything else would hide one or lie in it.
fn check_list(mounts: &[Mount]) -> Result<(), Error> {
    if let Some(mount) = mounts.iter().find(|mount| !mount.target.is_empty()) {
        return Err(Error::Unsupported {
            key: format!("Mount of the root file system on {:?}", mount.target),
            reason: "expected every mount to be for the root itself".into(),
        });
    }
    match mounts {
        [] | [_] => Ok(()),
        [.., last] if last.kind.split('/').any(|part| part == "format") => Ok(()),
        several => Err(Error::Unsupported {
            key: format!("A root file system of {} mounts", several.len()),
            reason: "expected one, or a last one of a type format/… that makes use of the others"
                .into(),
        }),
    }
}

/// The directories of the host that overlays of `mounts` have as layers.
pub(super) fn lower_directories(mounts: &[Mount]) -> Vec<PathBuf> {
    overlays(mounts)
        .flat_map(|overlay| overlay.lower)
        .filter_map(host)
        .collect()
}

/// The writable directory of the overlay that is the root, if that is on the host.
pub(super) fn upper_directory(mounts: &[Mount]) -> Option<PathBuf> {
    let overlay = overlays(mounts).next_back()?;
    host(overlay.upper?.0)
}

/// The overlays among mounts that can be read.
fn overlays(mounts: &[Mount]) -> impl DoubleEndedIterator<Item = Overlay> {
    mounts.iter().enumerate().filter_map(|(at, mount)| {
        let reader = Reader::new(mount, mounts.get(..at)?).ok()?;
        (reader.kind == "overlay").then(|| reader.overlay().ok())?
    })
}

fn host(place: Place) -> Option<PathBuf> {
    match place {
        Place::Host(path) => Some(path),
        Place::Mounted { .. } => None,
    }
}

/// All mounts of a root.
struct List<'a> {
    shown: &'a [Shown],
    images: &'a BTreeMap<PathBuf, PathBuf>,
}

impl List<'_> {
    /// What the last one shows: the others only serve it.
    fn root(&self) -> Result<Tree, Error> {
        let missing = Error::Missing { key: "root" };
        match self.shown.last().ok_or(missing)? {
            Shown::Directory { path, read_only } => Ok(directory(path, *read_only)),
            Shown::Image { file } => Ok(Tree::Stack {
                lower: vec![image(file)],
                upper: Upper::None,
                read_only: true,
            }),
            Shown::Disk { disk, read_only } => Ok(Tree::Whole {
                disk: disk.clone(),
                directory: String::new(),
                read_only: *read_only,
            }),
            Shown::Part { place, read_only } => self.part(place, *read_only),
            Shown::Overlay(overlay) => self.stack(overlay),
        }
    }

    /// A bind mount of (a directory of) an earlier mount.
    fn part(&self, place: &Place, read_only: bool) -> Result<Tree, Error> {
        match self.mount_of(place) {
            Some((
                Shown::Directory {
                    path,
                    read_only: all,
                },
                part,
            )) => Ok(directory(&path.join(part), *all || read_only)),
            Some((
                Shown::Disk {
                    disk,
                    read_only: all,
                },
                part,
            )) => Ok(Tree::Whole {
                disk: disk.clone(),
                directory: part.to_owned(),
                read_only: *all || read_only,
            }),
            Some((Shown::Image { file }, "")) => Ok(Tree::Stack {
                lower: vec![image(file)],
                upper: Upper::None,
                read_only: true,
            }),
            Some((Shown::Overlay(overlay), "")) => {
                let mut tree = self.stack(overlay)?;
                if let Tree::Stack { read_only: all, .. } = &mut tree {
                    *all |= read_only;
                }
                Ok(tree)
            }
            _ => Err(unsupported("A bind mount", place)),
        }
    }

    fn stack(&self, overlay: &Overlay) -> Result<Tree, Error> {
        let lower = overlay.lower.iter().map(|place| self.layer(place));
        Ok(Tree::Stack {
            lower: lower.collect::<Result<_, _>>()?,
            upper: match &overlay.upper {
                None => Upper::None,
                Some((Place::Host(path), _)) => Upper::Directory(path.clone()),
                Some((upper, work)) => self.upper(upper, work.as_ref())?,
            },
            read_only: overlay.read_only,
        })
    }

    fn layer(&self, place: &Place) -> Result<Layer, Error> {
        if let Place::Host(path) = place {
            return Ok(match self.images.get(path) {
                Some(file) => Layer::Image {
                    file: file.clone(),
                    shown: Some(path.clone()),
                },
                None => Layer::Directory {
                    path: path.clone(),
                    may_change: false,
                },
            });
        }
        match self.mount_of(place) {
            Some((Shown::Image { file }, "")) => Ok(image(file)),
            Some((Shown::Directory { path, read_only }, part)) => Ok(Layer::Directory {
                path: path.join(part),
                may_change: !read_only,
            }),
            _ => Err(unsupported("A layer", place)),
        }
    }

    /// Both directories are on one disk, as overlayfs wants.
    fn upper(&self, upper: &Place, work: Option<&Place>) -> Result<Upper, Error> {
        let work = work.ok_or(Error::Missing { key: "workdir" })?;
        match (self.mount_of(upper), self.mount_of(work), upper, work) {
            (
                Some((
                    Shown::Disk {
                        disk,
                        read_only: false,
                    },
                    upper,
                )),
                Some((_, work)),
                Place::Mounted { mount: one, .. },
                Place::Mounted { mount: other, .. },
            ) if one == other && !upper.is_empty() && !work.is_empty() => Ok(Upper::Disk {
                disk: disk.clone(),
                upper: upper.to_owned(),
                work: work.to_owned(),
            }),
            _ => Err(unsupported("An upper directory", upper)),
        }
    }

    fn mount_of<'a>(&'a self, place: &'a Place) -> Option<(&'a Shown, &'a str)> {
        match place {
            Place::Mounted { mount, path } => Some((self.shown.get(*mount)?, path)),
            Place::Host(_) => None,
        }
    }
}

fn unsupported(what: &str, place: &Place) -> Error {
    let place = match place {
        Place::Host(path) => path.display().to_string(),
        Place::Mounted { mount, path } => format!("/{path} of mount {mount}"),
    };
    Error::Unsupported {
        key: format!("{what} that is {place}"),
        reason:
            "expected a layer to be a directory or an EROFS image, and what is written to be in \
                 directories of one writable ext4"
                .into(),
    }
}

fn image(file: &Path) -> Layer {
    Layer::Image {
        file: file.to_path_buf(),
        shown: None,
    }
}

/// A directory that is the root.
pub(super) fn directory(path: &Path, read_only: bool) -> Tree {
    Tree::Stack {
        lower: vec![Layer::Directory {
            path: path.to_path_buf(),
            // A read-only bind mount is a view of a committed snapshot.
            may_change: !read_only,
        }],
        upper: Upper::None,
        read_only,
    }
}
