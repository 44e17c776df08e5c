//! Containers beside each other: many at once, and bad ones.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use libtest_mimic::Trial;
use supermachine_tests::shim::ShimConfig;
use supermachine_tests::{BUSYBOX, until};

use super::{EXEC, ended, process, shim};
use crate::bad::configured;
use crate::leftovers::leaves_nothing;
use crate::support::{World, equal};

const MIB: u64 = 1 << 20;

pub(super) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("faults::twenty_at_once", twenty_at_once),
        world.vm_test("faults::bad_neighbours", bad_neighbours),
    ]
}

/// All of them start, run at the same time, answer and end.
fn twenty_at_once(world: &World) -> Result<()> {
    // Emulated, they take a while: nobody may give up before the shim does.
    let keys = [
        ("timeouts", "boot", "\"600s\""),
        ("timeouts", "call", "\"300s\""),
        ("vm", "memory", "\"96MiB\""),
    ];
    let config = ShimConfig {
        deadline: Duration::from_secs(600 + 300),
        ..configured(world, &keys)?
    };
    leaves_nothing(world, || {
        let all = |work: &(dyn Fn(usize) -> Result<()> + Sync)| {
            thread::scope(|scope| {
                let each: Vec<_> = (0..20).map(|n| scope.spawn(move || work(n))).collect();
                each.into_iter().enumerate().try_for_each(|(n, each)| {
                    let ended = each.join().map_err(|_| anyhow!("a panic"));
                    ended
                        .flatten()
                        .with_context(|| format!("the container {n}"))
                })
            })
        };
        let shims: Vec<_> = (0..20)
            .map(|_| shim(world, &config, &["sh", "-c", "sleep 1000"]))
            .collect::<Result<_>>()?;
        all(&|n| {
            let (shim, bundle) = &shims[n];
            shim.create(bundle)?;
            shim.start_task().map(drop)
        })?;
        // As many machines, each with a status of its own to tell.
        all(&|n| {
            let (shim, _) = &shims[n];
            let exit = format!("exit {n}");
            shim.exec_with(EXEC, &process(&["sh", "-c", &exit]), |_| {})?;
            shim.start_exec(EXEC)?;
            equal(shim.end_exec(EXEC)?, u32::try_from(n)?)
        })?;
        all(&|n| {
            let (shim, _) = &shims[n];
            shim.kill(9)?;
            ended(shim, 137)
        })
    })
}

/// Who takes all it can get takes it from its own machine.
fn bad_neighbours(world: &World) -> Result<()> {
    let bad = [
        // All of them are as large: without the score, who dies when the memory is gone may be the
        // first process, and the container with it.
        (
            "a fork bomb",
            "bomb() { bomb | bomb & }; (echo 1000 > /proc/self/oom_score_adj; bomb); \
             while :; do :; done",
        ),
        ("a memory hog", "while :; do tail /dev/zero; done"),
    ];
    leaves_nothing(world, || {
        let good = world
            .host
            .container(BUSYBOX)
            .detach(&["sleep", "1000000"])?;
        bad.iter().try_for_each(|(name, script)| {
            beside(world, script, || {
                equal(good.exec(&["echo", "y"])?.success()?.as_str(), "y")
            })
            .context(*name)
        })?;
        good.kill("KILL")?;
        equal(good.end()?, 137)
    })
}

/// Runs a bad container until it has all it gets, and `answers` while it does.
fn beside(world: &World, script: &str, answers: impl Fn() -> Result<()>) -> Result<()> {
    let limit = (64 * MIB).to_string();
    let bad = world
        .host
        .container(BUSYBOX)
        .with(&["--memory-limit", &limit]);
    let processes = number_of_processes()?;
    let bad = bad.detach(&["sh", "-c", script])?;
    let (vmm, _) = world.host.task(bad.id())?.context("no task")?;
    let ram = guest_memory(vmm)?;
    until(
        "the machine's memory to be used",
        world.host.deadline,
        || {
            answers()?;
            Ok(resident(vmm)? > (ram / 4 * 3).min(64 * MIB))
        },
    )?;
    for _ in 0..3 {
        answers()?;
        let now = resident(vmm)?;
        ensure!(now < ram + 16 * MIB, "the VMM takes {now} bytes, of {ram}");
    }
    // A shim and a VMM, and what comes and goes on a host by itself.
    let more = number_of_processes()?.saturating_sub(processes);
    ensure!(more < 20, "{more} processes more on the host");
    let killed = bad.kill("KILL");
    let status = bad.end()?;
    killed.with_context(|| format!("it had ended by itself, with status {status}"))?;
    equal(status, 137)
}

/// How many processes the host has.
fn number_of_processes() -> Result<usize> {
    let entries = fs::read_dir("/proc")?.flatten();
    let number = |name: &std::ffi::OsStr| name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
    Ok(entries.filter(|entry| number(&entry.file_name())).count())
}

/// Bytes of a process's memory that are in the host's.
fn resident(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("no account of memory")?.parse::<u64>()? << 10)
}

/// Bytes of a VMM's largest mapping, which is its guest's RAM.
fn guest_memory(pid: u32) -> Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let sizes = maps.lines().filter_map(|line| {
        let (from, to) = line.split_whitespace().next()?.split_once('-')?;
        Some(u64::from_str_radix(to, 16).ok()? - u64::from_str_radix(from, 16).ok()?)
    });
    sizes.max().context("no mappings")
}
