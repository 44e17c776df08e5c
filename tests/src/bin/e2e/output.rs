//! What a container writes, and how it ends.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::{BUSYBOX, DEBIAN, sha256};

use crate::leftovers::leaves_nothing;
use crate::support::{World, equal};

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.test("output::hello", hello),
        world.test("output::exit_code", exit_code),
        world.test("output::killed_by_itself", killed_by_itself),
        world.test("output::ten_megabytes", ten_megabytes),
        world.test("output::stderr_apart", stderr_apart),
        world.test("output::without_newline", without_newline),
        world.test("output::of_a_grandchild", grandchild),
        world.test("output::to_a_file", to_a_file),
        world.test("output::to_a_logger", to_a_logger),
        world.debian_test("output::debian", debian),
        world.vm_test("output::kernel_of_its_own", kernel),
    ]
}

fn hello(world: &World) -> Result<()> {
    equal(world.host.sh("echo hello")?.success()?.as_str(), "hello")
}

fn exit_code(world: &World) -> Result<()> {
    equal(world.host.sh("exit 7")?.code()?, 7)
}

fn killed_by_itself(world: &World) -> Result<()> {
    // A shell cannot kill itself as PID 1; its child's end is its own status.
    equal(world.host.sh("sh -c 'kill -9 $$'; exit $?")?.code()?, 137)
}

fn ten_megabytes(world: &World) -> Result<()> {
    let script = "head -c 10485760 /dev/urandom > /data; sha256sum /data >&2; cat /data";
    let finished = world.host.sh(script)?;
    let told = finished.errors();
    let told = told.split_whitespace().next().context("no checksum")?;
    equal(finished.stdout.len(), 10_485_760)?;
    equal(sha256(&finished.stdout).as_str(), told)?;
    equal(finished.code()?, 0)
}

fn stderr_apart(world: &World) -> Result<()> {
    let finished = world.host.sh("echo out; echo err >&2; echo out again")?;
    equal(finished.text().as_str(), "out\nout again\n")?;
    equal(finished.errors().as_str(), "err\n")
}

fn without_newline(world: &World) -> Result<()> {
    equal(world.host.sh("printf 'no end'")?.text().as_str(), "no end")
}

/// What a process leaves running may still write; its parent's output is whole all the same.
fn grandchild(world: &World) -> Result<()> {
    let script = "(echo from below) & wait; echo from above; \
                  sh -c 'trap \"\" HUP; sleep 1000' & exit 4";
    let finished = world.host.sh(script)?;
    equal(finished.text().as_str(), "from below\nfrom above\n")?;
    equal(finished.code()?, 4)
}

const BOTH: [&str; 3] = ["sh", "-c", "echo of stdout; echo of stderr >&2; exit 6"];

fn to_a_file(world: &World) -> Result<()> {
    let directory = tempfile::tempdir_in(world.files()?)?;
    let log = directory.path().join("made/log");
    let uri = format!("file://{}", log.display());
    let container = world.host.container(BUSYBOX).with_log(&uri);
    equal(container.detach(&BOTH)?.end()?, 6)?;
    let said = fs::read_to_string(&log)?;
    for line in ["of stdout\n", "of stderr\n"] {
        ensure!(said.contains(line), "no {line:?} in {said:?}");
    }
    Ok(())
}

/// The program is done with the output, and gone, when the task is deleted.
fn to_a_logger(world: &World) -> Result<()> {
    let directory = tempfile::tempdir_in(world.files()?)?;
    // Named so that it counts as a trace.
    let program = directory.path().join("supermachine-log");
    let script = "#!/bin/sh\nexec 5>&-\ncat <&4 > $2/err &\ncat <&3 > $2/out\nwait\n\
                  echo $CONTAINER_NAMESPACE $1 > $2/end\n";
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let folder = directory.path().display();
    let uri = format!("binary://{}?to={folder}", program.display());
    leaves_nothing(world, || {
        let container = world.host.container(BUSYBOX).with_log(&uri);
        equal(container.detach(&BOTH)?.end()?, 6)
    })?;
    let said =
        |name: &str| fs::read_to_string(directory.path().join(name)).context(name.to_owned());
    equal(said("out")?.as_str(), "of stdout\n")?;
    equal(said("err")?.as_str(), "of stderr\n")?;
    equal(said("end")?.as_str(), "default to\n")
}

fn debian(world: &World) -> Result<()> {
    let container = world.host.container(DEBIAN);
    let script = "cat /etc/debian_version; ls /usr/bin | wc -l; [[ bash == b* ]] && echo bash";
    let text = container.run(&["bash", "-c", script])?.success()?;
    let lines: Vec<&str> = text.lines().collect();
    ensure!(
        lines
            .first()
            .is_some_and(|version| version.starts_with("12.")),
        "found {text:?}"
    );
    ensure!(
        lines
            .get(1)
            .and_then(|count| count.trim().parse::<u32>().ok())
            .is_some_and(|n| n > 50),
        "found {text:?}"
    );
    equal(lines.last().copied(), Some("bash"))
}

fn kernel(world: &World) -> Result<()> {
    let boot_id = "/proc/sys/kernel/random/boot_id";
    let guest = world
        .host
        .sh(&format!("uname -r; cat {boot_id}"))?
        .success()?;
    let ours = std::fs::read_to_string(boot_id)?;
    ensure!(
        !guest.contains(ours.trim()),
        "the container runs on the host's kernel: {guest}"
    );
    Ok(())
}
