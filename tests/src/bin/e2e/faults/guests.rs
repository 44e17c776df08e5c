//! The guest ends by itself, at each step: its kernel panics, or its agent dies.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::shim::{Event, refusal};
use supermachine_tests::until;
use ttrpc::Code;

use super::saboteur::{Fate, LATER, NEXT, When, configured_with};
use super::{EXEC, ended, exit, process, shim, told};
use crate::leftovers::leaves_nothing;
use crate::support::{World, equal};

/// What containerd calls an end that nobody saw.
const UNKNOWN: u32 = 255;

pub(super) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("faults::guest_ends_in_create", in_create),
        world.vm_test("faults::guest_ends_in_start", in_start),
        world.vm_test("faults::guest_ends_in_exec", in_exec),
        world.vm_test("faults::guest_ends_in_kill", in_kill),
        world.vm_test("faults::guest_ends_before_delete", before_delete),
        world.vm_test("faults::guest_ends_within_create", within_create),
        world.vm_test("faults::guest_ends_within_start", within_start),
        world.vm_test("faults::guest_ends_within_exec", within_exec),
    ]
}

/// What a kernel that panics says of either.
fn reason(fate: Fate) -> &'static str {
    match fate {
        Fate::Panic => "Kernel panic - not syncing: Out of memory",
        Fate::Die | Fate::Hang => "Kernel panic - not syncing: Attempted to kill init!",
    }
}

/// Does it with a guest whose kernel panics, then with one whose agent dies: `work` says what of it
/// failed, and leaves nothing.
fn either(world: &World, work: impl Fn(Fate) -> Result<()>) -> Result<()> {
    [Fate::Panic, Fate::Die].into_iter().try_for_each(|fate| {
        leaves_nothing(world, || work(fate)).with_context(|| format!("{fate:?}"))
    })
}

/// The error of Create has the kernel's last words.
fn in_create(world: &World) -> Result<()> {
    either(world, |fate| create_fails(world, When::Boot, fate))
}

/// The same once the agent was asked for the container.
fn within_create(world: &World) -> Result<()> {
    either(world, |fate| create_fails(world, When::Create, fate))
}

fn create_fails(world: &World, when: When, fate: Fate) -> Result<()> {
    let config = configured_with(world, when, fate, &[])?;
    let (shim, bundle) = shim(world, &config, &["true"])?;
    let (_, text) = refusal(shim.create(&bundle))?;
    ensure!(text.contains("reset"), "not how it ended: {text}");
    ensure!(text.contains(reason(fate)), "not why it ended: {text}");
    equal(refusal(shim.state())?.0, Code::NOT_FOUND)
}

/// Start fails, and the container has ended without having run.
fn within_start(world: &World) -> Result<()> {
    either(world, |fate| {
        let config = configured_with(world, When::Start, fate, &[])?;
        let (shim, bundle) = shim(world, &config, &["true"])?;
        shim.create(&bundle)?;
        let (_, text) = refusal(shim.start_task())?;
        ensure!(text.contains(reason(fate)), "not why it ended: {text}");
        ended(&shim, UNKNOWN)
    })
}

/// The exec's start fails, and everything has ended.
fn within_exec(world: &World) -> Result<()> {
    either(world, |fate| {
        let config = configured_with(world, When::Exec, fate, &[])?;
        let (shim, bundle) = shim(world, &config, &["sleep", "1000"])?;
        let pid = shim.create(&bundle)?;
        shim.start_task()?;
        let arming = "arming";
        shim.exec_with(arming, &process(&["sh", "-c", NEXT]), |_| {})?;
        shim.start_exec(arming)?;
        equal(shim.end_exec(arming)?, 0)?;
        shim.exec_with(EXEC, &process(&["true"]), |_| {})?;
        let (_, text) = refusal(shim.start_exec(EXEC))?;
        ensure!(text.contains(reason(fate)), "not why it ended: {text}");
        let start = Event::Start { pid };
        let armed = Event::Exit {
            id: arming.to_owned(),
            status: 0,
        };
        told(&shim, &[Event::Create, start, armed, exit(&shim, UNKNOWN)])?;
        ended(&shim, UNKNOWN)
    })
}

/// The first that its program does is the last.
fn in_start(world: &World) -> Result<()> {
    either(world, |fate| {
        let config = configured_with(world, When::Told, fate, &[])?;
        let script = format!("{}; sleep 1000", fate.command());
        let (shim, bundle) = shim(world, &config, &["sh", "-c", &script])?;
        let pid = shim.create(&bundle)?;
        shim.start_task()?;
        let start = Event::Start { pid };
        told(&shim, &[Event::Create, start, exit(&shim, UNKNOWN)])?;
        ended(&shim, UNKNOWN)?;
        told(&shim, &[Event::Delete { status: UNKNOWN }])
    })
}

/// Every process has ended, the container's first one last.
fn in_exec(world: &World) -> Result<()> {
    either(world, |fate| {
        let config = configured_with(world, When::Told, fate, &[])?;
        let (shim, bundle) = shim(world, &config, &["sleep", "1000"])?;
        let pid = shim.create(&bundle)?;
        shim.start_task()?;
        let script = format!("{}; sleep 1000", fate.command());
        shim.exec_with(EXEC, &process(&["sh", "-c", &script]), |_| {})?;
        shim.start_exec(EXEC)?;
        let start = Event::Start { pid };
        let of_exec = Event::Exit {
            id: EXEC.to_owned(),
            status: UNKNOWN,
        };
        let events = [Event::Create, start, of_exec, exit(&shim, UNKNOWN)];
        told(&shim, &events)?;
        equal(shim.end_exec(EXEC)?, UNKNOWN)?;
        ended(&shim, UNKNOWN)
    })
}

/// A signal is what it dies of.
fn in_kill(world: &World) -> Result<()> {
    either(world, |fate| {
        let config = configured_with(world, When::Told, fate, &[])?;
        let script = format!(
            "trap '{}' TERM; sleep 1000 & while :; do wait; done",
            fate.command()
        );
        let (shim, bundle) = shim(world, &config, &["sh", "-c", &script])?;
        shim.create(&bundle)?;
        shim.start_task()?;
        // Ignored until the shell has set its trap.
        until("the signal to be its end", world.host.deadline, || {
            let _ = shim.kill(15);
            Ok(shim.state()?.status.enum_value_or_default() as i32 == 3)
        })?;
        ended(&shim, UNKNOWN)
    })
}

/// What the container ended with stays, whatever becomes of the guest.
fn before_delete(world: &World) -> Result<()> {
    either(world, |fate| {
        let config = configured_with(world, When::Told, fate, &[])?;
        let script = format!("{LATER}; exit 3");
        let (shim, bundle) = shim(world, &config, &["sh", "-c", &script])?;
        let pid = shim.create(&bundle)?;
        shim.start_task()?;
        equal(shim.wait()?.exit_status, 3)?;
        let machine = std::path::PathBuf::from(format!("/proc/{pid}"));
        until("the machine to end", world.host.deadline, || {
            Ok(!machine.exists())
        })?;
        ended(&shim, 3)?;
        let start = Event::Start { pid };
        told(&shim, &[Event::Create, start, exit(&shim, 3)])?;
        told(&shim, &[Event::Delete { status: 3 }])
    })
}
