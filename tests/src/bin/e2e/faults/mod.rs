//! Something dies, hangs or runs out, at each step of a container's life: the end is told as what it
//! was, the task can be deleted, and nothing remains.

mod daemon;
mod deaths;
mod guests;
mod limits;
mod many;
mod neighbours;
mod saboteur;
mod silence;

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use libtest_mimic::Trial;
use serde_json::json;
use supermachine_tests::bundle::Bundle;
use supermachine_tests::shim::{Event, Shim, ShimConfig, new_id};
use supermachine_tests::until;

use crate::leftovers::freeze;
use crate::support::{World, equal};

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    [
        deaths::tests(world),
        guests::tests(world),
        silence::tests(world),
        limits::tests(world),
        daemon::tests(world),
        many::tests(world),
        neighbours::tests(world),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Where a container is in its life; the call of that step is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Create,
    Start,
    /// Waited for.
    Running,
    Exec,
    Kill,
    /// When it has ended by itself, with 0.
    Delete,
}

impl Step {
    const ALL: [Self; 6] = [
        Self::Create,
        Self::Start,
        Self::Running,
        Self::Exec,
        Self::Kill,
        Self::Delete,
    ];
}

/// A shim and a bundle for a busybox command.
fn shim(world: &World, config: &ShimConfig, args: &[&str]) -> Result<(Shim, Bundle)> {
    let id = new_id();
    let bundles = world.files()?.join("bundles");
    let bundle = Bundle::new(&bundles, &id, &world.busybox()?, args)?;
    Ok((Shim::start(config, &id, &bundle.dir)?, bundle))
}

/// An OCI process that is exec'd.
fn process(args: &[&str]) -> serde_json::Value {
    json!({ "args": args, "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 } })
}

const EXEC: &str = "exec";

/// A call that is under way while something happens to who is to answer it.
struct Interrupted {
    shim: Shim,
    vmm: u32,
    /// What became of it.
    call: Result<()>,
    took: Duration,
}

/// Brings a container to `step` and has its call made while the guest can't answer: it does not get
/// as far as an agent, or its VMM is stopped. Then `fault` happens to the shim and the VMM, which is
/// given.
fn interrupt(
    world: &World,
    config: &ShimConfig,
    step: Step,
    fault: impl FnOnce(&Shim, u32) -> Result<()>,
) -> Result<Interrupted> {
    let args: &[&str] = match step {
        Step::Delete => &["true"],
        _ => &["sleep", "1000"],
    };
    let (shim, bundle) = shim(world, config, args)?;
    let mut vmm = 0;
    if step != Step::Create {
        vmm = shim.create(&bundle)?;
    }
    if !matches!(step, Step::Create | Step::Start) {
        shim.start_task()?;
    }
    match step {
        Step::Exec => shim.exec_with(EXEC, &process(&["true"]), |_| {})?,
        Step::Delete => equal(shim.wait()?.exit_status, 0)?,
        _ => {}
    }
    if !matches!(step, Step::Create | Step::Running) {
        freeze(vmm)?;
    }
    let (begins, begun) = mpsc::channel();
    let call = || {
        let start = Instant::now();
        // The receiver outlives the thread.
        let _ = begins.send(());
        let result = match step {
            Step::Create => shim.create(&bundle).map(drop),
            Step::Start => shim.start_task().map(drop),
            Step::Running => shim.wait().map(drop),
            Step::Exec => shim.start_exec(EXEC),
            Step::Kill => shim.kill(15),
            Step::Delete => shim.delete().map(drop),
        };
        (result, start.elapsed())
    };
    let (call, took) = thread::scope(|scope| {
        let call = scope.spawn(call);
        begun.recv()?;
        if step == Step::Create {
            vmm = booting(world, &shim)?;
        }
        // Answered after the call has arrived, whatever the answer is.
        let asked = Instant::now();
        let _ = shim.state();
        soon(asked, Duration::ZERO, "State")?;
        fault(&shim, vmm)?;
        call.join().map_err(|_| anyhow!("the call panicked"))
    })?;
    Ok(Interrupted {
        shim,
        vmm,
        call,
        took,
    })
}

/// The VMM process of a container that is being created.
fn booting(world: &World, shim: &Shim) -> Result<u32> {
    let mut vmm = None;
    until("a VMM process", world.host.deadline, || {
        vmm = shim.recorded_vmm()?;
        Ok(vmm.is_some())
    })?;
    vmm.context("no VMM process")
}

/// What hung must not hold up: an answer comes within 2 s of its deadline.
fn soon(since: Instant, deadline: Duration, what: &str) -> Result<()> {
    let took = since.elapsed();
    ensure!(
        took < deadline + Duration::from_secs(2),
        "{what} took {took:?}, with a deadline of {deadline:?}"
    );
    Ok(())
}

/// The events so far are these, but for those of execs being added.
fn told(shim: &Shim, expected: &[Event]) -> Result<()> {
    for event in expected {
        let mut found = shim.event()?;
        while matches!(found, Event::Other(_)) {
            found = shim.event()?;
        }
        ensure!(found == *event, "found {found:?}, expected {event:?}");
    }
    Ok(())
}

/// Its end is known and as expected, and it can be deleted.
fn ended(shim: &Shim, status: u32) -> Result<()> {
    equal(shim.wait()?.exit_status, status)?;
    let state = shim.state()?;
    equal(state.status.enum_value_or_default() as i32, 3)?;
    equal(state.exit_status, status)?;
    equal(shim.delete()?.exit_status, status)
}

/// The end of the container itself.
fn exit(shim: &Shim, status: u32) -> Event {
    let id = shim.id.clone();
    Event::Exit { id, status }
}
