//! What containers leave on a host: taken before and after, the two must be the same.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::bundle::CGROUP;

/// Everything that could be left, each in one line that names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traces(BTreeSet<String>);

/// Folders whose contents count. What is cached on purpose is not among them.
const FOLDERS: &[&str] = &[
    "/run/supermachine",
    "/var/lib/supermachine/writable",
    "/run/containerd/s",
    "/run/containerd/fifo",
    "/run/containerd/io.containerd.runtime.v2.task",
];

/// Images of layers stay there on purpose; locks, and what was being made under one, don't.
const IMAGES: &str = "/var/lib/supermachine/images";

/// Where files without a name are, for as long as a process holds them.
const DATA: &str = "/var/lib/supermachine/";

const CGROUPS: &str = "/sys/fs/cgroup";

impl Traces {
    /// Looks at the host. `state` are more folders whose contents count.
    ///
    /// # Errors
    /// `/proc` can't be read.
    pub fn take(state: &[&Path]) -> Result<Self> {
        let mut found = BTreeSet::new();
        processes(&mut found)?;
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            // Fields: id, parent, device, root, mount point (proc(5)).
            if let Some(point) = line.split(' ').nth(4) {
                found.insert(format!("mount {point}"));
            }
        }
        for line in fs::read_to_string("/proc/net/unix")?.lines().skip(1) {
            // A path is the eighth field; of connections, which come and go, it is the server's.
            if let Some(path) = line.split_whitespace().nth(7)
                && ["supermachine", "/containerd/s/"]
                    .iter()
                    .any(|part| path.contains(part))
            {
                found.insert(format!("socket {path}"));
            }
        }
        for folder in FOLDERS.iter().map(Path::new).chain(state.iter().copied()) {
            files(folder, &mut found);
        }
        locks(&mut found);
        directories(Path::new(CGROUPS), &mut found);
        for device in fs::read_dir("/sys/block")?.flatten() {
            if device.path().join("loop/backing_file").exists() {
                found.insert(format!("loop device {}", device.file_name().display()));
            }
        }
        Ok(Self(found))
    }

    /// What is here and was not there.
    pub fn since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

impl fmt::Display for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|trace| writeln!(f, "{trace}"))
    }
}

/// Shims and VMMs, zombies included.
fn processes(found: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // A process may end while it is looked at.
        let Ok(comm) = fs::read_to_string(entry.path().join("comm")) else {
            continue;
        };
        let comm = comm.trim();
        if ["containerd-shim", "supermachine", "exe", "mkfs."]
            .iter()
            .any(|part| comm.starts_with(part))
        {
            found.insert(format!("process {pid} {comm}"));
        }
        // A process whose files can't be listed is another user's, or gone.
        for file in fs::read_dir(entry.path().join("fd")).into_iter().flatten() {
            let Ok(link) = file.and_then(|file| fs::read_link(file.path())) else {
                continue;
            };
            let link = link.to_string_lossy();
            if link.starts_with(DATA) && link.ends_with(" (deleted)") {
                found.insert(format!(
                    "file without a name {link} of process {pid} {comm}"
                ));
            }
        }
    }
    Ok(())
}

fn locks(found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(IMAGES).into_iter().flatten().flatten() {
        let path = entry.path();
        if path
            .extension()
            .is_some_and(|is| is == "lock" || is == "new")
        {
            found.insert(format!("file {}", path.display()));
        }
    }
}

/// Cgroups are directories, in each hierarchy.
fn directories(folder: &Path, found: &mut BTreeSet<String>) {
    let mut left = vec![folder.to_owned()];
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name() != CGROUP {
                    found.insert(format!("cgroup {}", entry.path().display()));
                }
                left.push(entry.path());
            }
        }
    }
}

fn files(folder: &Path, found: &mut BTreeSet<String>) {
    let mut left: Vec<PathBuf> = vec![folder.to_owned()];
    while let Some(folder) = left.pop() {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries.flatten() {
            found.insert(format!("file {}", entry.path().display()));
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                left.push(entry.path());
            }
        }
    }
}

/// Open descriptors of a process.
///
/// # Errors
/// The process is gone, or another user's.
pub fn open_files(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}
