//! What a user may get wrong: an error that says so, and nothing left.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::BUSYBOX;
use supermachine_tests::host::unique;

use crate::support::{World, equal};

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.test("refused::command_not_found", command_not_found),
        world.test("refused::two_of_one_name", two_of_one_name),
    ]
}

fn command_not_found(world: &World) -> Result<()> {
    let finished = world.host.container(BUSYBOX).run(&["/no/such/command"])?;
    ensure!(!finished.status.success(), "it succeeded");
    let errors = finished.errors();
    ensure!(
        errors.contains("/no/such/command"),
        "does not name the command: {errors}"
    );
    equal(finished.text().as_str(), "")
}

fn two_of_one_name(world: &World) -> Result<()> {
    let id = unique("twin");
    let container = world
        .host
        .container(BUSYBOX)
        .named(&id)
        .detach(&["sleep", "1000"])?;
    let args = [
        "run",
        "--runtime",
        &world.host.runtime,
        BUSYBOX,
        &id,
        "true",
    ];
    let second = world.host.ctr(&args)?;
    ensure!(!second.status.success(), "it succeeded");
    ensure!(
        second.errors().contains("already exists"),
        "found {:?}",
        second.errors()
    );
    equal(
        container.exec(&["echo", "alive"])?.success()?.as_str(),
        "alive",
    )
}
