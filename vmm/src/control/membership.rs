//! Puts a VMM process into its cgroups while it starts.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use super::spec::SpawnConfig;
use crate::sys::threads;

/// No process has this pid: `PID_MAX_LIMIT` of linux/threads.h is far below.
const NOBODY: i32 = i32::MAX;

/// The file of a cgroup's directory that moves processes there.
const PROCS: &str = "cgroup.procs";

/// A file through which processes are moved, on hosts with cgroup v2 alone.
const ROOT_PROCS: &str = "/sys/fs/cgroup/cgroup.procs";

/// Has the wait begin that is told of at [`Joining`], whatever cgroup is to come, and waits. Until
/// about as much time has passed again, nobody has to wait for it.
pub(super) fn begin_wait() {
    // Made nowhere: where there is only cgroup v1, a file here would be one of a tmpfs.
    let Ok(mut procs) = File::options().write(true).open(ROOT_PROCS) else {
        return;
    };
    // Refused, with ESRCH, after the wait.
    let _ = procs.write_all(NOBODY.to_string().as_bytes());
}

/// A thread that begins what KVM waits for, and moves a process that was not born in its cgroups.
///
/// KVM makes a VM after a grace period (RCU) of some 10 ms, unless one has just been waited for; to
/// move a process is to wait for one as well. So the thread has it begin before there is a process,
/// by moving none: it is over when the process asks for its VM, or soon after.
pub(super) struct Joining {
    pid: Sender<u32>,
    thread: JoinHandle<()>,
}

impl Joining {
    /// None where there is no cgroup to join.
    pub(super) fn begin(config: &SpawnConfig) -> io::Result<Option<Self>> {
        if config.cgroups.is_empty() {
            return Ok(None);
        }
        let (pid, given) = mpsc::channel();
        let name = config.name.clone();
        let files: Vec<_> = config.cgroups.iter().map(|dir| dir.join(PROCS)).collect();
        let thread =
            threads::builder("cgroup").spawn(move || put_into_cgroups(&name, &files, &given))?;
        Ok(Some(Self { pid, thread }))
    }

    /// Has the process moved; the thread ends when it is.
    pub(super) fn put(self, pid: u32) -> JoinHandle<()> {
        // It has ended if it panicked, which the panic hook told.
        let _ = self.pid.send(pid);
        self.thread
    }
}

fn put_into_cgroups(name: &str, files: &[PathBuf], given: &Receiver<u32>) {
    for path in files {
        // Refused, with ESRCH if it is a cgroup's: after the wait.
        let _ = fs::write(path, NOBODY.to_string());
    }
    // Nothing comes for one that was born there, or not at all.
    let Ok(pid) = given.recv() else { return };
    for path in files {
        if let Err(error) = fs::write(path, pid.to_string()) {
            tracing::warn!(
                vm = name, cgroup = %path.display(), pid, %error,
                "cannot put the VMM process into its cgroup"
            );
        }
    }
}
