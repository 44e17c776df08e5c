//! Signals, several containers, and what a process is told of itself.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::BUSYBOX;

use crate::support::{World, equal};

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.test("process::killed_by_term", killed_by_term),
        world.test("process::killed_by_kill", killed_by_kill),
        world.test("process::detached", detached),
        world.test("process::two_at_once", two_at_once),
        world.test("process::user", user),
        world.test(
            "process::directory_and_environment",
            directory_and_environment,
        ),
        world.test("process::hostname", hostname),
        world.test("process::first_of_its_kind", first_of_its_kind),
        world.test("process::writable_and_read_only_root", roots),
    ]
}

fn killed_by_term(world: &World) -> Result<()> {
    let script = "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let mut running = world.host.container(BUSYBOX).start(&["sh", "-c", script])?;
    running.program()?.expect("ready\n")?;
    let id = running.id().to_owned();
    world
        .host
        .ctr(&["tasks", "kill", "--signal", "TERM", &id])?
        .success()?;
    let finished = running.finish()?;
    equal(finished.text().as_str(), "ready\ncaught\n")?;
    equal(finished.code()?, 3)
}

fn killed_by_kill(world: &World) -> Result<()> {
    let script = "trap '' TERM; echo ready; while :; do sleep 0.1; done";
    let mut running = world.host.container(BUSYBOX).start(&["sh", "-c", script])?;
    running.program()?.expect("ready\n")?;
    let id = running.id().to_owned();
    world
        .host
        .ctr(&["tasks", "kill", "--signal", "KILL", &id])?
        .success()?;
    equal(running.finish()?.code()?, 137)
}

fn detached(world: &World) -> Result<()> {
    let container = world.host.container(BUSYBOX).detach(&["sleep", "1000"])?;
    let (pid, status) = world.host.task(container.id())?.context("no task")?;
    equal(status.as_str(), "RUNNING")?;
    ensure!(
        std::path::Path::new(&format!("/proc/{pid}")).exists(),
        "no process {pid}"
    );
    container.kill("KILL")?;
    let id = container.id().to_owned();
    equal(container.end()?, 137)?;
    equal(world.host.status(&id)?, None)
}

fn two_at_once(world: &World) -> Result<()> {
    let start = |name: &str| {
        let container = world.host.container(BUSYBOX).with(&["--hostname", name]);
        container.detach(&["sh", "-c", "echo $(hostname) > /name; sleep 1000"])
    };
    let (one, two) = (start("one")?, start("two")?);
    let name = [
        "sh",
        "-c",
        "until [ -s /name ]; do sleep 0.1; done; cat /name",
    ];
    equal(one.exec(&name)?.success()?.as_str(), "one")?;
    equal(two.exec(&name)?.success()?.as_str(), "two")?;
    one.kill("KILL")?;
    equal(one.end()?, 137)?;
    equal(two.exec(&["echo", "alive"])?.success()?.as_str(), "alive")
}

fn user(world: &World) -> Result<()> {
    let container = world.host.container(BUSYBOX).with(&["--user", "1000:1001"]);
    let finished = container.run(&["sh", "-c", "id -u; id -g; touch /file || echo refused"])?;
    equal(finished.text().as_str(), "1000\n1001\nrefused\n")
}

fn directory_and_environment(world: &World) -> Result<()> {
    let container = world.host.container(BUSYBOX).with(&[
        "--cwd",
        "/tmp",
        "--env",
        "GREETING=hello world",
        "--env",
        "EMPTY=",
    ]);
    let script = "pwd; echo \"$GREETING\"; echo \"${EMPTY-unset}.\"; echo \"${OTHER-unset}.\"";
    let finished = container.run(&["sh", "-c", script])?;
    equal(finished.text().as_str(), "/tmp\nhello world\n.\nunset.\n")
}

fn hostname(world: &World) -> Result<()> {
    let container = world
        .host
        .container(BUSYBOX)
        .with(&["--hostname", "some-name"]);
    let finished = container.run(&["sh", "-c", "hostname; uname -n"])?;
    equal(finished.text().as_str(), "some-name\nsome-name\n")
}

/// Process 1 in a namespace of its own, with only itself and its children.
fn first_of_its_kind(world: &World) -> Result<()> {
    let text = world
        .host
        .sh("echo $$; ls -d /proc/[0-9]* | wc -l")?
        .success()?;
    let mut lines = text.lines();
    equal(lines.next(), Some("1"))?;
    let processes: u32 = lines.next().context("no count")?.trim().parse()?;
    ensure!(processes <= 4, "{processes} processes are seen");
    Ok(())
}

fn roots(world: &World) -> Result<()> {
    let script = "echo data > /file && cat /file; mkdir -p /a/b && rm -r /a && echo removed";
    equal(world.host.sh(script)?.text().as_str(), "data\nremoved\n")?;
    let container = world.host.container(BUSYBOX).with(&["--read-only"]);
    let finished = container.run(&["sh", "-c", "touch /file || echo refused"])?;
    equal(finished.text().as_str(), "refused\n")
}
