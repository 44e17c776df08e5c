//! containerd is killed while it creates a container, and started again.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::containerd::Containerd;
use supermachine_tests::ctr::Ctr;
use supermachine_tests::host::{Host, unique};
use supermachine_tests::program::Program;
use supermachine_tests::shim::{recorded_vmm, state_directory};
use supermachine_tests::{BUSYBOX, until};

use super::Step;
use super::deaths::configuration;
use crate::leftovers::leaves_nothing;
use crate::support::{World, equal};

pub(super) fn tests(world: &World) -> Vec<Trial> {
    vec![world.vm_test("faults::containerd_killed_in_create", in_create)]
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

/// A container that was being created, and that nobody knows of any more.
fn in_create(world: &World) -> Result<()> {
    let config = configuration(world, Step::Create)?;
    let path = config.config.context("no configuration")?;
    let text = path.to_str().context("a path")?;
    leaves_nothing(world, || {
        let (mut containerd, host) = start(world, &[("SUPERMACHINE_CONFIG", text)])?;
        let id = unique("e2e");
        let run = ["run", "--detach", "--null-io", "--runtime", &host.runtime];
        let mut command = host.command(&run);
        command.args([BUSYBOX, &id, "true"]);
        let running = Program::start(command, host.deadline)?;
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
