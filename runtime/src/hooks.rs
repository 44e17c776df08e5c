//! Running programs of the host around a container's life, as runc runs them: in order, with the
//! container's state on standard input, and its words for what goes wrong.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use oci_spec::runtime::{ContainerState, Hook, Spec, State};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};

use crate::plan;
use crate::request::Create;
use crate::sys::{Process, memory};

/// How much of what a failed hook wrote is shown, of each stream.
const OUTPUT_MAX: u64 = 4096;

/// A hook that failed, in runc's words and with its program's name.
#[derive(Debug, thiserror::Error)]
#[error("error running {point} hook #{index}: {}: {reason}", program.display())]
pub struct Error {
    point: &'static str,
    index: usize,
    program: PathBuf,
    reason: String,
}

/// The hooks of a container, and what they are told of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hooks {
    list: plan::Hooks,
    state: State,
}

/// Hooks to be run once everything else is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Poststop {
    hooks: Vec<Hook>,
    state: State,
}

impl Hooks {
    pub(crate) fn new(list: plan::Hooks, create: &Create, spec: &Spec) -> Self {
        let mut state = State::default();
        state
            .set_version(spec.version().clone())
            .set_id(create.id.to_string())
            .set_bundle(create.bundle.clone())
            .set_annotations(spec.annotations().clone());
        Self { list, state }
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.list == plan::Hooks::default()
    }

    /// The last ones, if there are any.
    pub(crate) fn poststop(&self) -> Option<Poststop> {
        let hooks = self.list.poststop.clone();
        (!hooks.is_empty()).then(|| Poststop {
            hooks,
            state: told(&self.state, ContainerState::Stopped, None),
        })
    }

    /// Runs those that come before the container is made, in a machine whose process is `pid`.
    /// Blocks until they have ended.
    pub(crate) fn before_create(&self, pid: u32) -> Result<(), Error> {
        let state = told(&self.state, ContainerState::Creating, Some(pid));
        run("prestart", &self.list.prestart, &state)?;
        run("createRuntime", &self.list.create_runtime, &state)
    }

    /// Runs those that come once the program runs. Blocks until they have ended.
    pub(crate) fn after_start(&self, pid: u32) -> Result<(), Error> {
        let state = told(&self.state, ContainerState::Running, Some(pid));
        run("poststart", &self.list.poststart, &state)
    }
}

impl Poststop {
    /// Runs them all. Blocks until they have ended. One that fails is told in the log, as there is
    /// nothing left to fail.
    pub(crate) fn run(&self) {
        for (index, hook) in self.hooks.iter().enumerate() {
            if let Err(error) = run_one("poststop", index, hook, &self.state) {
                tracing::warn!(%error, id = self.state.id(), "a hook failed");
            }
        }
    }
}

fn told(state: &State, status: ContainerState, pid: Option<u32>) -> State {
    let mut state = state.clone();
    state
        .set_status(status)
        .set_pid(pid.and_then(|pid| i32::try_from(pid).ok()));
    state
}

fn run(point: &'static str, hooks: &[Hook], state: &State) -> Result<(), Error> {
    let mut hooks = hooks.iter().enumerate();
    hooks.try_for_each(|(index, hook)| run_one(point, index, hook, state))
}

fn run_one(point: &'static str, index: usize, hook: &Hook, state: &State) -> Result<(), Error> {
    let outcome = execute(hook, state).unwrap_or_else(|error| Some(error.to_string()));
    match outcome {
        None => Ok(()),
        Some(reason) => Err(Error {
            point,
            index,
            program: hook.path().clone(),
            reason,
        }),
    }
}

/// Executes a hook; answers why it failed, if it did.
fn execute(hook: &Hook, state: &State) -> io::Result<Option<String>> {
    // Files, not pipes: there is nothing to copy meanwhile, and what a hook leaves running may keep
    // them open.
    let mut input = memory("hook-stdin")?;
    input.write_all(&serde_json::to_vec(state)?)?;
    input.rewind()?;
    let (output, errors) = (memory("hook-stdout")?, memory("hook-stderr")?);

    let mut command = Command::new(hook.path());
    let mut args = hook.args().iter().flatten();
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    command
        .args(args)
        .current_dir(state.bundle())
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(output.try_clone()?))
        .stderr(Stdio::from(errors.try_clone()?))
        .process_group(0);
    // Without any it inherits ours, as under runc.
    if let Some(variables) = hook.env() {
        command.env_clear();
        command.envs(variables.iter().map(|variable| {
            let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
            (name, value)
        }));
    }
    let mut child = command.spawn()?;

    let limit = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok());
    let mut in_time = true;
    if let Some(limit) = limit
        && let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw)
    {
        if let Some(process) = Process::open(child.id())? {
            in_time = process.ends_within(Duration::from_secs(limit))?;
        }
        if !in_time {
            // With whatever it has started. It is not waited for yet, so the number is still its own.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
    let status = child.wait()?;
    if status.success() && in_time {
        return Ok(None);
    }
    let reason = match limit.filter(|_| !in_time) {
        Some(limit) => format!("hook ran past specified timeout of {limit}s"),
        None => match status.code() {
            Some(code) => format!("exit status {code}"),
            None => status.to_string(),
        },
    };
    let (output, errors) = (beginning(output)?, beginning(errors)?);
    Ok(Some(format!(
        "{reason}, stdout: {output}, stderr: {errors}"
    )))
}

/// What a stream begins with, without the white space around it.
fn beginning(mut stream: File) -> io::Result<String> {
    stream.rewind()?;
    let mut bytes = Vec::new();
    stream.take(OUTPUT_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;
    use crate::request::Stdio;

    /// The hooks of a container whose configuration has these.
    fn hooks(bundle: &Path, list: &Value) -> Hooks {
        let spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.2.0", "hooks": list, "annotations": {"nerdctl/name": "web"},
        }))
        .unwrap();
        let stdio = Stdio::new("", "", "", false).unwrap();
        let create = Create::new("default", "c1", bundle, Vec::new(), stdio).unwrap();
        let list = spec.hooks().as_ref().unwrap();
        #[allow(deprecated, reason = "still run")]
        let prestart = list.prestart().clone().unwrap_or_default();
        let planned = plan::Hooks {
            prestart,
            create_runtime: list.create_runtime().clone().unwrap_or_default(),
            poststart: list.poststart().clone().unwrap_or_default(),
            poststop: list.poststop().clone().unwrap_or_default(),
        };
        Hooks::new(planned, &create, &spec)
    }

    fn script(text: &str) -> Value {
        json!({"path": "/bin/sh", "args": ["hook", "-c", text]})
    }

    fn said(bundle: &Path) -> String {
        fs::read_to_string(bundle.join("said")).unwrap()
    }

    #[test]
    fn each_is_told_the_state_in_order() {
        let bundle = tempfile::tempdir().unwrap();
        let list = json!({
            "prestart": [script("echo prestart 0 >> said"), script("echo prestart 1 >> said")],
            "createRuntime": [script("cat > state; echo createRuntime $0 >> said")],
            "poststart": [script("cat > started")],
            "poststop": [script("echo poststop 0 >> said; exit 1"), script("cat > stopped")],
        });
        let hooks = hooks(bundle.path(), &list);
        hooks.before_create(4711).unwrap();
        assert_eq!(
            said(bundle.path()),
            "prestart 0\nprestart 1\ncreateRuntime hook\n"
        );
        let state = |name: &str| -> Value {
            serde_json::from_slice(&fs::read(bundle.path().join(name)).unwrap()).unwrap()
        };
        let mut expected = json!({
            "ociVersion": "1.2.0", "id": "c1", "status": "creating", "pid": 4711,
            "bundle": bundle.path(), "annotations": {"nerdctl/name": "web"},
        });
        assert_eq!(state("state"), expected);

        hooks.after_start(4711).unwrap();
        expected["status"] = json!("running");
        assert_eq!(state("started"), expected);

        // By another process, from what is on disk. The first one fails.
        let poststop = serde_json::to_string(&hooks.poststop().unwrap()).unwrap();
        let poststop: Poststop = serde_json::from_str(&poststop).unwrap();
        poststop.run();
        assert!(said(bundle.path()).ends_with("poststop 0\n"));
        expected["status"] = json!("stopped");
        expected.as_object_mut().unwrap().remove("pid");
        assert_eq!(state("stopped"), expected);
    }

    #[test]
    fn a_failure_ends_the_row_and_is_told_in_runcs_words() {
        let bundle = tempfile::tempdir().unwrap();
        let list = json!({"createRuntime": [
            script("true"), script("echo out; echo err >&2; exit 3"), script("echo >> said"),
        ]});
        let error = hooks(bundle.path(), &list).before_create(1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "error running createRuntime hook #1: /bin/sh: exit status 3, stdout: out, stderr: err"
        );
        assert!(!bundle.path().join("said").exists());

        let list = json!({"prestart": [{"path": "/no/such/hook"}]});
        let error = hooks(bundle.path(), &list).before_create(1).unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("error running prestart hook #0: /no/such/hook: No such file"),
            "{text}"
        );
    }

    #[test]
    fn one_that_takes_too_long_is_killed() {
        let bundle = tempfile::tempdir().unwrap();
        let mut endless = script("echo waiting; sleep 1000 & wait");
        endless["timeout"] = json!(1);
        let list = json!({"prestart": [endless]});
        let error = hooks(bundle.path(), &list).before_create(1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "error running prestart hook #0: /bin/sh: hook ran past specified timeout of 1s, \
             stdout: waiting, stderr: "
        );
    }

    #[test]
    fn variables_are_those_given_or_else_ours() {
        let bundle = tempfile::tempdir().unwrap();
        let mut given = script("echo \"$A-$CARGO_MANIFEST_DIR\" > said");
        given["env"] = json!(["A=b=c"]);
        hooks(bundle.path(), &json!({"prestart": [given]}))
            .before_create(1)
            .unwrap();
        assert_eq!(said(bundle.path()), "b=c-\n");
        let inherits = script("echo \"$CARGO_MANIFEST_DIR\" > said");
        hooks(bundle.path(), &json!({"prestart": [inherits]}))
            .before_create(1)
            .unwrap();
        let ours = std::env::var("CARGO_MANIFEST_DIR").unwrap();
        assert_eq!(said(bundle.path()).trim(), ours);
    }
}
