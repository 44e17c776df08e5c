//! A shim driven as containerd drives it: order of calls and events.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::bundle::Bundle;
use supermachine_tests::shim::{Event, Shim, new_id, refusal};
use ttrpc::Code;

use crate::leftovers::{kill_9, leaves_nothing};
use crate::support::{World, equal};

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("driven::events_in_order", events_in_order),
        world.vm_test("driven::waits_from_before_the_start", waits),
        world.vm_test("driven::calls_out_of_order", calls_out_of_order),
        world.vm_test("driven::second_create_of_one_id", second_create),
        world.vm_test("driven::vmm_killed", vmm_killed),
        world.vm_test("driven::deleted_before_start", deleted_before_start),
    ]
}

/// A shim and a bundle for a busybox command.
pub(crate) fn shim(world: &World, args: &[&str]) -> Result<(Shim, Bundle)> {
    let id = new_id();
    let bundle = Bundle::new(
        &world.files()?.join("bundles"),
        &id,
        &world.busybox()?,
        args,
    )?;
    Ok((Shim::start(&world.shim()?, &id, &bundle.dir)?, bundle))
}

fn events_in_order(world: &World) -> Result<()> {
    leaves_nothing(world, || {
        let (shim, bundle) = shim(world, &["sh", "-c", "exit 5"])?;
        let created = shim.create(&bundle)?;
        let pid = shim.start_task()?;
        equal(pid, created)?;
        equal(shim.wait()?.exit_status, 5)?;
        let id = shim.id.clone();
        shim.expect_events(&[
            Event::Create,
            Event::Start { pid },
            Event::Exit { id, status: 5 },
        ])?;
        equal(shim.delete()?.exit_status, 5)?;
        shim.expect_events(&[Event::Delete { status: 5 }])
    })
}

/// containerd asks for the end as soon as the task is created.
fn waits(world: &World) -> Result<()> {
    let (shim, bundle) = shim(world, &["sh", "-c", "exit 6"])?;
    shim.create(&bundle)?;
    let statuses = std::thread::scope(|scope| {
        let early = scope.spawn(|| shim.wait());
        shim.start_task()?;
        let late = scope.spawn(|| shim.wait());
        [early, late]
            .into_iter()
            .map(|wait| wait.join().map_err(|_| anyhow::anyhow!("a panic"))?)
            .map(|answer| Ok(answer?.exit_status))
            .collect::<Result<Vec<_>>>()
    })?;
    equal(statuses, vec![6, 6])?;
    // And when it has ended already.
    equal(shim.wait()?.exit_status, 6)?;
    shim.delete().map(drop)
}

fn calls_out_of_order(world: &World) -> Result<()> {
    let (shim, bundle) = shim(world, &["sleep", "1000"])?;
    equal(refusal(shim.state())?.0, Code::NOT_FOUND)?;
    shim.create(&bundle)?;
    equal(shim.state()?.status.enum_value_or_default() as i32, 1)?;
    shim.start_task()?;
    equal(refusal(shim.start_task())?.0, Code::FAILED_PRECONDITION)?;
    equal(refusal(shim.delete())?.0, Code::FAILED_PRECONDITION)?;
    equal(shim.state()?.status.enum_value_or_default() as i32, 2)?;
    shim.kill(9)?;
    equal(shim.wait()?.exit_status, 137)?;
    equal(shim.state()?.status.enum_value_or_default() as i32, 3)?;
    shim.delete()?;
    equal(refusal(shim.delete())?.0, Code::NOT_FOUND)
}

fn second_create(world: &World) -> Result<()> {
    let (shim, bundle) = shim(world, &["sleep", "1000"])?;
    let pid = shim.create(&bundle)?;
    let (code, message) = refusal(shim.create(&bundle))?;
    equal(code, Code::ALREADY_EXISTS)?;
    ensure!(
        message.contains(&shim.id),
        "does not name the container: {message}"
    );
    // The first is none the worse.
    equal(shim.start_task()?, pid)?;
    shim.kill(9)?;
    equal(shim.wait()?.exit_status, 137)?;
    shim.delete().map(drop)
}

fn vmm_killed(world: &World) -> Result<()> {
    leaves_nothing(world, || {
        let (shim, bundle) = shim(world, &["sleep", "1000"])?;
        shim.create(&bundle)?;
        let pid = shim.start_task()?;
        kill_9(pid)?;
        equal(shim.wait()?.exit_status, 137)?;
        let id = shim.id.clone();
        shim.expect_events(&[
            Event::Create,
            Event::Start { pid },
            Event::Exit { id, status: 137 },
        ])?;
        equal(shim.delete()?.exit_status, 137)
    })
}

fn deleted_before_start(world: &World) -> Result<()> {
    leaves_nothing(world, || {
        let (shim, bundle) = shim(world, &["sleep", "1000"])?;
        shim.create(&bundle)?;
        shim.delete().map(drop)
    })
}
