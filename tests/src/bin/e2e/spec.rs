//! The OCI configuration, key by key: the same bundle under runc and in a microVM, and everything
//! that a process sees of it compared.
//!
//! Two containers of each kind, with nearly every key set between them; rows are processes exec'd
//! in them with a process object of their own.

mod compare;
mod hooks;
mod refusals;
mod table;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use libtest_mimic::Trial;
use serde_json::{Value, json};
use supermachine_tests::BUSYBOX;
use supermachine_tests::bundle::{self, Bundle};
use supermachine_tests::fifo::Fifo;
use supermachine_tests::host::unique;
use supermachine_tests::runc::Runc;
use supermachine_tests::shim::{Shim, new_id};

use crate::support::World;
use table::{Case, Row};

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("spec::everything_set", everything_set),
        world.vm_test("spec::as_little_as_possible", as_little_as_possible),
        world.vm_test("spec::hooks", hooks::told),
        world.vm_test("spec::texts_of_refusals", refusals::texts),
    ]
}

fn everything_set(world: &World) -> Result<()> {
    run(world, &table::everything_set())
}

fn as_little_as_possible(world: &World) -> Result<()> {
    run(world, &table::as_little_as_possible())
}

/// busybox's files with the probe among them.
fn files(world: &World) -> Result<PathBuf> {
    let files = world.files()?.join("probed");
    if !files.exists() {
        let archive = std::env::var_os("SUPERMACHINE_IMAGES").context("no images")?;
        bundle::unpack(&PathBuf::from(archive).join("busybox.tar"), &files)?;
        let ours = std::env::current_exe()?;
        fs::copy(ours.with_file_name("probe"), files.join("probe")).context("install the probe")?;
    }
    Ok(files)
}

/// What containerd makes of `ctr run --seccomp`: the base that cases change.
pub(super) fn containerds_spec(world: &World) -> Result<Value> {
    let id = unique("spec");
    let create = ["containers", "create", "--seccomp", BUSYBOX, &id, "/probe"];
    world.host.ctr(&create)?.success()?;
    let info = world.host.ctr(&["containers", "info", &id])?.success();
    world.host.ctr(&["containers", "delete", &id])?.success()?;
    let info: Value = serde_json::from_str(&info?)?;
    Ok(info["Spec"].clone())
}

/// RFC 7386: objects are merged, null removes, all else replaces.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            if let Some(object) = target.as_object_mut() {
                object.remove(key);
            }
        } else {
            merge(&mut target[key], value);
        }
    }
}

fn run(world: &World, case: &Case) -> Result<()> {
    let mut spec = containerds_spec(world)?;
    merge(&mut spec, &case.patch);
    let theirs = seen(world, case, &spec, Reference::run)?;
    let ours = seen(world, case, &spec, Machine::run)?;
    let mut differences = Vec::new();
    // The first is the container's own process.
    let allowed = std::iter::once(&[][..]).chain(case.rows.iter().map(|row| row.allowed));
    for (((name, ours), (_, theirs)), allowed) in ours.iter().zip(&theirs).zip(allowed) {
        for difference in compare::differences(ours, theirs, allowed) {
            differences.push(format!("{name}: {difference}"));
        }
    }
    if !differences.is_empty() {
        bail!(
            "{} differences:\n{}",
            differences.len(),
            differences.join("\n")
        );
    }
    Ok(())
}

/// A container that runs the probe, and takes more of them.
trait Side: Sized {
    fn run(world: &World, bundle: &Bundle, id: &str, output: &Fifo) -> Result<Self>;
    /// What a process of the container sees.
    fn exec(&self, bundle: &Bundle, row: &Row, process: &Value) -> Result<String>;
}

/// What the first process and each row's see.
fn seen<S: Side>(
    world: &World,
    case: &Case,
    spec: &Value,
    run: fn(&World, &Bundle, &str, &Fifo) -> Result<S>,
) -> Result<Vec<(String, Value)>> {
    let id = new_id();
    let parent = world.files()?.join("spec");
    let bundle = Bundle::new(&parent, &id, &files(world)?, &["/probe"])?;
    let mut spec = spec.clone();
    spec["root"]["path"] = json!("rootfs");
    spec["linux"]["cgroupsPath"] = json!(format!("/supermachine-tests/{id}"));
    let process = spec["process"].clone();
    spec["process"]["args"] = json!(case.probe(&["--stay"]));
    bundle.write_config(&spec)?;
    let mut output = Fifo::new(&bundle.dir.join("output"))?;
    let side = run(world, &bundle, &id, &output).with_context(|| case.name)?;
    let first = output.line(world.host.deadline)?;
    let mut all = vec![(case.name.to_owned(), parse(&first)?)];
    for row in &case.rows {
        let mut process = process.clone();
        process["args"] = json!(case.probe(&["--calls"]));
        merge(&mut process, &row.patch);
        let line = side
            .exec(&bundle, row, &process)
            .with_context(|| row.name)?;
        all.push((
            format!("{}, {}", case.name, row.name),
            parse(&line).context(row.name)?,
        ));
    }
    Ok(all)
}

fn parse(line: &str) -> Result<Value> {
    serde_json::from_str(line.trim()).with_context(|| format!("the probe said {line:?}"))
}

/// runc.
struct Reference(Runc);

impl Side for Reference {
    fn run(world: &World, bundle: &Bundle, id: &str, output: &Fifo) -> Result<Self> {
        Ok(Self(Runc::run(bundle, id, output, world.host.deadline)?))
    }

    fn exec(&self, _: &Bundle, row: &Row, process: &Value) -> Result<String> {
        match row.terminal {
            Some((columns, rows)) => self.0.exec_in_terminal(process, columns, rows),
            // What it says of the process itself stands in stdout too.
            None => self.0.exec(process)?.success(),
        }
    }
}

/// A microVM, by its shim.
struct Machine {
    shim: Shim,
    deadline: std::time::Duration,
}

impl Side for Machine {
    fn run(world: &World, bundle: &Bundle, id: &str, output: &Fifo) -> Result<Self> {
        let shim = Shim::start(&world.shim()?, id, &bundle.dir)?;
        let mount = shim.overlay(bundle)?;
        shim.create_with(|request| {
            request.rootfs = vec![mount];
            request.stdout = output.path.display().to_string();
        })?;
        shim.start_task()?;
        let deadline = world.host.deadline;
        Ok(Self { shim, deadline })
    }

    fn exec(&self, bundle: &Bundle, row: &Row, process: &Value) -> Result<String> {
        let exec_id = unique("row");
        let mut output = Fifo::new(&bundle.dir.join(&exec_id))?;
        self.shim.exec_with(&exec_id, process, |request| {
            request.terminal = row.terminal.is_some();
            request.stdout = output.path.display().to_string();
            request.stderr = bundle.dir.join("output").display().to_string();
        })?;
        self.shim.start_exec(&exec_id)?;
        let line = output.line(self.deadline)?;
        self.shim.end_exec(&exec_id)?;
        Ok(line)
    }
}
