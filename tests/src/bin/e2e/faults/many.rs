//! Many containers one after the other, and one whose output nobody reads.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::fifo::Fifo;
use supermachine_tests::shim::Shim;
use supermachine_tests::traces::open_files;
use supermachine_tests::{BUSYBOX, until};

use super::{EXEC, ended, process, shim};
use crate::bad::configured;
use crate::leftovers::{containerd_files, leaves_nothing, parent, take};
use crate::support::{World, equal};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

pub(super) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("faults::one_after_the_other", one_after_the_other),
        world.vm_test("faults::output_nobody_reads", output_nobody_reads),
    ]
}

/// What a container that lives on costs the host, in KiB and descriptors.
#[derive(Debug)]
struct Footprint {
    shim: u64,
    vmm: u64,
    shim_files: usize,
    vmm_files: usize,
    containerd_files: usize,
}

impl Footprint {
    fn take(world: &World, shim: u32, vmm: u32) -> Result<Self> {
        Ok(Self {
            shim: private(shim)?,
            vmm: private(vmm)?,
            shim_files: open_files(shim)?,
            vmm_files: open_files(vmm)?,
            containerd_files: containerd_files(world)?,
        })
    }
}

/// KiB of memory that a process has for itself in pages of the usual size, guest RAM left out: no
/// other mapping is as large.
fn private(pid: u32) -> Result<u64> {
    const GUEST: u64 = 32 * KIB;
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut size, mut sum) = (0, 0);
    for line in maps.lines() {
        if let Some(kib) = kib(line, "Size:")? {
            size = kib;
        } else if let Some(kib) = kib(line, "Anonymous:")?
            && size < GUEST
        {
            sum += kib;
        } else if let Some(kib) = kib(line, "AnonHugePages:")?
            && size < GUEST
        {
            // The kernel's choice, at a moment of its own: what it holds may be as small as before.
            sum -= kib;
        }
    }
    Ok(sum)
}

/// The number of a line `name 12 kB`.
fn kib(line: &str, name: &str) -> Result<Option<u64>> {
    let value = line.strip_prefix(name);
    let number = value.and_then(|value| value.split_whitespace().next());
    Ok(number.map(str::parse).transpose()?)
}

/// Containers come and go beside one that stays, which is used as often. After each the host is as
/// before; at the end shim and VMM of the one that stays are as large as they were.
fn one_after_the_other(world: &World) -> Result<()> {
    let runs = world.runs;
    leaves_nothing(world, || {
        let stays = world
            .host
            .container(BUSYBOX)
            .detach(&["sleep", "1000000"])?;
        let (vmm, _) = world.host.task(stays.id())?.context("no task")?;
        let shim = parent(vmm)?;
        // Buffers and pools have their size after a few.
        for _ in 0..3 {
            one(world, &stays)?;
        }
        let before = take(world)?;
        let first = Footprint::take(world, shim, vmm)?;
        for run in 0..runs {
            one(world, &stays)?;
            let mut left = Vec::new();
            let gone = until("all traces to go", world.host.deadline / 4, || {
                left = take(world)?.since(&before);
                Ok(left.is_empty())
            });
            ensure!(gone.is_ok(), "left by run {run}:\n{}", left.join("\n"));
        }
        // containerd closes a client's connection when it comes to it.
        let mut last = Footprint::take(world, shim, vmm)?;
        let closed = until("containerd's files", world.host.deadline / 4, || {
            last = Footprint::take(world, shim, vmm)?;
            Ok(last.containerd_files <= first.containerd_files)
        });
        eprintln!("{runs} runs: {first:?} became {last:?}");
        equal(last.shim_files, first.shim_files).context("files of the shim")?;
        equal(last.vmm_files, first.vmm_files).context("files of the VMM")?;
        ensure!(closed.is_ok(), "files of containerd: {first:?}, {last:?}");
        // 256 KiB are for what comes and goes.
        ensure!(
            last.shim <= first.shim + 256 && last.vmm <= first.vmm + 256,
            "memory, in KiB: {first:?}, {last:?}"
        );
        stays.kill("KILL")?;
        equal(stays.end()?, 137)
    })
}

fn one(world: &World, stays: &supermachine_tests::host::Detached) -> Result<()> {
    equal(world.host.sh("echo x")?.success()?.as_str(), "x")?;
    equal(stays.exec(&["echo", "y"])?.success()?.as_str(), "y")
}

/// Back-pressure: the container waits, and nobody stores what it writes.
fn output_nobody_reads(world: &World) -> Result<()> {
    let config = configured(world, &[("timeouts", "drain", "\"2s\"")])?;
    leaves_nothing(world, || {
        // Lines of 1 KiB; the number of those that have gone out is in /count.
        let script = "line=$(head -c 1023 /dev/zero | tr '\\000' x); n=0; \
                      while echo $line; do n=$((n+1)); echo $n > /count; done";
        let (shim, bundle) = shim(world, &config, &["sh", "-c", script])?;
        let mut fifo = Fifo::new(&bundle.dir.join("out"))?;
        let overlay = shim.overlay(&bundle)?;
        let vmm = shim.create_with(|request| {
            request.rootfs = vec![overlay];
            request.stdout = fifo.path.display().to_string();
        })?;
        shim.start_task()?;
        let count = bundle.dir.join("count");
        let mut stuck = 0;
        until("the container to wait", world.host.deadline, || {
            let (before, now) = (stuck, number(&shim, &count)?);
            stuck = now;
            Ok(now > 0 && now == before)
        })?;
        // The fifo's 64 KiB, and what pipes and rings in between hold.
        ensure!(stuck * KIB < MIB, "{stuck} KiB went nowhere");
        let size = private(vmm)?;
        for _ in 0..5 {
            equal(number(&shim, &count)?, stuck)?;
        }
        let grown = private(vmm)?.saturating_sub(size);
        ensure!(grown < 256, "the VMM grew by {grown} KiB");
        // It goes on as soon as somebody reads.
        for _ in 0..stuck {
            equal(fifo.line(world.host.deadline)?.len(), 1024)?;
        }
        until("the container to go on", world.host.deadline, || {
            Ok(number(&shim, &count)? > stuck)
        })?;
        // Its end is told, whoever has not read.
        shim.kill(9)?;
        ended(&shim, 137)
    })
}

/// What the container has counted so far.
fn number(shim: &Shim, file: &Path) -> Result<u64> {
    fs::write(file, "")?;
    exec_to(shim, file, "cat /count 2>/dev/null || echo 0")?;
    let text = fs::read_to_string(file)?;
    // It may be about to be written anew.
    Ok(text.trim().parse().unwrap_or(0))
}

fn exec_to(shim: &Shim, file: &Path, script: &str) -> Result<u32> {
    shim.exec_with(EXEC, &process(&["sh", "-c", script]), |request| {
        request.stdout = format!("file://{}", file.display());
    })?;
    shim.start_exec(EXEC)?;
    shim.end_exec(EXEC)
}
