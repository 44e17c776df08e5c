//! The mounts of a container: those that the guest's kernel provides, and files of the host.
//!
//! A file is told to the guest as it stands, and the container has a copy. That is as good as the
//! file itself where the container can't write to it, and for those that engines make for each
//! container and that nobody reads afterwards.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};
use serde::Serialize;
use supermachine_protocol::FILE_PREFIX;

use super::{Error, HostFacts, refuse, some};

/// Kinds of mount that the guest's own kernel provides.
const GUEST_MOUNTS: [&str; 7] = [
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2",
];

/// Where engines put files of their own making, one set for each container.
const ENGINE_FILES: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];

/// The most bytes that the files of one container have together. The guest is told of them in one
/// message, which ttrpc limits to 4 MiB.
pub const FILES_MAX: u64 = 3 << 20;

/// A file of the host that the guest has a copy of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostFile {
    /// By which its mount in the guest's configuration names it.
    pub name: String,
    pub source: PathBuf,
}

/// Where the bind mounts of a configuration come from.
pub(super) fn bind_sources<'a>(
    spec: &'a Spec,
    bundle: &'a Path,
) -> impl Iterator<Item = PathBuf> + 'a {
    let mounts = spec.mounts().iter().flatten();
    mounts
        .filter(|mount| is_bind(mount))
        .map(|mount| bind_source(mount, bundle))
}

/// The guest's mounts, and the files that some of them are of.
pub(super) fn build(
    spec: &Spec,
    bundle: &Path,
    facts: &HostFacts,
) -> Result<(Vec<Mount>, Vec<HostFile>), Error> {
    let mut files = Files {
        known: &facts.files,
        listed: Vec::new(),
        size: 0,
    };
    let mut mounts = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        let key = format!("The mount at {}", mount.destination().display());
        let (kind, source) = if is_bind(mount) {
            let name = files.add(&key, mount, bind_source(mount, bundle))?;
            ("bind", Some(PathBuf::from(name)))
        } else {
            let kind = mount.typ().as_deref().unwrap_or_default();
            let reason = format!("the guest has no file system of type {kind:?}");
            refuse(!GUEST_MOUNTS.contains(&kind), &key, &reason)?;
            (kind, mount.source().clone())
        };
        refuse(
            some(mount.uid_mappings()) || some(mount.gid_mappings()),
            &key,
            "id-mapped mounts are not passed to the guest yet",
        )?;
        let mut guest = Mount::default();
        guest
            .set_destination(mount.destination().clone())
            .set_typ(Some(kind.to_owned()))
            .set_source(source)
            .set_options(mount.options().clone());
        mounts.push(guest);
    }
    Ok((mounts, files.listed))
}

/// The files found so far.
struct Files<'a> {
    known: &'a BTreeMap<PathBuf, u64>,
    listed: Vec<HostFile>,
    size: u64,
}

impl Files<'_> {
    /// Lists the file at `source`; answers its name.
    fn add(&mut self, key: &str, mount: &Mount, source: PathBuf) -> Result<String, Error> {
        let from = source.display();
        let Some(size) = self.known.get(&source) else {
            let reason = format!("the host's {from} cannot be shared with the guest yet");
            refuse(true, key, &reason)?;
            return Ok(String::new());
        };
        let engines = ENGINE_FILES
            .iter()
            .any(|path| mount.destination() == Path::new(path));
        let reason = format!(
            "the host's {from} would not have what the container writes; expected it read-only"
        );
        refuse(!engines && !is_read_only(mount), key, &reason)?;
        self.size = self.size.saturating_add(*size);
        let reason = format!(
            "with the {size} bytes of {from} the container's files are more than {FILES_MAX} bytes"
        );
        refuse(self.size > FILES_MAX, key, &reason)?;
        let name = format!("{FILE_PREFIX}{}", self.listed.len());
        self.listed.push(HostFile {
            name: name.clone(),
            source,
        });
        Ok(name)
    }
}

fn options(mount: &Mount) -> impl DoubleEndedIterator<Item = &str> {
    mount.options().iter().flatten().map(String::as_str)
}

fn is_bind(mount: &Mount) -> bool {
    let bind = |word: &str| matches!(word, "bind" | "rbind");
    mount.typ().as_deref().is_some_and(bind) || options(mount).any(bind)
}

/// The last word on it counts.
fn is_read_only(mount: &Mount) -> bool {
    options(mount)
        .rfind(|option| matches!(*option, "ro" | "rro" | "rw" | "rrw"))
        .is_some_and(|option| option.ends_with("ro"))
}

/// Relative to the bundle, as the specification has it.
fn bind_source(mount: &Mount, bundle: &Path) -> PathBuf {
    bundle.join(mount.source().as_deref().unwrap_or_else(|| Path::new("")))
}
