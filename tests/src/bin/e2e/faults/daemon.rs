//! containerd is killed at each step of a container's life, and started again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use supermachine_tests::containerd::Containerd;
use supermachine_tests::ctr::Ctr;
use supermachine_tests::host::{Host, unique};
use supermachine_tests::program::Program;
use supermachine_tests::shim::{recorded_vmm, state_directory};
use supermachine_tests::{BUSYBOX, until};

use super::deaths::configuration;
use super::{Step, ended, shim};
use crate::leftovers::{freeze, leaves_nothing, parent, signal};
use crate::support::{World, equal};

pub(super) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("faults::containerd_killed_in_create", in_create),
        world.vm_test("faults::containerd_killed_later", later),
        world.vm_test("faults::forgotten_after_delete", forgotten),
    ]
}

/// A containerd of the test's own, and the way to it.
fn start(world: &World, env: &[(&str, &str)]) -> Result<(Containerd, Host)> {
    let containerd = Containerd::start(Path::new("containerd"), env)?;
    let host = Host {
        ctr: Ctr::new("ctr", containerd.address()),
        containerd: None,
        ..world.host.clone()
    };
    host.ctr.import(&world.images.join("busybox.tar"))?;
    Ok((containerd, host))
}

/// `ctr run` of a container that goes on by itself.
fn run(host: &Host, id: &str, program: &[&str]) -> Command {
    let mut command = host.command(&["run", "--detach", "--null-io", "--runtime", &host.runtime]);
    command.args([BUSYBOX, id]).args(program);
    command
}

/// A container that was being created, and that nobody knows of any more.
fn in_create(world: &World) -> Result<()> {
    let config = configuration(world, Step::Create)?;
    let path = config.config.context("no configuration")?;
    let text = path.to_str().context("a path")?;
    leaves_nothing(world, || {
        let (mut containerd, host) = start(world, &[("SUPERMACHINE_CONFIG", text)])?;
        let id = unique("e2e");
        let running = Program::start(run(&host, &id, &["true"]), host.deadline)?;
        let state = state_directory(Some(&path))?;
        until("a VMM process", host.deadline, || {
            Ok(recorded_vmm(&state, "default", &id)?.is_some())
        })?;
        containerd.crash()?;
        ensure!(!running.finish()?.status.success(), "ctr had an answer");
        containerd.restart()?;
        until("the container to go", host.deadline, || {
            Ok(recorded_vmm(&state, "default", &id)?.is_none())
        })?;
        equal(host.status(&id)?, None)?;
        host.ctr(&["containers", "delete", &id])?
            .success()
            .map(drop)
    })
}

/// A containerd that was killed while its shim was at work finds the task again, with its streams and
/// its end.
fn later(world: &World) -> Result<()> {
    leaves_nothing(world, || {
        let (mut containerd, host) = start(world, &[])?;
        [Step::Start, Step::Exec, Step::Kill, Step::Delete]
            .into_iter()
            .try_for_each(|step| {
                interrupted(&mut containerd, &host, step).with_context(|| format!("{step:?}"))
            })
    })
}

/// A shim whose task is deleted ends by itself, although nobody asks for that.
fn forgotten(world: &World) -> Result<()> {
    leaves_nothing(world, || {
        let (shim, bundle) = shim(world, &world.shim()?, &["true"])?;
        shim.create(&bundle)?;
        shim.start_task()?;
        ended(&shim, 0)?;
        let process = PathBuf::from(format!("/proc/{}", shim.pid()?));
        until("the shim to end", world.host.deadline, || {
            Ok(!process.exists())
        })
    })
}

fn interrupted(containerd: &mut Containerd, host: &Host, step: Step) -> Result<()> {
    let id = unique("e2e");
    let program: &[&str] = match step {
        Step::Delete => &["true"],
        _ => &["sleep", "1000"],
    };
    let state = state_directory(None)?;
    let vmm = || recorded_vmm(&state, "default", &id)?.context("no VMM process");
    let call = if step == Step::Start {
        // ctr writes the pid down between the two calls.
        let pid_file = containerd.state().join(&id);
        let mut command = host.command(&["run", "--detach", "--null-io"]);
        command.arg("--pid-file").arg(&pid_file);
        command.args(["--runtime", &host.runtime, BUSYBOX, &id]);
        let call = Program::start(command_with(command, program), host.deadline)?;
        until("a task", host.deadline, || Ok(pid_file.exists()))?;
        freeze(vmm()?)?;
        call
    } else {
        Program::run(run(host, &id, program), host.deadline)?.success()?;
        if step == Step::Delete {
            until("its end", host.deadline, || {
                Ok(host.status(&id)?.as_deref() == Some("STOPPED"))
            })?;
        }
        let vmm = vmm()?;
        freeze(vmm)?;
        let args: &[&str] = match step {
            Step::Exec => &["tasks", "exec", "--exec-id", "exec", &id, "sleep", "1000"],
            Step::Kill => &["tasks", "kill", "--signal", "KILL", &id],
            _ => &["tasks", "delete", &id],
        };
        let shim = parent(vmm)?;
        let before = waits(shim)?;
        let call = Program::start(host.command(args), host.deadline)?;
        // It is asked for the task's state first: heard of the call itself it has when it waits again.
        let (mut last, mut since) = (before, Instant::now());
        until("the shim to wait for its guest", host.deadline, || {
            // One that has deleted its task is gone.
            let Ok(now) = waits(shim) else {
                return Ok(true);
            };
            if now != last {
                (last, since) = (now, Instant::now());
            }
            Ok(now > before && since.elapsed() > Duration::from_secs(1))
        })?;
        call
    };
    let vmm = recorded_vmm(&state, "default", &id)?;
    containerd.crash()?;
    // Whatever it was told.
    call.finish()?;
    if let Some(vmm) = vmm {
        // It may have been killed meanwhile.
        let _ = signal(vmm, Signal::SIGCONT);
    }
    containerd.restart()?;
    // It knows what there is, and can be asked again for what was not done: the call may have been
    // cut off on its way to the shim.
    let status = || host.status(&id);
    if step == Step::Delete {
        until("the task to go", host.deadline, || {
            let there = status()?.is_some();
            if there {
                // In vain while the first request is at work.
                host.ctr(&["tasks", "delete", &id])?;
            }
            Ok(!there)
        })?;
    } else {
        let found = status()?;
        ensure!(found.is_some(), "containerd has forgotten its task");
        if matches!(step, Step::Start | Step::Exec) && found.as_deref() == Some("RUNNING") {
            let exec = host.ctr(&["tasks", "exec", "--exec-id", "more", &id, "echo", "x"])?;
            equal(exec.success()?.as_str(), "x")?;
        }
        until("its end", host.deadline, || {
            let ended = status()?.as_deref() == Some("STOPPED");
            if !ended {
                host.ctr(&["tasks", "kill", "--signal", "KILL", &id])?;
            }
            Ok(ended)
        })?;
        let delete = host.ctr(&["tasks", "delete", &id])?;
        let warning = delete.errors();
        delete.success()?;
        ensure!(
            warning.contains("exit code 137"),
            "not its status: {warning}"
        );
    }
    host.ctr(&["containers", "delete", &id])?
        .success()
        .map(drop)
}

fn command_with(mut command: Command, program: &[&str]) -> Command {
    command.args(program);
    command
}

/// How often threads of a process have gone back to waiting: an idle shim does nothing by itself, so
/// one more means that it has heard something.
fn waits(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        sum += line
            .context("no count of switches")?
            .trim()
            .parse::<u64>()?;
    }
    Ok(sum)
}
