//! The guest hangs: whatever the host can answer by itself it does, and the rest within 2 s of its
//! deadline.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libtest_mimic::Trial;
use supermachine_tests::shim::{Event, Shim, ShimConfig, refusal};
use supermachine_tests::until;
use ttrpc::Code;

use super::saboteur::{Fate, When, configured_with};
use super::{EXEC, Interrupted, Step, ended, exit, interrupt, process, shim, soon, told};
use crate::bad::configured;
use crate::initramfs;
use crate::leftovers::{freeze, leaves_nothing};
use crate::support::{World, equal};

const BOOT: Duration = Duration::from_secs(5);
/// Longer than a guest that doesn't hang takes on a slow and busy machine.
const CALL: Duration = Duration::from_secs(8);
const STOP: Duration = Duration::from_secs(4);

/// The same, as they are configured.
const CALL_AND_STOP: [(&str, &str, &str); 2] = [
    ("timeouts", "call", "\"8s\""),
    ("timeouts", "stop", "\"4s\""),
];

pub(super) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("faults::vmm_stopped_at_each_step", vmm_stopped),
        world.vm_test("faults::agent_in_circles", agent_in_circles),
    ]
}

/// A stopped VMM process says nothing at all, whoever asks.
fn vmm_stopped(world: &World) -> Result<()> {
    for step in Step::ALL {
        if step == Step::Running {
            // Nothing is asked of it.
            continue;
        }
        leaves_nothing(world, || {
            let config = configuration(world, step)?;
            let interrupted = interrupt(world, &config, step, |_, vmm| freeze(vmm))?;
            is_told(step, interrupted)
        })
        .with_context(|| format!("{step:?}"))?;
    }
    Ok(())
}

fn configuration(world: &World, step: Step) -> Result<ShimConfig> {
    if step != Step::Create {
        return configured(world, &CALL_AND_STOP);
    }
    let silent = initramfs::silent(world)?;
    let keys = [
        ("kernel", "initramfs", silent.as_str()),
        ("timeouts", "boot", "\"5s\""),
    ];
    configured(world, &keys)
}

fn is_told(step: Step, interrupted: Interrupted) -> Result<()> {
    let Interrupted {
        shim,
        vmm,
        call,
        took,
    } = interrupted;
    let begun = Instant::now().checked_sub(took).context("a long call")?;
    let start = Event::Start { pid: vmm };
    match step {
        Step::Create => {
            soon(begun, BOOT, "Create")?;
            refusal(call)?;
            return equal(refusal(shim.state())?.0, Code::NOT_FOUND);
        }
        Step::Start => {
            soon(begun, CALL, "Start")?;
            equal(refusal(call)?.0, Code::DEADLINE_EXCEEDED)?;
            // In no known state, it was ended.
            told(&shim, &[Event::Create, exit(&shim, 255)])?;
            return ended(&shim, 255);
        }
        Step::Exec => {
            soon(begun, CALL, "Start of an exec")?;
            equal(refusal(call)?.0, Code::DEADLINE_EXCEEDED)?;
        }
        Step::Kill => {
            soon(begun, CALL, "Kill")?;
            equal(refusal(call)?.0, Code::DEADLINE_EXCEEDED)?;
        }
        Step::Delete => {
            soon(begun, STOP, "Delete")?;
            call?;
            told(&shim, &[Event::Create, start, exit(&shim, 0)])?;
            return told(&shim, &[Event::Delete { status: 0 }]);
        }
        Step::Running => {}
    }
    killed_from_outside(&shim)?;
    told(&shim, &[Event::Create, start, exit(&shim, 137)])
}

/// What can't be killed from inside is killed from outside.
fn killed_from_outside(shim: &Shim) -> Result<()> {
    let asked = Instant::now();
    shim.kill(9)?;
    soon(asked, CALL, "Kill")?;
    equal(shim.wait()?.exit_status, 137)?;
    let asked = Instant::now();
    ended(shim, 137)?;
    soon(asked, STOP, "Delete")
}

/// The machine runs, as fast as it can, and does nothing.
fn agent_in_circles(world: &World) -> Result<()> {
    let fate = Fate::Hang;
    leaves_nothing(world, || {
        let config = configured_with(world, When::Told, fate, &CALL_AND_STOP)?;
        let script = format!("{}; sleep 1000", fate.command());
        let (shim, bundle) = shim(world, &config, &["sh", "-c", &script])?;
        shim.create(&bundle)?;
        shim.start_task()?;
        // A signal that does nothing, until nobody takes it.
        until("the agent to hang", world.host.deadline, || {
            let asked = Instant::now();
            let answer = shim.kill(18);
            soon(asked, CALL, "Kill")?;
            Ok(answer.is_err() && refusal(answer)?.0 == Code::DEADLINE_EXCEEDED)
        })?;
        let asked = Instant::now();
        equal(shim.state()?.status.enum_value_or_default() as i32, 2)?;
        soon(asked, Duration::ZERO, "State")?;
        shim.exec_with(EXEC, &process(&["true"]), |_| {})?;
        let asked = Instant::now();
        let (code, text) = refusal(shim.start_exec(EXEC))?;
        equal(code, Code::DEADLINE_EXCEEDED).context(text)?;
        soon(asked, CALL, "Start of an exec")?;
        killed_from_outside(&shim)
    })
}
