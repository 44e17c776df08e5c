//! OCI hooks: the same ones, in the same order, with the same state as from runc.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use supermachine_tests::bundle::Bundle;
use supermachine_tests::fifo::Fifo;
use supermachine_tests::shim::new_id;

use super::{Machine, Reference, Side, containerds_spec, files};
use crate::support::{World, equal};

/// Those that run on the host.
const HOOKS: [&str; 4] = ["prestart", "createRuntime", "poststart", "poststop"];

pub(super) fn told(world: &World) -> Result<()> {
    let spec = containerds_spec(world)?;
    let mut theirs = of_a_life(world, &spec, Reference::run, drop)?;
    let mut ours = of_a_life(world, &spec, Machine::run, |side| {
        let end = || {
            side.shim.kill(9)?;
            side.shim.wait()?;
            side.shim.delete()
        };
        // What it failed to do is missing in what the hooks were told.
        drop(end());
    })?;
    let names: Vec<_> = ours.iter().map(|(name, _)| name.as_str()).collect();
    equal(names, HOOKS.to_vec())?;
    // poststart comes once the program runs, and its state is to say so (OCI runtime specification,
    // "State"). runc takes it down before.
    for (told, status) in [(&mut ours, "running"), (&mut theirs, "created")] {
        let (_, state) = told.get_mut(2).context("no poststart")?;
        equal(state["status"].take().as_str(), Some(status))?;
    }
    ensure!(ours == theirs, "ours: {ours:#?}, runc's: {theirs:#?}");
    Ok(())
}

/// What each hook was told in the life of a container.
fn of_a_life<S: Side>(
    world: &World,
    spec: &Value,
    run: fn(&World, &Bundle, &str, &Fifo) -> Result<S>,
    end: fn(S),
) -> Result<Vec<(String, Value)>> {
    let id = new_id();
    let parent = world.files()?.join("spec");
    let bundle = Bundle::new(&parent, &id, &files(world)?, &["sleep", "1000"])?;
    let told = bundle.dir.join("told");
    let mut spec = spec.clone();
    spec["root"]["path"] = json!("rootfs");
    spec["linux"]["cgroupsPath"] = json!(format!("/supermachine-tests/{id}"));
    spec["process"]["args"] = json!(["sleep", "1000"]);
    spec["annotations"] = json!({"org.example.key": "value"});
    for name in HOOKS {
        // Its variables are those that are given to it, and its input is the state.
        let script = "{ printf '%s ' \"$HOOK\"; tr -d '\\n'; echo; } >> \"$TOLD\"";
        spec["hooks"][name] = json!([{
            "path": "/bin/sh",
            "args": ["hook", "-c", script],
            "env": [format!("HOOK={name}"), format!("TOLD={}", told.display())],
        }]);
    }
    bundle.write_config(&spec)?;
    let output = Fifo::new(&bundle.dir.join("output"))?;
    end(run(world, &bundle, &id, &output)?);
    let text = fs::read_to_string(&told).context("no hook ran")?;
    text.lines()
        .map(|line| {
            let (name, state) = line.split_once(' ').context("no state")?;
            let mut state: Value = serde_json::from_str(state)?;
            equal(state["id"].as_str(), Some(id.as_str()))?;
            equal(state["bundle"].as_str(), bundle.dir.to_str())?;
            // What differs from one life to the next, or by who wrote it.
            for (key, value) in state.as_object_mut().context("no object")? {
                match key.as_str() {
                    "id" | "bundle" | "ociVersion" => *value = Value::Null,
                    // A container that has ended has none.
                    "pid" => *value = json!(value.as_u64() > Some(0)),
                    _ => {}
                }
            }
            Ok((name.to_owned(), state))
        })
        .collect()
}
