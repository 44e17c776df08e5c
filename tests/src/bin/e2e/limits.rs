//! How large a container's machine is.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::BUSYBOX;

use crate::support::{World, equal};

const MIB: u64 = 1 << 20;

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("limits::vcpus", vcpus),
        world.vm_test("limits::memory_of_the_machine", memory_of_the_machine),
        world.test("limits::memory_is_enforced", memory_is_enforced),
    ]
}

fn vcpus(world: &World) -> Result<()> {
    let count = |options: &[&str]| {
        world
            .host
            .container(BUSYBOX)
            .with(options)
            .run(&["nproc"])?
            .success()
    };
    equal(count(&[])?.as_str(), "1")?;
    if std::thread::available_parallelism()?.get() > 1 {
        equal(count(&["--cpus", "2"])?.as_str(), "2")?;
    }
    Ok(())
}

fn memory_of_the_machine(world: &World) -> Result<()> {
    let container = world
        .host
        .container(BUSYBOX)
        .with(&["--memory-limit", "134217728"]);
    let text = container
        .run(&["grep", "MemTotal", "/proc/meminfo"])?
        .success()?;
    let kib: u64 = text
        .split_whitespace()
        .nth(1)
        .context("no MemTotal")?
        .parse()?;
    let total = kib * 1024;
    // What the container may have and what its kernel takes; far from the host's and the default.
    ensure!(
        (128 * MIB..=288 * MIB).contains(&total),
        "the guest has {} MiB for a limit of 128 MiB",
        total / MIB
    );
    Ok(())
}

fn memory_is_enforced(world: &World) -> Result<()> {
    // One buffer of twice the limit, which dd fills at once. A slow growth would show how long a
    // kernel goes on dropping pages of programs before it kills, not that it keeps the limit.
    let container = world
        .host
        .container(BUSYBOX)
        .with(&["--memory-limit", "33554432"]);
    let script = "dd if=/dev/zero of=/dev/null bs=64M count=1 2>/dev/null; echo \"dd: $?\"";
    let finished = container.run(&["sh", "-c", script])?;
    equal(finished.text().as_str(), "dd: 137\n")
}
