//! Nothing is left on the host after delete.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use supermachine_tests::traces::{Traces, open_files};
use supermachine_tests::{BUSYBOX, until};

use crate::support::{World, equal};

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.test("leftovers::of_a_run", of_a_run),
        world.test("leftovers::of_a_killed_one_with_execs", of_a_killed_one),
        world.vm_test("leftovers::when_the_vmm_is_killed", vmm_killed),
        // runc's shim leaves its socket behind.
        world.vm_test("leftovers::when_the_shim_is_killed", shim_killed),
    ]
}

/// Takes traces, does `work`, and waits until there are no others.
pub(crate) fn leaves_nothing(world: &World, work: impl FnOnce() -> Result<()>) -> Result<()> {
    // The first container of a host makes what later ones share, such as images of layers.
    static SHARED: OnceLock<()> = OnceLock::new();
    if SHARED.get().is_none() {
        world.host.sh("true")?.success()?;
        SHARED.get_or_init(|| ());
    }
    let take = || take(world);
    let before = take()?;
    let files_before = containerd_files(world)?;
    work()?;
    // A shim ends a moment after its last answer.
    let mut left = Vec::new();
    let gone = until("all traces to go", world.host.deadline / 4, || {
        left = take()?.since(&before);
        Ok(left.is_empty())
    });
    ensure!(gone.is_ok(), "left behind:\n{}", left.join("\n"));
    until(
        "containerd's files to close",
        world.host.deadline / 4,
        || Ok(containerd_files(world)? <= files_before),
    )
}

/// What there is now.
pub(crate) fn take(world: &World) -> Result<Traces> {
    let containerd = world.host.containerd.as_deref();
    let state: Option<PathBuf> = containerd.map(|containerd| containerd.state());
    Traces::take(&state.iter().map(PathBuf::as_path).collect::<Vec<&Path>>())
}

pub(crate) fn containerd_files(world: &World) -> Result<usize> {
    open_files(world.host.ctr.server()?)
}

fn of_a_run(world: &World) -> Result<()> {
    leaves_nothing(world, || {
        equal(
            world
                .host
                .sh("echo x > /file; cat /file")?
                .success()?
                .as_str(),
            "x",
        )
    })
}

fn of_a_killed_one(world: &World) -> Result<()> {
    leaves_nothing(world, || {
        let container = world.host.container(BUSYBOX).detach(&["sleep", "1000"])?;
        for _ in 0..3 {
            container.exec(&["true"])?.success()?;
        }
        container.kill("KILL")?;
        equal(container.end()?, 137)
    })
}

/// The pid containerd is told is the VMM's.
fn vmm_killed(world: &World) -> Result<()> {
    leaves_nothing(world, || {
        let container = world.host.container(BUSYBOX).detach(&["sleep", "1000"])?;
        let pid = pid(world, container.id())?;
        kill_9(pid)?;
        equal(container.end()?, 137)
    })
}

fn shim_killed(world: &World) -> Result<()> {
    leaves_nothing(world, || {
        let container = world.host.container(BUSYBOX).detach(&["sleep", "1000"])?;
        kill_9(parent(pid(world, container.id())?)?)?;
        // containerd notices, runs the shim's delete, and forgets the task.
        until("the task to go", world.host.deadline, || {
            Ok(world
                .host
                .status(container.id())?
                .is_none_or(|status| status != "RUNNING"))
        })?;
        drop(container);
        Ok(())
    })
}

fn pid(world: &World, id: &str) -> Result<u32> {
    let task = world.host.task(id)?;
    task.map(|(pid, _)| pid)
        .ok_or_else(|| anyhow::anyhow!("no task {id}"))
}

/// The process that started this one: the shim of a VMM.
pub(crate) fn parent(pid: u32) -> Result<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    Ok(parent.context("no parent")?.trim().parse()?)
}

pub(crate) fn kill_9(pid: u32) -> Result<()> {
    signal(pid, Signal::SIGKILL)
}

/// Stops a process: once this returns, it does nothing more until it is killed.
pub(crate) fn freeze(pid: u32) -> Result<()> {
    signal(pid, Signal::SIGSTOP)?;
    // Each thread stops when it comes by: a vCPU may be in the guest for a while yet.
    let tasks = PathBuf::from(format!("/proc/{pid}/task"));
    until("a process to stop", Duration::from_secs(30), || {
        for task in std::fs::read_dir(&tasks)? {
            let stat = std::fs::read_to_string(task?.path().join("stat"))?;
            // proc(5): the state comes after the name, which is in parentheses.
            let (name, state) = stat.rsplit_once(") ").context("a task's state")?;
            // What KVM itself started takes no signals.
            if !state.starts_with('T') && !name.contains("(kvm-") {
                return Ok(false);
            }
        }
        Ok(true)
    })
}

pub(crate) fn signal(pid: u32, signal: Signal) -> Result<()> {
    // 0 and what is below are no processes, and more than one.
    ensure!(pid > 1, "process {pid}");
    kill(Pid::from_raw(i32::try_from(pid)?), signal).with_context(|| format!("process {pid}"))
}
