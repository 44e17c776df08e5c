//! Docker: a dockerd on the same containerd, with the runtime in its `daemon.json`.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, anyhow, ensure};
use libtest_mimic::{Completion, Trial};
use serde_json::{Value, json};
use supermachine_tests::docker::{Container, Docker, IMAGE, NAME};
use supermachine_tests::terminal::Terminal;
use supermachine_tests::until;

use crate::support::{World, equal, failed, find};

/// One dockerd for all tests, started by the first.
type Shared = Arc<OnceLock<Result<Docker, String>>>;

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    let shared = Shared::default();
    let test = |name: &'static str, run: fn(&World, &Docker) -> Result<()>| {
        let (world, shared) = (world.clone(), shared.clone());
        Trial::ignorable_test(name, move || {
            if name == "docker::refused" && !world.host.is_vm() {
                return Ok(Completion::ignored_with("only in a VM"));
            }
            for program in ["dockerd", "docker"] {
                if find(program).is_none() {
                    let reason = format!("{program} is not on PATH");
                    return Ok(Completion::ignored_with(reason));
                }
            }
            let docker = shared.get_or_init(|| start(&world).map_err(|error| format!("{error:#}")));
            let docker = docker
                .as_ref()
                .map_err(|error| failed(anyhow!("{error}")))?;
            run(&world, docker)
                .map(|()| Completion::Completed)
                .map_err(failed)
        })
    };
    vec![
        test("docker::run_and_remove", run_and_remove),
        test("docker::watched", watched),
        test("docker::exec", exec),
        test("docker::attached", attached),
        test("docker::stopped_and_started", stopped_and_started),
        test("docker::limits_and_pauses", limits_and_pauses),
        test("docker::files_of_the_engine", files_of_the_engine),
        test("docker::init", init),
        test("docker::written", written),
        test("docker::refused", refused),
        test("docker::image_store", image_store),
    ]
}

fn start(world: &World) -> Result<Docker> {
    start_with(world, json!({}))
}

fn start_with(world: &World, mut more: Value) -> Result<Docker> {
    // Beside this program: see xtask's programs.
    let init = std::env::current_exe()?.with_file_name("docker-init");
    if init.exists() {
        more["init-path"] = json!(init);
    }
    let host = &world.host;
    let docker = Docker::start(host.ctr.address(), &host.runtime, &more, host.deadline)?;
    docker.import(&world.busybox()?)?;
    Ok(docker)
}

fn said(text: &str, expected: &str) -> Result<()> {
    ensure!(text.contains(expected), "{expected:?} is not in {text:?}");
    Ok(())
}

/// Waits for a line of `docker logs`.
fn logged(docker: &Docker, container: &Container<'_>, line: &str) -> Result<()> {
    let mut logs = docker.begin(&["logs", "--follow", &container.name])?;
    logs.expect(line)
}

/// Output, exit code, and nothing left, with the runtime named by its type.
fn run_and_remove(world: &World, docker: &Docker) -> Result<()> {
    let script = "echo out; echo err >&2; uname -r; cat /proc/1/comm; exit 42";
    let run = docker.run(&[
        "run",
        "--rm",
        "--runtime",
        &world.host.runtime,
        "--network",
        "none",
        "--hostname",
        "web",
        IMAGE,
        "sh",
        "-c",
        script,
    ])?;
    let text = run.text();
    equal(run.errors().as_str(), "err\n")?;
    equal(run.code()?, 42)?;
    said(&text, "out\n")?;
    let here = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    equal(text.contains(&here), !world.host.is_vm())?;
    equal(docker.say(&["ps", "--all", "--quiet"])?.as_str(), "")?;
    let runtime = docker.say(&["info", "--format", "{{json .Runtimes}}"])?;
    said(&runtime, NAME)
}

/// ps, inspect, logs, top: what is told of a container that runs.
fn watched(world: &World, docker: &Docker) -> Result<()> {
    let script = "echo first; until [ -e /go ]; do sleep 0.1; done; echo second; echo third >&2; \
                  sleep 1000";
    let container = docker.detach(&[], script)?;
    let name = container.name.as_str();
    let mut logs = docker.begin(&["logs", "--follow", name])?;
    logs.expect("first\n")?;
    container.sh("touch /go")?.success()?;
    logs.expect("second\n")?;
    drop(logs);

    let listed = docker.say(&["ps", "--format", "{{.Names}} {{.Status}}"])?;
    said(&listed, &format!("{name} Up "))?;
    let state = docker.inspect("{{json .State}}", name)?;
    let state: Value = serde_json::from_str(&state)?;
    equal(state["Status"].as_str(), Some("running"))?;
    let pid = state["Pid"].as_u64().context("no pid")?;
    equal(
        docker.inspect("{{.HostConfig.Runtime}}", name)?.as_str(),
        NAME,
    )?;

    // The json-file driver's own file.
    equal(
        docker
            .inspect("{{.HostConfig.LogConfig.Type}}", name)?
            .as_str(),
        "json-file",
    )?;
    let file = PathBuf::from(docker.inspect("{{.LogPath}}", name)?);
    until("the log to be written", world.host.deadline, || {
        Ok(std::fs::read_to_string(&file)?.lines().count() == 3)
    })?;
    // Each stream is copied by itself: what was written close together may change places.
    let text = std::fs::read_to_string(&file)?;
    let mut logged = Vec::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line)?;
        logged.push((line["stream"].clone(), line["log"].clone()));
    }
    logged.sort_by_key(|(stream, _)| *stream == json!("stderr"));
    let expected = [
        ("stdout", "first\n"),
        ("stdout", "second\n"),
        ("stderr", "third\n"),
    ];
    equal(
        logged,
        expected
            .map(|(stream, log)| (json!(stream), json!(log)))
            .to_vec(),
    )?;

    // Processes by the host's numbers: in a VM there is the machine's alone.
    let top = docker.say(&["top", name, "-o", "pid,args"])?;
    said(&top, &pid.to_string())?;
    let expected = if world.host.is_vm() { 2 } else { 3 };
    equal(top.lines().count(), expected)?;

    docker.say(&["rm", "--force", name])?;
    let gone = docker.run(&["inspect", name])?;
    said(&gone.errors().to_lowercase(), "no such object")
}

/// exec, with and without a terminal.
fn exec(world: &World, docker: &Docker) -> Result<()> {
    let container = docker.detach(&[], "sleep 1000")?;
    let name = container.name.as_str();
    let failing = container.sh("echo out; echo err >&2; exit 7")?;
    equal(failing.text().as_str(), "out\n")?;
    equal(failing.errors().as_str(), "err\n")?;
    equal(failing.code()?, 7)?;

    let mut cat = docker.begin(&["exec", "--interactive", name, "cat"])?;
    cat.write(b"there and back\n")?;
    cat.expect("there and back\n")?;
    cat.close_stdin();
    equal(cat.finish()?.code()?, 0)?;

    let command = docker.command(&["exec", "--interactive", "--tty", name, "sh"]);
    let mut terminal = Terminal::start(&command, 90, 30, world.host.deadline)?;
    terminal.expect("# ")?;
    // What is typed is shown too, so the quotes: without them the shell has run it.
    terminal
        .type_in("tty; until [ \"$(stty size)\" = '30 90' ]; do sleep 0.1; done; echo si''zed\r")?;
    terminal.expect("/dev/pts/")?;
    terminal.expect("sized\n")?;
    terminal.type_in("exit 9\r")?;
    equal(terminal.finish()?.code(), Some(9))?;

    let missing = docker.run(&["exec", name, "no-such-program"])?;
    equal(missing.code()?, 127)?;
    // Docker's client shows it where the program's output would be.
    said(&missing.text(), "executable file not found in $PATH")
}

/// attach, to a container with a terminal and input.
fn attached(world: &World, docker: &Docker) -> Result<()> {
    let options = ["--interactive", "--tty"];
    let container = docker.detach(
        &options,
        "echo ready; read line; echo \"got $line\"; exec sh",
    )?;
    logged(docker, &container, "ready")?;
    let command = docker.command(&["attach", &container.name]);
    let mut terminal = Terminal::start(&command, 80, 25, world.host.deadline)?;
    terminal.type_in("some words\r")?;
    terminal.expect("got some words\n")?;
    terminal.expect("# ")?;
    // Ctrl-P Ctrl-Q leaves it running.
    terminal.type_in("\u{10}\u{11}")?;
    terminal.finish()?;
    equal(
        docker
            .inspect("{{.State.Running}}", &container.name)?
            .as_str(),
        "true",
    )?;

    let mut terminal = Terminal::start(&command, 80, 25, world.host.deadline)?;
    terminal.type_in("echo at''tached; exit 11\r")?;
    terminal.expect("attached\n")?;
    equal(terminal.finish()?.code(), Some(11))?;
    equal(docker.say(&["wait", &container.name])?.as_str(), "11")
}

/// stop, wait, start, kill and their exit codes.
fn stopped_and_started(world: &World, docker: &Docker) -> Result<()> {
    let script = "trap 'echo stopping; exit 143' TERM; echo ready; while :; do sleep 0.1; done";
    let container = docker.detach(&[], script)?;
    let name = container.name.as_str();
    logged(docker, &container, "ready")?;
    let waiting = docker.begin(&["wait", name])?;
    docker.say(&["stop", name])?;
    equal(waiting.finish()?.success()?.as_str(), "143")?;
    let state = "{{.State.Status}} {{.State.ExitCode}} {{.State.Pid}}";
    equal(docker.inspect(state, name)?.as_str(), "exited 143 0")?;
    said(&docker.say(&["logs", name])?, "stopping")?;

    docker.say(&["start", name])?;
    until("a second start", world.host.deadline, || {
        Ok(docker.say(&["logs", name])?.matches("ready").count() == 2)
    })?;
    docker.say(&["kill", name])?;
    equal(docker.say(&["wait", name])?.as_str(), "137")?;
    equal(docker.inspect(state, name)?.as_str(), "exited 137 0")?;

    // A first process that does not handle SIGTERM is killed in the end.
    let stubborn = docker.detach(&[], "exec sleep 1000")?;
    docker.say(&["stop", "--time", "1", &stubborn.name])?;
    equal(
        docker.inspect(state, &stubborn.name)?.as_str(),
        "exited 137 0",
    )
}

/// stats, pause, unpause, update.
fn limits_and_pauses(_: &World, docker: &Docker) -> Result<()> {
    let script = "while :; do n=$((n+1)); echo $n > /count; done";
    let options = ["--memory", "128m", "--cpus", "1", "--pids-limit", "50"];
    let container = docker.detach(&options, script)?;
    let name = container.name.as_str();
    let stats = docker.say(&["stats", "--no-stream", "--format", "json", name])?;
    let stats: Value = serde_json::from_str(&stats)?;
    let usage = stats["MemUsage"].as_str().context("no memory")?;
    said(usage, "/ 128MiB")?;
    let share = stats["CPUPerc"].as_str().context("no processor time")?;
    ensure!(share != "0.00%", "{stats}");
    let pids: u64 = stats["PIDs"].as_str().unwrap_or_default().parse()?;
    ensure!((1..=3).contains(&pids), "{stats}");

    docker.say(&["pause", name])?;
    equal(
        docker.inspect("{{.State.Status}}", name)?.as_str(),
        "paused",
    )?;
    let exec = docker.run(&["exec", name, "true"])?;
    said(&exec.errors(), "is paused")?;
    docker.say(&["unpause", name])?;
    let goes_on = "n=$(cat /count); while [ \"$n\" = \"$(cat /count)\" ]; do :; done";
    container.sh(goes_on)?.success()?;

    docker.say(&[
        "update",
        "--memory",
        "64m",
        "--memory-swap",
        "64m",
        "--pids-limit",
        "20",
        name,
    ])?;
    let limits = "cd /sys/fs/cgroup && cat memory.max pids.max";
    equal(container.sh(limits)?.success()?.as_str(), "67108864\n20")
}

/// The files that Docker mounts into each container, with the default network.
fn files_of_the_engine(_: &World, docker: &Docker) -> Result<()> {
    let options = [
        "--hostname",
        "web",
        "--add-host",
        "db:10.1.2.3",
        "--dns",
        "192.0.2.1",
    ];
    let container = docker.detach(&options, "sleep 1000")?;
    equal(
        container
            .sh("hostname; cat /etc/hostname")?
            .success()?
            .as_str(),
        "web\nweb",
    )?;
    let hosts = container.sh("cat /etc/hosts")?.success()?;
    said(&hosts, "127.0.0.1\tlocalhost")?;
    said(&hosts, "10.1.2.3\tdb")?;
    said(
        &container.sh("cat /etc/resolv.conf")?.success()?,
        "nameserver 192.0.2.1",
    )?;
    // They may be written to.
    let written = container.sh("echo 10.1.2.4 more >> /etc/hosts && grep -c more /etc/hosts")?;
    equal(written.success()?.as_str(), "1")?;
    let shm = container.sh("df -k /dev/shm | tail -1 | awk '{print $2}'")?;
    equal(shm.success()?.as_str(), "65536")
}

/// Docker's own first process.
fn init(_: &World, docker: &Docker) -> Result<()> {
    let container = docker.detach(&["--init"], "echo ready; exec sleep 1000")?;
    logged(docker, &container, "ready")?;
    said(
        &container.sh("cat /proc/1/cmdline")?.success()?,
        "/sbin/docker-init",
    )?;
    // It passes signals on to a program that has no handler, which then ends.
    docker.say(&["stop", &container.name])?;
    equal(
        docker
            .inspect("{{.State.ExitCode}}", &container.name)?
            .as_str(),
        "143",
    )
}

/// diff and commit: what a container wrote, once it has ended, as under runc.
fn written(_: &World, docker: &Docker) -> Result<()> {
    let script = "mkdir /made && echo new > /made/file && ln -s file /made/link && \
                  mv /made /moved && echo more >> /etc/passwd && rm /bin/vi && chmod 700 /tmp";
    let mut told = Vec::new();
    for runtime in [NAME, "runc"] {
        let options = ["--runtime", runtime, "--network", "none"];
        let container = docker.detach(&options, script)?;
        let name = container.name.as_str();
        equal(docker.say(&["wait", name])?.as_str(), "0")?;
        let changes = docker.say(&["diff", name])?;
        let mut changes: Vec<_> = changes.lines().map(str::to_owned).collect();
        changes.sort();
        let image = docker.say(&["commit", name])?;
        let look = "cat /moved/link; tail -n 1 /etc/passwd; stat -c %a /tmp; ls /bin/vi /made";
        let run = docker.run(&["run", "--rm", "--network", "none", &image, "sh", "-c", look])?;
        docker.say(&["image", "rm", "--force", &image])?;
        equal(run.text().as_str(), "new\nmore\n700\n")?;
        told.push(changes);
    }
    let [ours, runcs] = told.as_slice() else {
        unreachable!("two runs");
    };
    equal(ours, runcs)?;
    for change in ["A /moved/file", "C /etc/passwd", "D /bin/vi"] {
        ensure!(
            ours.iter().any(|line| line == change),
            "no {change:?} in {ours:?}"
        );
    }
    Ok(())
}

/// What a machine can't have is refused by name, and nothing is left.
fn refused(world: &World, docker: &Docker) -> Result<()> {
    let files = world.files()?.display().to_string();
    let volume = format!("{files}:/data");
    for (option, expected) in [
        (
            ["--volume", &volume],
            "The mount at /data is not supported in a microVM",
        ),
        (["--pid", "host"], "A missing linux.namespaces pid"),
    ] {
        let mut args = vec!["run", "--rm"];
        args.extend(option);
        args.extend([IMAGE, "true"]);
        let run = docker.run(&args)?;
        said(&run.errors(), expected)?;
        ensure!(run.code()? >= 125, "{}", run.code()?);
    }
    equal(docker.say(&["ps", "--all", "--quiet"])?.as_str(), "")
}

/// With containerd's image store, which is Docker's default for new installations since version 29.
fn image_store(world: &World, _: &Docker) -> Result<()> {
    let docker = start_with(
        world,
        json!({
            "features": {"containerd-snapshotter": true},
            // The other dockerd has the default one.
            "containerd-namespace": "image-store",
        }),
    )?;
    let status = docker.say(&["info", "--format", "{{json .DriverStatus}}"])?;
    said(&status, "io.containerd.snapshotter")?;
    run_and_remove(world, &docker)?;
    written(world, &docker)
}
