//! Containers' cgroups (cgroup v2), once libcontainer has made them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::libc::SIGKILL;
use nix::unistd::Pid;
use oci_spec::runtime::{Linux, LinuxDeviceCgroup, LinuxResources};
use supermachine_protocol::StatsResponse;

use crate::devices;
use crate::error::Error;
use crate::{identity, limits, stats, sys};

/// Where the guest's one hierarchy is mounted.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";
/// The cgroup that holds every container's own.
const PARENT: &str = "/containers";

/// One container's cgroup and all below it.
#[derive(Debug, Clone)]
pub(crate) struct Cgroup {
    directory: PathBuf,
}

impl Cgroup {
    /// The path by which an OCI config names the cgroup of `container_id`.
    pub(crate) fn config_path(container_id: &str) -> PathBuf {
        Path::new(PARENT).join(container_id)
    }

    pub(crate) fn of(container_id: &str) -> Self {
        Self {
            directory: PathBuf::from(format!("{ROOT}{PARENT}/{container_id}")),
        }
    }

    /// Every process in it.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let mut pids = Vec::new();
        for directory in self.tree() {
            let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            // 0 stands for processes of another pid namespace.
            pids.extend(
                text.lines()
                    .filter_map(|line| line.parse().ok())
                    .filter(|&pid: &u32| pid != 0),
            );
        }
        pids
    }

    /// Sends a signal to every process in it.
    pub(crate) fn signal(&self, signal: i32) {
        if signal == SIGKILL && fs::write(self.directory.join("cgroup.kill"), "1").is_ok() {
            return;
        }
        for pid in self.pids() {
            if let Ok(pid) = i32::try_from(pid) {
                // It may have exited meanwhile.
                let _ = sys::kill(Pid::from_raw(pid), signal);
            }
        }
    }

    /// Lets its processes use only the devices that `rules` allow, and those that runc always does.
    pub(crate) fn restrict_devices(&self, rules: &[LinuxDeviceCgroup]) -> Result<(), Error> {
        devices::enforce(rules, &self.directory)
            .map_err(Error::system("enforce linux.resources.devices"))
    }

    /// What is in use.
    pub(crate) fn stats(&self) -> StatsResponse {
        stats::read(&self.directory, identity::memory())
    }

    /// Changes limits; all that are named, or none.
    pub(crate) fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        limits::apply(&self.directory, resources)
    }

    /// File that changes when the kernel kills for want of memory.
    pub(crate) fn memory_events(&self) -> PathBuf {
        self.directory.join("memory.events")
    }

    /// Processes killed for want of memory so far.
    pub(crate) fn oom_kills(&self) -> u64 {
        fs::read_to_string(self.memory_events()).map_or(0, |text| {
            text.lines()
                .find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok())
                .unwrap_or(0)
        })
    }

    /// Kills what is left in it and waits for its end.
    pub(crate) async fn kill(&self) {
        self.signal(SIGKILL);
        self.emptied().await;
    }

    /// Kills what is left in it and removes it.
    pub(crate) async fn remove(&self) -> Result<(), Error> {
        if !self.directory.exists() {
            return Ok(());
        }
        self.kill().await;
        let mut tree = self.tree();
        // Children before their parents.
        tree.reverse();
        for directory in tree {
            match fs::remove_dir(&directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::file("remove", directory)(error));
                }
                _ => (),
            }
        }
        Ok(())
    }

    /// Waits until no process is left, at most for some seconds.
    async fn emptied(&self) {
        let events = self.directory.join("cgroup.events");
        let populated =
            || fs::read_to_string(&events).is_ok_and(|text| text.contains("populated 1"));
        let wait = async {
            let changes = crate::oom::Changes::of(&events);
            while populated() {
                match &changes {
                    Ok(changes) => changes.next().await,
                    Err(_) => return,
                }
            }
        };
        let _ = tokio::time::timeout(std::time::Duration::from_secs(5), wait).await;
    }

    /// The cgroup and all below it, parents first.
    fn tree(&self) -> Vec<PathBuf> {
        let mut tree = vec![self.directory.clone()];
        let mut next = 0;
        while let Some(directory) = tree.get(next) {
            let children = fs::read_dir(directory).into_iter().flatten().flatten();
            let children: Vec<_> = children
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path())
                .collect();
            tree.extend(children);
            next += 1;
        }
        tree
    }
}

/// Says "no swap" (a limit that includes as much as the memory's) in cgroup v2's own words:
/// libcontainer takes the 0 that is left for no limit.
pub(crate) fn forbid_swap(linux: &mut Linux) {
    let Some(resources) = linux.resources_mut() else {
        return;
    };
    let Some(memory) = resources.memory_mut() else {
        return;
    };
    if memory.limit().is_none_or(|limit| limit <= 0) || memory.swap() != memory.limit() {
        return;
    }
    memory.set_swap(None);
    let mut unified = resources.unified().clone().unwrap_or_default();
    unified
        .entry("memory.swap.max".to_owned())
        .or_insert_with(|| "0".to_owned());
    resources.set_unified(Some(unified));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn swap_of(memory: &str) -> (Option<i64>, Option<String>) {
        let config = format!(r#"{{"resources": {{"memory": {memory}}}}}"#);
        let mut linux: Linux = serde_json::from_str(&config).expect("JSON");
        forbid_swap(&mut linux);
        let resources = linux.resources().as_ref().expect("resources");
        let unified = resources.unified().as_ref();
        (
            resources.memory().and_then(|memory| memory.swap()),
            unified.and_then(|unified| unified.get("memory.swap.max").cloned()),
        )
    }

    #[test]
    fn no_swap_is_a_limit_of_nothing() {
        let none = swap_of(r#"{"limit": 4096, "swap": 4096}"#);
        assert_eq!(none, (None, Some("0".to_owned())));
        let some = swap_of(r#"{"limit": 4096, "swap": 8192}"#);
        assert_eq!(some, (Some(8192), None));
        let unlimited = swap_of(r#"{"limit": -1, "swap": -1}"#);
        assert_eq!(unlimited, (Some(-1), None));
    }
}
