//! The process of a machine, seen from the host while its container runs: what it has left, and
//! what it hasn't. That each denied thing is denied is tried out by the tests of the VMM
//! (`vmm/tests/control/denied.rs`).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::BUSYBOX;
use supermachine_tests::program::Program;

use crate::support::{World, equal};

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("confinement::of_a_machine_that_runs", of_a_machine),
        world.vm_test("confinement::check_tells_the_layers", check_tells),
    ]
}

/// One container for all, as each costs a boot.
fn of_a_machine(world: &World) -> Result<()> {
    let container = world.host.container(BUSYBOX).detach(&["sleep", "1000"])?;
    // A stream that comes and goes, so that files have been passed and closed.
    container.exec(&["true"])?.success()?;
    let task = world.host.task(container.id())?;
    let (pid, _) = task.context("no task")?;
    let process = Process::of(pid);
    let result = process
        .privileges()
        .and_then(|()| process.every_thread_is_filtered())
        .and_then(|()| process.namespaces())
        .and_then(|()| process.root())
        .and_then(|()| process.limits())
        .and_then(|()| process.cgroup(container.id()))
        .and_then(|()| process.files())
        .and_then(|()| process.network(world))
        .and_then(|()| process.parent());
    container.kill("KILL")?;
    equal(container.end()?, 137)?;
    result
}

struct Process {
    pid: u32,
    directory: PathBuf,
}

impl Process {
    fn of(pid: u32) -> Self {
        Self {
            pid,
            directory: PathBuf::from(format!("/proc/{pid}")),
        }
    }

    fn privileges(&self) -> Result<()> {
        equal(field(&self.directory, "NoNewPrivs")?.as_str(), "1")?;
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            equal(field(&self.directory, set)?.as_str(), "0000000000000000").context(set)?;
        }
        // [jail] first_id and the process id.
        let id = (0x7000_0000 + self.pid).to_string();
        for ids in ["Uid", "Gid"] {
            let found = field(&self.directory, ids)?;
            equal(found.split_whitespace().collect(), vec![id.as_str(); 4]).context(ids)?;
        }
        equal(field(&self.directory, "Groups")?.as_str(), "")
    }

    fn every_thread_is_filtered(&self) -> Result<()> {
        let mut names = BTreeSet::new();
        for thread in fs::read_dir(self.directory.join("task"))? {
            let thread = thread?.path();
            let name = fs::read_to_string(thread.join("comm"))?.trim().to_owned();
            equal(field(&thread, "Seccomp")?.as_str(), "2").context(name.clone())?;
            equal(field(&thread, "CapEff")?.as_str(), "0000000000000000").context(name.clone())?;
            // The process's and the thread's own; what the kernel itself started has no own.
            let filters: u32 = field(&thread, "Seccomp_filters")?.parse()?;
            let expected = if name.starts_with("kvm-") { 1 } else { 2 };
            ensure!(filters >= expected, "thread {name} has {filters} filters");
            names.insert(name);
        }
        for kind in ["control-read", "devices", "block0", "vcpu0"] {
            ensure!(names.contains(kind), "no thread {kind} among {names:?}");
        }
        Ok(())
    }

    fn namespaces(&self) -> Result<()> {
        for name in ["user", "pid", "mnt", "net", "ipc", "uts", "cgroup"] {
            let theirs = fs::read_link(self.directory.join("ns").join(name))?;
            let ours = fs::read_link(Path::new("/proc/self/ns").join(name))?;
            ensure!(theirs != ours, "namespace {name} is the host's");
        }
        let pids = field(&self.directory, "NSpid")?;
        equal(pids.split_whitespace().last(), Some("1"))
    }

    fn root(&self) -> Result<()> {
        let entries = fs::read_dir(self.directory.join("root"))?.count();
        equal(entries, 0).context("entries of the root directory")?;
        let mounts = fs::read_to_string(self.directory.join("mountinfo"))?;
        equal(mounts.lines().count(), 1).with_context(|| mounts.clone())?;
        ensure!(mounts.contains(" / / ro,nosuid,nodev,noexec"), "{mounts}");
        let environment = fs::read(self.directory.join("environ"))?;
        ensure!(environment.iter().all(|byte| *byte == 0), "an environment");
        Ok(())
    }

    /// ctr names a cgroup like the container.
    fn cgroup(&self, id: &str) -> Result<()> {
        let found = fs::read_to_string(self.directory.join("cgroup"))?;
        ensure!(found.contains(id), "{found} is not the cgroup of {id}");
        Ok(())
    }

    fn limits(&self) -> Result<()> {
        for (limit, most) in [
            ("Max core file size", 0),
            ("Max open files", 4096),
            ("Max processes", 512),
            ("Max locked memory", 0),
        ] {
            let found = hard_limit(&self.directory, limit)?;
            ensure!(found <= most, "{limit}: {found}");
        }
        Ok(())
    }

    /// Only what a VM is made of, and nothing that another program would inherit.
    fn files(&self) -> Result<()> {
        for file in fs::read_dir(self.directory.join("fd"))? {
            let file = file?.path();
            let Ok(link) = fs::read_link(&file) else {
                // Closed since.
                continue;
            };
            let link = link.to_string_lossy().into_owned();
            let known = ["socket:", "pipe:", "anon_inode:"]
                .iter()
                .any(|kind| link.starts_with(kind))
                || ["/dev/null", "/dev/kvm"].contains(&link.as_str())
                // Kernel, initramfs, images of layers, the writable disk, containerd's fifos.
                || fs::metadata(&file).is_ok_and(|file| file.is_file())
                || link.contains("fifo");
            ensure!(known, "descriptor of {link}");
        }
        Ok(())
    }

    /// Nothing is up in its network, and root of the host may join it, as hooks do.
    fn network(&self, world: &World) -> Result<()> {
        let pid = self.pid.to_string();
        let mut command = Command::new("nsenter");
        command.args(["--net", "--target", &pid, "cat", "/proc/net/dev"]);
        let devices = Program::run(command, world.host.deadline)?.success()?;
        let names: Vec<_> = devices
            .lines()
            .filter_map(|line| Some(line.split_once(':')?.0.trim()))
            .collect();
        equal(names, vec!["lo"])?;
        // An interface that is up has local routes.
        let mut routes = Command::new("nsenter");
        routes.args(["--net", "--target", &pid, "cat", "/proc/net/fib_trie"]);
        equal(
            Program::run(routes, world.host.deadline)?
                .success()?
                .as_str(),
            "",
        )
    }

    /// The shim's memory doesn't end up in a file either.
    fn parent(&self) -> Result<()> {
        let parent = field(&self.directory, "PPid")?;
        let shim = PathBuf::from(format!("/proc/{parent}"));
        equal(hard_limit(&shim, "Max core file size")?, 0)
    }
}

/// A field of a process's or a thread's status.
fn field(directory: &Path, name: &str) -> Result<String> {
    let status = fs::read_to_string(directory.join("status"))?;
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(|value| value.trim().to_owned())
        .with_context(|| format!("no field {name} in\n{status}"))
}

fn hard_limit(directory: &Path, name: &str) -> Result<u64> {
    let limits = fs::read_to_string(directory.join("limits"))?;
    let line = limits.lines().find_map(|line| line.strip_prefix(name));
    let hard = line.and_then(|line| line.split_whitespace().nth(1));
    match hard.with_context(|| format!("no {name} in\n{limits}"))? {
        "unlimited" => Ok(u64::MAX),
        number => Ok(number.parse()?),
    }
}

/// The command starts such a process and lists each layer.
fn check_tells(world: &World) -> Result<()> {
    let mut command = Command::new("supermachine");
    command.arg("check");
    let report = Program::run(command, world.host.deadline)?.success()?;
    for layer in ["ids", "user", "pid", "root", "net", "ipc", "rules", "calls"] {
        let line = format!("ok    jail: {layer}");
        ensure!(report.contains(&line), "{line:?} is not in\n{report}");
    }
    Ok(())
}
