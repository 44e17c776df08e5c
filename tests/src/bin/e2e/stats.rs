//! What a container uses, pausing it, and changing its limits.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::UpdateTaskRequest;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use libtest_mimic::Trial;
use supermachine_tests::host::Detached;
use supermachine_tests::shim::{refusal, shim_of};
use supermachine_tests::{BUSYBOX, until};
use ttrpc::Code;
use ttrpc::context;

use crate::support::{World, equal};

const MIB: u64 = 1 << 20;

/// Lets the container see its own limits.
const CGROUP: &str = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro";

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.test("stats::numbers_and_pauses", numbers_and_pauses),
        world.vm_test("stats::limits_are_changed", limits_are_changed),
    ]
}

/// `ctr tasks metrics`, which names the same thing in two ways, as the host's cgroups do.
fn metrics(world: &World, id: &str) -> Result<HashMap<String, u64>> {
    let table = world.host.ctr(&["tasks", "metrics", id])?.success()?;
    let mut metrics = HashMap::new();
    for line in table.lines() {
        if let [name, value] = line.split_whitespace().collect::<Vec<_>>()[..]
            && let Ok(value) = value.parse()
        {
            metrics.insert(name.to_owned(), value);
        }
    }
    Ok(metrics)
}

fn metric(metrics: &HashMap<String, u64>, v1: &str, v2: &str) -> Result<u64> {
    let value = metrics.get(v1).or_else(|| metrics.get(v2));
    let value = value.with_context(|| format!("neither {v1} nor {v2} in {metrics:?}"))?;
    Ok(*value)
}

/// Nanoseconds, in version 1's way.
fn cpu_time(world: &World, id: &str) -> Result<u64> {
    let metrics = metrics(world, id)?;
    match metrics.get("cpu.usage_usec") {
        Some(microseconds) => Ok(microseconds * 1000),
        None => metric(&metrics, "cpuacct.usage", "cpu.usage_usec"),
    }
}

fn memory(world: &World, id: &str) -> Result<u64> {
    metric(
        &metrics(world, id)?,
        "memory.usage_in_bytes",
        "memory.usage",
    )
}

/// Processor time of a task's process on the host, in clock ticks.
fn ticks(world: &World, id: &str) -> Result<u64> {
    let (pid, _) = world.host.task(id)?.context("no task")?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // proc_pid_stat(5): the name, in parentheses, may hold anything; utime and stime are 14 and 15.
    let (_, fields) = stat.rsplit_once(") ").context("no name")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    let field = |number: usize| -> Result<u64> {
        Ok(fields.get(number - 3).context("too few fields")?.parse()?)
    };
    Ok(field(14)? + field(15)?)
}

/// A container that counts in /count, as fast as it can, and notes SIGUSR1 in /signalled.
fn counter(world: &World) -> Result<Detached> {
    let script = "trap 'echo yes > /signalled' USR1; n=0; \
                  while :; do n=$((n+1)); echo $n > /count; done";
    let limit = (128 * MIB).to_string();
    let container = world.host.container(BUSYBOX);
    container
        .with(&["--memory-limit", &limit])
        .detach(&["sh", "-c", script])
}

fn numbers_and_pauses(world: &World) -> Result<()> {
    let container = counter(world)?;
    let id = container.id();
    numbers(world, &container)?;

    world.host.ctr(&["tasks", "pause", id])?.success()?;
    equal(world.host.status(id)?.as_deref(), Some("PAUSED"))?;
    let before = ticks(world, id)?;
    let known = cpu_time(world, id)?;
    let again = world.host.ctr(&["tasks", "pause", id])?;
    said(&again.errors(), "cannot pause a paused container")?;
    let exec = container.exec(&["true"])?;
    said(&exec.errors(), "cannot exec in a paused state")?;
    container.kill("SIGUSR1")?;
    // Those calls took a while, in which it did nothing.
    equal(cpu_time(world, id)?, known)?;
    let used = ticks(world, id)? - before;
    ensure!(used <= 2, "a paused task used {used} clock ticks");

    world.host.ctr(&["tasks", "resume", id])?.success()?;
    equal(world.host.status(id)?.as_deref(), Some("RUNNING"))?;
    let goes_on = "n=$(cat /count); until [ -e /signalled ]; do :; done; \
                   while [ \"$n\" = \"$(cat /count)\" ]; do :; done; cat /signalled";
    equal(
        container.exec(&["sh", "-c", goes_on])?.success()?.as_str(),
        "yes",
    )?;
    let again = world.host.ctr(&["tasks", "resume", id])?;
    said(&again.errors(), "cannot resume a running")?;

    // The end of a paused container.
    world.host.ctr(&["tasks", "pause", id])?.success()?;
    container.kill("SIGKILL")?;
    equal(container.end()?, 137)
}

/// What is told of a container that counts.
fn numbers(world: &World, container: &Detached) -> Result<()> {
    let id = container.id();
    let first = cpu_time(world, id)?;
    until("processor time to be used", world.host.deadline, || {
        Ok(cpu_time(world, id)? > first + 10_000_000)
    })?;
    let before = metrics(world, id)?;
    let limit = metric(&before, "memory.limit_in_bytes", "memory.usage_limit")?;
    equal(limit, 128 * MIB)?;
    // Memory that stays in use and processes that stay, of a program that has ended.
    let script = "dd if=/dev/zero of=/dev/shm/file bs=1M count=24 2>/dev/null; \
                  for i in 1 2 3 4; do sleep 1000 >/dev/null 2>&1 & done";
    container.exec(&["sh", "-c", script])?.success()?;
    let used = memory(world, id)?;
    let earlier = metric(&before, "memory.usage_in_bytes", "memory.usage")?;
    ensure!(
        used >= earlier + 23 * MIB && used <= 128 * MIB,
        "24 MiB took memory from {earlier} to {used}"
    );
    let now = metrics(world, id)?;
    let pids = metric(&now, "pids.current", "pids.current")?;
    ensure!((5..=8).contains(&pids), "{pids} processes, expected 5");
    Ok(())
}

fn said(text: &str, expected: &str) -> Result<()> {
    ensure!(
        text.contains(expected),
        "found {text:?}, expected {expected:?}"
    );
    Ok(())
}

/// Update of the task as containerd asks the shim for it.
fn update(world: &World, id: &str, resources: &str) -> Result<()> {
    let state = world
        .host
        .containerd
        .as_ref()
        .map(|containerd| containerd.state());
    let state = state.unwrap_or_else(|| PathBuf::from("/run/containerd"));
    let bundle = state.join("io.containerd.runtime.v2.task/default").join(id);
    let limits = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
        value: resources.as_bytes().to_vec(),
        ..Any::default()
    };
    let request = UpdateTaskRequest {
        id: id.to_owned(),
        resources: Some(limits).into(),
        ..UpdateTaskRequest::default()
    };
    let call = context::with_duration(world.host.deadline);
    shim_of(&bundle)?.update(call, &request)?;
    Ok(())
}

fn limits_are_changed(world: &World) -> Result<()> {
    let limit = (256 * MIB).to_string();
    let container = world
        .host
        .container(BUSYBOX)
        .with(&["--memory-limit", &limit, "--mount", CGROUP])
        .detach(&["sleep", "1000"])?;
    let id = container.id();
    let files = [
        "memory.max",
        "memory.low",
        "pids.max",
        "cpu.max",
        "cpu.weight",
    ];
    let limits = |files: &[&str]| -> Result<String> {
        // Without a cgroup namespace of its own it sees the whole hierarchy.
        let script = format!(
            "cd /sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup) && cat {}",
            files.join(" ")
        );
        container.exec(&["sh", "-c", &script])?.success()
    };
    let json = r#"{"memory":{"limit":67108864,"reservation":1048576},"pids":{"limit":30},
                   "cpu":{"quota":50000,"period":100000,"shares":512},
                   "unified":{"memory.high":"66060288"}}"#;
    update(world, id, json)?;
    equal(
        limits(&files)?.as_str(),
        "67108864\n1048576\n30\n50000 100000\n59",
    )?;
    equal(limits(&["memory.high"])?.as_str(), "66060288")?;
    let told = metrics(world, id)?;
    equal(
        metric(&told, "memory.limit_in_bytes", "memory.usage_limit")?,
        64 * MIB,
    )?;

    // What the machine cannot give is refused, and changes nothing.
    let above = update(
        world,
        id,
        r#"{"memory":{"limit":1073741824},"pids":{"limit":5}}"#,
    );
    let (code, text) = refusal(above)?;
    equal(code, Code::INVALID_ARGUMENT)?;
    said(&text, "1073741824")?;
    said(&text, &(352 * MIB).to_string())?;
    equal(limits(&["pids.max"])?.as_str(), "30")?;

    // The rest goes back to the host: 64 MiB and what the guest itself needs stay.
    let given_back = "while [ $(awk '/MemFree/{print $2}' /proc/meminfo) -gt 163840 ]; do :; done";
    container.exec(&["sh", "-c", given_back])?.success()?;

    // The new limits hold.
    let hog = "dd if=/dev/zero of=/dev/null bs=128M count=1 2>/dev/null; echo \"dd: $?\"";
    equal(
        container.exec(&["sh", "-c", hog])?.text().as_str(),
        "dd: 137\n",
    )?;
    let forks = "for i in $(seq 40); do sleep 1000 >/dev/null 2>&1 & done; echo not reached";
    let forked = container.exec(&["sh", "-c", forks])?;
    said(&forked.errors(), "can't fork")?;
    Ok(())
}
