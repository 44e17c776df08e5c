//! The guest hangs: whatever the host can answer by itself it does, and the rest within 2 s of its
//! deadline.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libtest_mimic::Trial;
use supermachine_tests::shim::{Shim, refusal};
use supermachine_tests::until;
use ttrpc::Code;

use super::saboteur::{Fate, configured_with};
use super::{EXEC, ended, process, shim, soon};
use crate::leftovers::leaves_nothing;
use crate::support::{World, equal};

const CALL: Duration = Duration::from_secs(3);
const STOP: Duration = Duration::from_secs(2);

/// The same, as they are configured.
const CALL_AND_STOP: [(&str, &str, &str); 2] = [
    ("timeouts", "call", "\"3s\""),
    ("timeouts", "stop", "\"2s\""),
];

pub(super) fn tests(world: &World) -> Vec<Trial> {
    vec![world.vm_test("faults::agent_in_circles", agent_in_circles)]
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
        let config = configured_with(world, fate, &CALL_AND_STOP)?;
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
