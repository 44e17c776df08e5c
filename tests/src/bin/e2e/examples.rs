//! The examples of the VMM crate, as its README shows them.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::initramfs::Initramfs;
use supermachine_tests::program::Program;

use crate::bad;
use crate::support::World;

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("examples::boot", boot),
        world.vm_test("examples::balloon", balloon),
    ]
}

fn boot(world: &World) -> Result<()> {
    // The guest has nothing to do, says so and resets.
    let said = run(
        world,
        "boot",
        &["--cmdline", "console=ttyS0 quiet reboot=t panic=-1"],
    )?;
    ensure!(said.contains("guest: GUEST="), "{said}");
    ensure!(said.contains("The VM ended: "), "{said}");
    Ok(())
}

fn balloon(world: &World) -> Result<()> {
    let cmdline = "console=ttyS0 quiet reboot=t panic=-1 GUEST=wait";
    let options = ["--cmdline", cmdline, "--memory", "256", "--take", "100"];
    let said = run(world, "balloon", &options)?;
    ensure!(
        said.contains("inflated: the balloon holds 100 MiB"),
        "{said}"
    );
    ensure!(said.contains("deflated: the balloon holds 0 MiB"), "{said}");
    ensure!(said.contains("the VM ended: "), "{said}");
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
