//! The shim or the VMM process is killed, at each step.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::shim::{Event, ShimConfig, refusal};
use ttrpc::Code;

use super::{EXEC, Interrupted, Step, ended, exit, interrupt, told};
use crate::bad::configured;
use crate::initramfs;
use crate::leftovers::{kill_9, leaves_nothing};
use crate::support::{World, equal};

pub(super) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("faults::shim_killed_at_each_step", shim_killed),
        world.vm_test("faults::vmm_killed_at_each_step", vmm_killed),
    ]
}

/// What never gets as far as an agent stays in Create.
pub(super) fn configuration(world: &World, step: Step) -> Result<ShimConfig> {
    if step != Step::Create {
        return world.shim();
    }
    let silent = initramfs::silent(world)?;
    let keys = [
        ("kernel", "initramfs", silent.as_str()),
        ("timeouts", "boot", "\"60s\""),
    ];
    configured(world, &keys)
}

fn shim_killed(world: &World) -> Result<()> {
    for step in Step::ALL {
        leaves_nothing(world, || {
            let config = configuration(world, step)?;
            let kill = |shim: &_, _| kill_9(supermachine_tests::shim::Shim::pid(shim)?);
            let Interrupted {
                shim, vmm, call, ..
            } = interrupt(world, &config, step, kill)?;
            ensure!(call.is_err(), "a dead shim answered");
            // containerd finds the connection broken, and tells what this answers.
            let told = shim.clean_up()?;
            equal((told.exit_status, told.pid), (137, vmm))
        })
        .with_context(|| format!("{step:?}"))?;
    }
    Ok(())
}

fn vmm_killed(world: &World) -> Result<()> {
    for step in Step::ALL {
        leaves_nothing(world, || {
            let config = configuration(world, step)?;
            let interrupted = interrupt(world, &config, step, |_, vmm| kill_9(vmm))?;
            told_of_the_vmm(step, interrupted)
        })
        .with_context(|| format!("{step:?}"))?;
    }
    Ok(())
}

fn told_of_the_vmm(step: Step, interrupted: Interrupted) -> Result<()> {
    let Interrupted {
        shim, vmm, call, ..
    } = interrupted;
    let start = Event::Start { pid: vmm };
    match step {
        Step::Create => {
            let (_, text) = refusal(call)?;
            ensure!(
                text.contains("killed by signal 9"),
                "not the reason: {text}"
            );
            return equal(refusal(shim.state())?.0, Code::NOT_FOUND);
        }
        Step::Start => {
            let (_, text) = refusal(call)?;
            ensure!(
                text.contains("killed by signal 9"),
                "not the reason: {text}"
            );
            told(&shim, &[Event::Create, exit(&shim, 137)])?;
        }
        Step::Running => {
            call?;
            told(&shim, &[Event::Create, start, exit(&shim, 137)])?;
        }
        Step::Exec => {
            let (_, text) = refusal(call)?;
            ensure!(
                text.contains("killed by signal 9"),
                "not the reason: {text}"
            );
            told(&shim, &[Event::Create, start, exit(&shim, 137)])?;
            // As containerd does after an exec that didn't start.
            shim.delete_exec(EXEC)?;
        }
        Step::Kill => {
            let (code, text) = refusal(call)?;
            equal(code, Code::NOT_FOUND).context(text)?;
            told(&shim, &[Event::Create, start, exit(&shim, 137)])?;
        }
        Step::Delete => {
            call?;
            let events = [Event::Create, start, exit(&shim, 0)];
            told(&shim, &events)?;
            return told(&shim, &[Event::Delete { status: 0 }]);
        }
    }
    ended(&shim, 137)?;
    told(&shim, &[Event::Delete { status: 137 }])
}
