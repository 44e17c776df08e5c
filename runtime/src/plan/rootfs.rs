//! From a snapshotter's mounts to the machine's disks.
//!
//! The guest gets read-only EROFS disks for what lies below and one ext4 disk for what the
//! container writes. containerd's overlayfs snapshotter gives one `overlay` mount; its native one
//! (and `ctr run --rootfs`) a directory.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use serde::Serialize;
use supermachine_protocol::{
    OverlayRootfs, Rootfs as ProtocolRootfs, lower_disk_serial, writable_disk_serial,
};

use super::{Error, HostFacts};
use crate::config::Resolved;
use crate::request::{Create, Mount};

/// The most read-only disks of one container. With more layers than that the lowest of them
/// become one disk.
pub const DISKS_MAX: usize = 24;

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
    /// A directory that never changes again: an EROFS image from the cache.
    Layer { directory: PathBuf },
    /// Several of them as one, topmost first; nothing lies below the last.
    MergedLayers { directories: Vec<PathBuf> },
    /// A directory that may change once the container is gone: an EROFS image of its own.
    Copy { directory: PathBuf },
    /// An empty ext4 file system of `size` bytes, mostly a hole.
    Writable { size: u64 },
}

/// Which disks make the root, by serial.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rootfs {
    /// Topmost first.
    pub lower: Vec<String>,
    /// Without one, what is written stays in the guest's memory.
    pub writable: Option<String>,
}

impl From<&Rootfs> for ProtocolRootfs {
    fn from(rootfs: &Rootfs) -> Self {
        let mut overlay = OverlayRootfs::new();
        overlay.lower_disks = rootfs.lower.clone();
        overlay.writable_disk = rootfs.writable.clone().unwrap_or_default();
        let mut message = Self::new();
        message.set_overlay(overlay);
        message
    }
}

/// The disks of a container, and what its root is made of.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) disks: Vec<Disk>,
    pub(super) rootfs: Rootfs,
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
        [] => directory_tree(&create.bundle.join(root.path()), false),
        [mount] => mounted_tree(mount)?,
        mounts => {
            return Err(Error::Unsupported {
                key: format!("A root file system of {} mounts", mounts.len()),
                reason: "expected the one mount of the overlayfs or native snapshotter".into(),
            });
        }
    };
    let mut sources = Vec::new();
    if let Some(upper) = tree.upper.filter(|_| facts.upper_in_use) {
        sources.push(Source::Copy { directory: upper });
    }
    sources.extend(lower_sources(
        tree.lower,
        tree.may_change,
        DISKS_MAX - sources.len(),
    ));
    let read_only = tree.read_only || root.readonly().unwrap_or(false);

    let serials = (0u32..).map(lower_disk_serial);
    let mut disks: Vec<Disk> = serials
        .zip(sources)
        .map(|(serial, source)| Disk {
            serial,
            read_only: true,
            source,
        })
        .collect();
    let lower = disks.iter().map(|disk| disk.serial.clone()).collect();
    // A read-only root still has mount points made in it, which the guest's memory can hold.
    let writable = (!read_only).then(|| writable_disk_serial(0));
    disks.extend(writable.clone().map(|serial| Disk {
        serial,
        read_only: false,
        source: Source::Writable {
            size: config.rootfs.writable_size.0,
        },
    }));
    Ok(Layout {
        disks,
        rootfs: Rootfs { lower, writable },
        read_only,
    })
}

/// The writable directory of an overlay snapshot, if the root is one.
pub(super) fn upper_directory(create: &Create) -> Option<PathBuf> {
    match create.rootfs.as_slice() {
        [mount] if mount.kind == "overlay" => mounted_tree(mount).ok()?.upper,
        _ => None,
    }
}

/// What a mount shows.
struct Tree {
    /// Topmost first; at least one.
    lower: Vec<PathBuf>,
    upper: Option<PathBuf>,
    read_only: bool,
    /// The lower directory isn't a committed snapshot's, so its content has no identity.
    may_change: bool,
}

fn directory_tree(directory: &Path, read_only: bool) -> Tree {
    Tree {
        lower: vec![directory.to_path_buf()],
        upper: None,
        read_only,
        // A read-only bind mount is a view of a committed snapshot.
        may_change: !read_only,
    }
}

fn mounted_tree(mount: &Mount) -> Result<Tree, Error> {
    let option = |name: &str| mount.options.iter().any(|option| option == name);
    match mount.kind.as_str() {
        "bind" | "rbind" => Ok(directory_tree(
            &absolute("The root's source", &mount.source)?,
            option("ro"),
        )),
        "overlay" => overlay_tree(mount),
        kind => Err(Error::Unsupported {
            key: format!("A root file system of type {kind:?}"),
            reason: "expected the overlay mount of the overlayfs snapshotter or the bind mount of \
                     the native one"
                .into(),
        }),
    }
}

fn overlay_tree(mount: &Mount) -> Result<Tree, Error> {
    let value = |name: &str| {
        mount
            .options
            .iter()
            .find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
    };
    if mount.options.iter().any(|option| option == "userxattr") {
        return Err(Error::Unsupported {
            key: "Overlay option userxattr".into(),
            reason: "layers of a rootless containerd mark deletions in another way".into(),
        });
    }
    let lower = split_layers(value("lowerdir").ok_or(Error::Missing { key: "lowerdir" })?)
        .iter()
        .map(|layer| absolute("lowerdir", layer))
        .collect::<Result<Vec<_>, _>>()?;
    let upper = value("upperdir")
        .map(|upper| absolute("upperdir", &unescape(upper)))
        .transpose()?;
    Ok(Tree {
        read_only: upper.is_none() || mount.options.iter().any(|option| option == "ro"),
        lower,
        upper,
        may_change: false,
    })
}

/// Splits at each ':' that has no backslash before it, as overlayfs does.
pub(crate) fn split_layers(value: &str) -> Vec<String> {
    let mut layers = vec![String::new()];
    let mut chars = value.chars();
    while let Some(char) = chars.next() {
        match char {
            '\\' => layers
                .last_mut()
                .into_iter()
                .for_each(|layer| layer.extend(chars.next())),
            ':' => layers.push(String::new()),
            other => layers
                .last_mut()
                .into_iter()
                .for_each(|layer| layer.push(other)),
        }
    }
    layers
}

fn unescape(value: &str) -> String {
    let mut chars = value.chars();
    std::iter::from_fn(|| match chars.next()? {
        '\\' => chars.next(),
        other => Some(other),
    })
    .collect()
}

fn absolute(key: &'static str, value: &str) -> Result<PathBuf, Error> {
    let path = PathBuf::from(value);
    if path.is_absolute() {
        Ok(path)
    } else {
        let expected = "an absolute path";
        Err(Error::Invalid {
            key: key.into(),
            value: value.to_owned(),
            expected,
        })
    }
}

/// One source for each layer, or fewer than `most`: merging the lowest keeps every deletion
/// right, as nothing lies below them that a deletion could hide.
fn lower_sources(mut layers: Vec<PathBuf>, may_change: bool, most: usize) -> Vec<Source> {
    let merged = (layers.len() > most).then(|| layers.split_off(most - 1));
    layers
        .into_iter()
        .map(|directory| match may_change {
            true => Source::Copy { directory },
            false => Source::Layer { directory },
        })
        .chain(merged.map(|directories| Source::MergedLayers { directories }))
        .collect()
}
