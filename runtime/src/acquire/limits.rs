//! Where the host accounts for the machine: the cgroup containerd chose for the container.
//!
//! The machine's process alone is put there. Its own limits are not set: the container's are
//! enforced by the guest's cgroup, and the machine's memory is bounded by its size. Only a CPU set
//! is, as it names the host's processors.

use std::io;
use std::path::{Path, PathBuf};

use crate::ledger::{Entry, Error, Ledger};

/// The container's directory in each cgroup hierarchy of the host.
#[derive(Debug)]
pub struct HostCgroup {
    directories: Vec<PathBuf>,
}

/// Takes the id of a process that is to be in the cgroup.
const PROCS: &str = "cgroup.procs";

/// A mounted cgroup hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    pub(crate) root: PathBuf,
    pub(crate) kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    V2,
    V1,
    V1Cpuset,
}

impl HostCgroup {
    /// Makes the cgroup `path`, relative to the hierarchies' roots. A hierarchy that can't be
    /// written to is passed over with a warning: the machine then runs unaccounted there.
    ///
    /// # Errors
    /// The ledger can't be written.
    pub fn create(path: &Path, cpuset: &str, ledger: &mut Ledger) -> Result<Option<Self>, Error> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self::create_in(&hierarchies(&mounts), path, cpuset, ledger)
    }

    fn create_in(
        hierarchies: &[Hierarchy],
        path: &Path,
        cpuset: &str,
        ledger: &mut Ledger,
    ) -> Result<Option<Self>, Error> {
        let mut directories = Vec::new();
        for hierarchy in hierarchies {
            let directory = hierarchy.root.join(path);
            ledger.record(Entry::Cgroup {
                path: directory.clone(),
            })?;
            match make(hierarchy, path, cpuset) {
                Ok(()) => directories.push(directory),
                Err(error) => tracing::warn!(
                    cgroup = %directory.display(), %error,
                    "Cannot make the cgroup; the machine is not accounted for there"
                ),
            }
        }
        Ok((!directories.is_empty()).then_some(Self { directories }))
    }

    /// Puts process `pid` into the cgroup, in every hierarchy. Where that fails it is logged, and
    /// the process stays where it was.
    pub fn add(&self, pid: u32) {
        for directory in &self.directories {
            if let Err(error) = std::fs::write(directory.join(PROCS), pid.to_string()) {
                tracing::warn!(
                    cgroup = %directory.display(), pid, %error,
                    "Cannot put the machine into its cgroup"
                );
            }
        }
    }

    /// Lets what is in the cgroup run on these of the host's processors alone.
    ///
    /// # Errors
    /// No hierarchy has CPU sets, or the kernel refuses this one.
    pub fn set_cpuset(&self, cpuset: &str) -> io::Result<()> {
        let files = self.directories.iter().map(|dir| dir.join("cpuset.cpus"));
        let mut files = files.filter(|file| file.exists()).peekable();
        if files.peek().is_none() {
            return Err(io::Error::other("the host's cgroups have no CPU sets"));
        }
        files.try_for_each(|file| std::fs::write(file, cpuset))
    }

    /// The cgroup's directories, one in each hierarchy.
    pub fn directories(&self) -> &[PathBuf] {
        &self.directories
    }
}

/// The hierarchies containers are accounted in. Where `/sys/fs/cgroup` isn't cgroup v2 itself, a
/// v2 mount below it has no controllers and containerd uses v1.
pub(crate) fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let mut unified = None;
    let mut v1 = Vec::new();
    for line in mountinfo.lines() {
        // proc_pid_mountinfo(5): "… root mountpoint options … - type source super-options"
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let Some(root) = left.split(' ').nth(4).map(PathBuf::from) else {
            continue;
        };
        let mut right = right.split(' ');
        let kind = right.next().unwrap_or_default();
        let mut options = right.nth(1).unwrap_or_default().split(',');
        match kind {
            "cgroup2" if root == Path::new("/sys/fs/cgroup") => unified = Some(root),
            "cgroup" if options.clone().any(|option| option == "cpuset") => {
                v1.push(Hierarchy {
                    root,
                    kind: Kind::V1Cpuset,
                });
            }
            // A named hierarchy without controllers is systemd's own.
            "cgroup" if !options.any(|option| option.starts_with("name=")) => {
                v1.push(Hierarchy {
                    root,
                    kind: Kind::V1,
                });
            }
            _ => {}
        }
    }
    match unified {
        Some(root) => vec![Hierarchy {
            root,
            kind: Kind::V2,
        }],
        None => v1,
    }
}

fn make(hierarchy: &Hierarchy, path: &Path, cpuset: &str) -> io::Result<()> {
    let mut directory = hierarchy.root.clone();
    for part in path.components() {
        if hierarchy.kind == Kind::V2 {
            delegate(&directory);
        }
        let parent = directory.clone();
        directory.push(part);
        match std::fs::create_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        if hierarchy.kind == Kind::V1Cpuset {
            inherit_cpuset(&parent, &directory)?;
        }
    }
    if !cpuset.is_empty() && hierarchy.kind != Kind::V1 {
        std::fs::write(directory.join("cpuset.cpus"), cpuset)?;
    }
    Ok(())
}

/// Hands a cgroup v2's controllers down, one by one, as some may not be there to hand down.
fn delegate(directory: &Path) {
    for controller in ["cpuset", "cpu", "io", "memory", "pids"] {
        let control = directory.join("cgroup.subtree_control");
        if let Err(error) = std::fs::write(&control, format!("+{controller}")) {
            tracing::debug!(cgroup = %directory.display(), controller, %error, "Not handed down");
        }
    }
}

/// A new cpuset of cgroup v1 is empty, and takes no process until it isn't.
fn inherit_cpuset(parent: &Path, directory: &Path) -> io::Result<()> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let own = directory.join(name);
        if std::fs::read_to_string(&own)?.trim().is_empty() {
            std::fs::write(own, std::fs::read_to_string(parent.join(name))?.trim())?;
        }
    }
    Ok(())
}
