//! What a plan needs to know of the host.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;

use super::snapshot;
use crate::images;
use crate::request::Create;
use crate::sys;

/// Facts read once, before planning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// Processors this process may run on; at least 1.
    pub cpus: u32,
    /// Physical memory in bytes.
    pub memory: u64,
    /// The snapshot's writable directory already holds something, as after `nerdctl cp` into a
    /// container that never ran.
    pub upper_in_use: bool,
    /// The regular files among the sources of the container's bind mounts, with their sizes.
    pub files: BTreeMap<PathBuf, u64>,
    /// Layers that are mounts of an EROFS image, each with that image's file: containerd 2.1's erofs
    /// snapshotter gives such directories.
    pub images: BTreeMap<PathBuf, PathBuf>,
}

impl HostFacts {
    /// Reads the facts that matter to `create`, whose configuration is `spec`.
    pub fn read(create: &Create, spec: &Spec) -> Self {
        let upper = super::rootfs::upper_directory(create);
        Self {
            cpus: std::thread::available_parallelism()
                .map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
            memory: sys::host_memory(),
            upper_in_use: upper.is_some_and(|upper| has_entries(&upper)),
            files: super::mounts::bind_sources(spec, &create.bundle)
                .filter_map(|path| {
                    let metadata = std::fs::metadata(&path).ok()?;
                    metadata.is_file().then_some((path, metadata.len()))
                })
                .collect(),
            images: images::mounted(snapshot::lower_directories(&create.rootfs)),
        }
    }
}

fn has_entries(directory: &Path) -> bool {
    // A directory that can't be read is reported when it is acquired.
    std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some())
}
