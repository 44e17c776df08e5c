//! The examples of the VMM crate, as its README shows them.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::initramfs::Initramfs;
use supermachine_tests::program::Program;
use supermachine_tests::work::{State, VSOCK_PORT};
use supermachine_vmm::VmConfig;

use crate::bad;
use crate::support::World;

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("examples::boot", boot),
        world.vm_test("examples::balloon", balloon),
        world.vm_test("examples::snapshot", snapshot),
    ]
}

/// A kernel's command line, with what the guest is to do.
fn cmdline(guest: &str) -> String {
    let serial = VmConfig::SERIAL;
    format!("console={serial} quiet reboot=t panic=-1 {guest}")
}

fn boot(world: &World) -> Result<()> {
    // The guest has nothing to do, says so and resets.
    let said = run(world, "boot", &["--cmdline", &cmdline("")])?;
    ensure!(said.contains("guest: GUEST="), "{said}");
    ensure!(said.contains("The VM ended: "), "{said}");
    Ok(())
}

fn balloon(world: &World) -> Result<()> {
    let cmdline = cmdline("GUEST=wait");
    let options = ["--cmdline", &cmdline, "--memory", "256", "--take", "100"];
    let said = run(world, "balloon", &options)?;
    ensure!(
        said.contains("inflated: the balloon holds 100 MiB"),
        "{said}"
    );
    ensure!(said.contains("deflated: the balloon holds 0 MiB"), "{said}");
    ensure!(said.contains("the VM ended: "), "{said}");
    Ok(())
}

/// A guest with two vCPUs that works on its disk, console, socket and timer goes on from the middle of
/// that, each time exactly where it was.
fn snapshot(world: &World) -> Result<()> {
    const LINES: usize = 5;
    let dir = tempfile::tempdir_in("/var/tmp")?;
    let disk = dir.path().join("original.disk");
    std::fs::File::create(&disk)?.set_len(1 << 20)?;
    let cmdline = cmdline("GUEST=work");
    let options = [
        ["--cmdline", &cmdline],
        ["--vcpus", "2"],
        ["--memory", "128"],
        ["--disk", disk.to_str().context("a path")?],
        ["--dir", dir.path().to_str().context("a path")?],
        ["--lines", &LINES.to_string()],
        ["--ask", &VSOCK_PORT.to_string()],
        ["--clones", "20"],
        ["--at-once", "5"],
    ];
    let said = run(world, "snapshot", options.as_flattened())?;
    let of = |name: &str| -> Result<Vec<State>> {
        let line = format!("{name}: ");
        let answer = format!("{name} answers: ");
        let lines = said.lines().filter_map(|said| {
            said.strip_prefix(&line)
                .or_else(|| said.strip_prefix(&answer))
        });
        let states: Vec<State> = lines.map(str::parse).collect::<Result<_>>()?;
        ensure!(states.len() == LINES + 1, "{name}: {said}");
        for state in &states {
            state.check().with_context(|| name.to_owned())?;
        }
        for pair in states[..LINES].windows(2) {
            ensure!(pair[1].step == pair[0].step + 1, "{name}: {said}");
            ensure!(pair[1].ticks >= pair[0].ticks, "{name}: {said}");
        }
        // It worked on meanwhile, the timer too.
        ensure!(
            states[LINES].step >= states[LINES - 1].step,
            "{name}: {said}"
        );
        Ok(states)
    };
    let original = of("original")?;
    let clones = (0..20).map(|n| format!("clone {n}"));
    let beside = (0..5).map(|n| format!("beside {n}"));
    let mut began = Vec::new();
    for name in clones.chain(beside) {
        began.push(of(&name)?[0]);
    }
    // All of them where the original was, or it would have said more.
    ensure!(
        began
            .iter()
            .all(|state| state.step == began[0].step && state.hash == began[0].hash),
        "{began:?}"
    );
    ensure!(began[0].step > original[LINES - 1].step, "{said}");
    Ok(())
}

/// Runs an example on the installed kernel and the guest program; all it said.
fn run(world: &World, example: &str, options: &[&str]) -> Result<String> {
    let ours = std::env::current_exe().context("find this program")?;
    let archive: PathBuf = world.files()?.join("example.cpio");
    let init = Initramfs::of_program(&ours.with_file_name("guest"))?;
    std::fs::write(&archive, init.finish()).context("write an initramfs")?;
    let mut command = Command::new(ours.with_file_name(format!("example-{example}")));
    command
        .arg("--kernel")
        .arg(bad::kernel()?)
        .arg("--initramfs")
        .arg(&archive)
        .args(options);
    let finished = Program::run(command, world.host.deadline)?;
    let said = format!("{}{}", finished.text(), finished.errors());
    finished.success().with_context(|| said.clone())?;
    Ok(said)
}
