//! The machine's disks for a container's root.
//!
//! The guest gets read-only EROFS images for what lies below and one ext4 disk for what the
//! container writes, or the one disk that the snapshot is.

use std::path::PathBuf;

use oci_spec::runtime::Spec;
use serde::Serialize;
use supermachine_protocol::{
    Directory as ProtocolDirectory, OverlayRootfs, Rootfs as ProtocolRootfs, SingleDisk,
    lower_disk_serial, writable_disk_serial,
};

use super::snapshot::{self, Layer, Tree, Upper};
use super::{Error, HostFacts};
use crate::config::Resolved;
use crate::request::Create;

/// The most read-only images of one container, all of which one disk holds. With more layers than
/// that the lowest of them become one image.
pub const IMAGES_MAX: usize = 128;

/// The serial of the disk that holds several images.
const LAYERS_SERIAL: &str = "layers";

/// A disk of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// By which the agent finds it.
    pub serial: String,
    pub read_only: bool,
    pub source: Source,
}

/// What a disk holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// An EROFS image.
    Image(Image),
    /// Several, each a partition; the disk itself has no table of them.
    Images(Vec<NamedImage>),
    /// An empty ext4 file system of `size` bytes, mostly a hole.
    Writable { size: u64 },
    /// An ext4 that belongs to the snapshot: what is written to it stays. `make` says how to make
    /// it, if it isn't there.
    Own {
        file: PathBuf,
        #[serde(skip_serializing_if = "Option::is_none")]
        make: Option<MakeExt4>,
    },
}

/// An image on a disk with others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NamedImage {
    /// By which the agent finds it, as it does a disk by its serial.
    pub name: String,
    pub image: Image,
}

/// Where an EROFS image comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Image {
    /// A directory that never changes again: an image from the cache.
    Layer { directory: PathBuf },
    /// Several of them as one, topmost first; nothing lies below the last.
    MergedLayers { directories: Vec<PathBuf> },
    /// A directory that may change once the container is gone: an image of its own.
    Copy { directory: PathBuf },
    /// The snapshotter has it.
    File { file: PathBuf },
}

/// How to make an ext4.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MakeExt4 {
    pub size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
}

/// Where what the container wrote goes when it has stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Changes {
    /// The snapshot's own directory.
    pub directory: PathBuf,
    /// It is the upper one of an overlay, in which deletions are marked.
    pub overlay: bool,
    /// The most bytes there can be.
    pub most: u64,
}

/// Which disks make the root, by serial, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rootfs {
    /// Topmost first; none if the root is the writable disk itself.
    pub lower: Vec<String>,
    /// The first of them is what the snapshot's own directory held before.
    pub own: bool,
    /// Without one, what is written stays in the guest's memory.
    pub writable: Option<String>,
    /// The directory of the writable disk that is the root, or an overlay's upper one; empty for
    /// the usual one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub directory: String,
    /// An overlay's work directory; empty for the usual one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub work: String,
    /// The one disk can't be written to.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// To be made on the writable disk.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub new_directories: Vec<NewDirectory>,
}

/// A directory to make, relative to its disk's root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NewDirectory {
    pub path: String,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

impl From<&Rootfs> for ProtocolRootfs {
    fn from(rootfs: &Rootfs) -> Self {
        let mut message = Self::new();
        let writable = rootfs.writable.clone().unwrap_or_default();
        if rootfs.lower.is_empty() {
            let mut single = SingleDisk::new();
            single.serial = writable;
            single.fstype = "ext4".to_owned();
            single.read_only = rootfs.read_only;
            single.directory.clone_from(&rootfs.directory);
            message.set_single_disk(single);
        } else {
            let mut overlay = OverlayRootfs::new();
            overlay.lower_disks.clone_from(&rootfs.lower);
            overlay.own_lower_disk = rootfs.own;
            overlay.writable_disk = writable;
            overlay.upper.clone_from(&rootfs.directory);
            overlay.work.clone_from(&rootfs.work);
            message.set_overlay(overlay);
        }
        let directories = rootfs.new_directories.iter().map(|new| {
            let mut directory = ProtocolDirectory::new();
            directory.path.clone_from(&new.path);
            directory.mode = new.mode;
            (directory.uid, directory.gid) = (new.uid, new.gid);
            directory
        });
        message.directories = directories.collect();
        message
    }
}

/// The disks of a container, and what its root is made of.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) disks: Vec<Disk>,
    pub(super) rootfs: Rootfs,
    /// None if nothing can be written, or nothing of it is to be kept.
    pub(super) changes: Option<Changes>,
    /// The container can't write to its root, whether by its own choice or the snapshot's.
    pub(super) read_only: bool,
}

pub(super) fn layout(
    create: &Create,
    spec: &Spec,
    facts: &HostFacts,
    config: &Resolved,
) -> Result<Layout, Error> {
    let root = spec.root().as_ref().ok_or(Error::Missing { key: "root" })?;
    let tree = match create.rootfs.as_slice() {
        [] => snapshot::directory(&create.bundle.join(root.path()), false),
        mounts => snapshot::tree(mounts, &facts.images)?,
    };
    let wished = root.readonly().unwrap_or(false);
    match tree {
        Tree::Whole {
            disk,
            directory,
            read_only,
        } => Ok(whole(disk, directory, read_only, wished)),
        Tree::Stack {
            lower,
            upper,
            read_only,
        } => stack(lower, upper, read_only || wished, facts, config),
    }
}

/// A root that the container only reads may still be written to before: mount points are made in it,
/// as under runc.
fn whole(disk: snapshot::Disk, directory: String, read_only: bool, wished: bool) -> Layout {
    let serial = writable_disk_serial(0);
    Layout {
        rootfs: Rootfs {
            lower: Vec::new(),
            own: false,
            writable: Some(serial.clone()),
            directory,
            work: String::new(),
            read_only,
            new_directories: disk.directories.clone(),
        },
        disks: vec![own_disk(serial, disk, read_only)],
        changes: None,
        read_only: read_only || wished,
    }
}

fn own_disk(serial: String, disk: snapshot::Disk, read_only: bool) -> Disk {
    Disk {
        serial,
        read_only,
        source: Source::Own {
            file: disk.file,
            make: disk.make,
        },
    }
}

fn stack(
    layers: Vec<Layer>,
    upper: Upper,
    read_only: bool,
    facts: &HostFacts,
    config: &Resolved,
) -> Result<Layout, Error> {
    let changes = match (&upper, layers.first()) {
        _ if read_only => None,
        (Upper::Directory(directory), _) => Some((directory.clone(), true)),
        (Upper::None, Some(Layer::Directory { path, may_change })) if *may_change => {
            Some((path.clone(), false))
        }
        _ => None,
    };
    let mut images = Vec::new();
    if let Upper::Directory(directory) = &upper
        && facts.upper_in_use
    {
        let directory = directory.clone();
        images.push(Image::Copy { directory });
    }
    let most = IMAGES_MAX - images.len();
    images.extend(layer_images(layers, most)?);
    let lower = names(images.len());
    let mut disks = layer_disks(images);
    let overlay = changes.as_ref().is_some_and(|(_, overlay)| *overlay);
    let mut rootfs = Rootfs {
        lower,
        own: changes.is_some() && (!overlay || facts.upper_in_use),
        writable: None,
        directory: String::new(),
        work: String::new(),
        read_only: false,
        new_directories: Vec::new(),
    };
    let serial = writable_disk_serial(0);
    match upper {
        Upper::Disk { disk, upper, work } => {
            rootfs.writable = Some(serial.clone());
            (rootfs.directory, rootfs.work) = (upper, work);
            rootfs.new_directories.clone_from(&disk.directories);
            disks.push(own_disk(serial, disk, false));
        }
        // A read-only root still has mount points made in it, which the guest's memory can hold.
        Upper::None | Upper::Directory(_) if read_only => {}
        Upper::None | Upper::Directory(_) => {
            rootfs.writable = Some(serial.clone());
            disks.push(Disk {
                serial,
                read_only: false,
                source: Source::Writable {
                    size: config.rootfs.writable_size.0,
                },
            });
        }
    }
    Ok(Layout {
        disks,
        rootfs,
        changes: changes.map(|(directory, overlay)| Changes {
            directory,
            overlay,
            most: config.rootfs.writable_size.0,
        }),
        read_only,
    })
}

fn names(count: usize) -> Vec<String> {
    (0u32..).map(lower_disk_serial).take(count).collect()
}

/// One disk, whatever the number of images: each device costs the guest time to start, and the host a
/// thread.
fn layer_disks(mut images: Vec<Image>) -> Vec<Disk> {
    let source = match images.len() {
        1 => images.pop().map(Source::Image),
        count => {
            let named = names(count).into_iter().zip(images);
            let named = named.map(|(name, image)| NamedImage { name, image });
            Some(Source::Images(named.collect()))
        }
    };
    let serial = match source {
        Some(Source::Images(_)) => LAYERS_SERIAL.to_owned(),
        _ => lower_disk_serial(0),
    };
    let disk = source.map(|source| Disk {
        serial,
        read_only: true,
        source,
    });
    disk.into_iter().collect()
}

/// One image for each layer, or fewer than `most`: merging the lowest keeps every deletion right, as
/// nothing lies below them that a deletion could hide.
fn layer_images(mut layers: Vec<Layer>, most: usize) -> Result<Vec<Image>, Error> {
    let count = layers.len();
    let merged = if count > most {
        let lowest = layers.split_off(most - 1);
        let directories = lowest.into_iter().map(|layer| match layer {
            Layer::Directory { path, .. } => Ok(path),
            Layer::Image { shown, .. } => shown.ok_or_else(|| Error::Unsupported {
                key: format!("A root file system of {count} images"),
                reason: format!("at most {most} fit on the disk that holds them"),
            }),
        });
        let directories = directories.collect::<Result<_, _>>()?;
        Some(Image::MergedLayers { directories })
    } else {
        None
    };
    let images = layers.into_iter().map(|layer| match layer {
        Layer::Directory {
            path: directory,
            may_change: true,
        } => Image::Copy { directory },
        Layer::Directory {
            path: directory,
            may_change: false,
        } => Image::Layer { directory },
        Layer::Image { file, .. } => Image::File { file },
    });
    Ok(images.chain(merged).collect())
}

/// The writable directory of an overlay snapshot, if the root is one.
pub(super) fn upper_directory(create: &Create) -> Option<PathBuf> {
    snapshot::upper_directory(&create.rootfs)
}
