//! Programs run in a container that is there already.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::BUSYBOX;
use supermachine_tests::host::Detached;

use crate::support::{World, equal};

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.test("exec::twenty_times", twenty_times),
        world.test("exec::side_by_side", side_by_side),
        world.test("exec::input_and_streams", input_and_streams),
        world.test("exec::user_and_directory", user_and_directory),
        world.test("exec::program_not_found", program_not_found),
        world.test("exec::ends_with_its_container", ends_with_its_container),
    ]
}

fn sleeper(world: &World) -> Result<Detached> {
    world.host.container(BUSYBOX).detach(&["sleep", "1000"])
}

fn twenty_times(world: &World) -> Result<()> {
    let container = sleeper(world)?;
    for round in 0..20 {
        let script = format!("echo round {round}; exit {round}");
        let finished = container.exec(&["sh", "-c", &script])?;
        equal(finished.text(), format!("round {round}\n"))?;
        equal(finished.code()?, round)?;
    }
    Ok(())
}

fn side_by_side(world: &World) -> Result<()> {
    let container = sleeper(world)?;
    let mut execs = Vec::new();
    for number in 0..4 {
        let script = format!("echo ready; read line; echo \"{number} $line\"");
        execs.push(container.start_exec(&[], &["sh", "-c", &script])?);
    }
    // All are there at once before any may end.
    for exec in &mut execs {
        exec.expect("ready\n")?;
    }
    for (number, mut exec) in execs.into_iter().enumerate() {
        exec.write(b"goes\n")?;
        equal(exec.finish()?.text(), format!("ready\n{number} goes\n"))?;
    }
    Ok(())
}

fn input_and_streams(world: &World) -> Result<()> {
    let container = sleeper(world)?;
    let mut exec = container.start_exec(&[], &["sh", "-c", "echo ready; cat; echo err >&2"])?;
    exec.expect("ready\n")?;
    exec.write(b"to and fro\n")?;
    exec.close_stdin();
    let finished = exec.finish()?;
    equal(finished.text().as_str(), "ready\nto and fro\n")?;
    equal(finished.errors().as_str(), "err\n")
}

fn user_and_directory(world: &World) -> Result<()> {
    let container = sleeper(world)?;
    let options = ["--user", "1000:1001", "--cwd", "/tmp"];
    let mut exec = container.start_exec(&options, &["sh", "-c", "id -u; id -g; pwd; echo done"])?;
    exec.expect("done\n")?;
    equal(exec.finish()?.text().as_str(), "1000\n1001\n/tmp\ndone\n")
}

fn program_not_found(world: &World) -> Result<()> {
    let container = sleeper(world)?;
    let finished = container.exec(&["/no/such/program"])?;
    ensure!(!finished.status.success(), "it succeeded");
    let errors = finished.errors();
    ensure!(
        errors.contains("/no/such/program"),
        "does not name the program: {errors}"
    );
    // The container is none the worse.
    equal(
        container.exec(&["echo", "alive"])?.success()?.as_str(),
        "alive",
    )
}

fn ends_with_its_container(world: &World) -> Result<()> {
    let container = sleeper(world)?;
    let mut exec = container.start_exec(&[], &["sh", "-c", "echo ready; sleep 1000"])?;
    exec.expect("ready\n")?;
    container.kill("KILL")?;
    ensure!(!exec.finish()?.status.success(), "the exec ended well");
    equal(container.end()?, 137)
}
