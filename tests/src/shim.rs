//! A shim driven as containerd drives it: started in a bundle, called over ttrpc, its events
//! received.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, ForwardRequest,
    KillRequest, Mount, ShutdownRequest, StartRequest, StateRequest, StateResponse, WaitRequest,
    WaitResponse,
};
use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskExit, TaskStart};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::{Client, Events, TaskClient, create_events};
use ttrpc::context::{self, Context as Call};

use crate::bundle::Bundle;
use crate::host::unique;
use crate::program::{Finished, Program};

/// containerd's namespace that driven shims are told.
const NAMESPACE: &str = "supermachine-tests";

/// An event as containerd gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// `/tasks/create`
    Create,
    /// `/tasks/start`
    Start {
        /// The process.
        pid: u32,
    },
    /// `/tasks/exit`
    Exit {
        /// Its name; the container's for its first process.
        id: String,
        /// Its status.
        status: u32,
    },
    /// `/tasks/delete`
    Delete {
        /// The status of the first process.
        status: u32,
    },
    /// Another topic.
    Other(String),
}

/// Stands in for containerd's event service.
#[derive(Default)]
struct Received {
    events: Mutex<VecDeque<Event>>,
    more: Condvar,
}

impl Events for Received {
    fn forward(&self, _: &ttrpc::TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let event = decode(request.envelope.as_ref().unwrap_or_default())
            .map_err(|error| ttrpc::Error::Others(error.to_string()))?;
        self.events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(event);
        self.more.notify_all();
        Ok(Empty::new())
    }
}

fn decode(envelope: &Envelope) -> Result<Event> {
    let bytes = &envelope.event.value;
    Ok(match envelope.topic.as_str() {
        "/tasks/create" => TaskCreate::parse_from_bytes(bytes).map(|_| Event::Create)?,
        "/tasks/start" => Event::Start {
            pid: TaskStart::parse_from_bytes(bytes)?.pid,
        },
        "/tasks/exit" => {
            let exit = TaskExit::parse_from_bytes(bytes)?;
            Event::Exit {
                id: exit.id,
                status: exit.exit_status,
            }
        }
        "/tasks/delete" => Event::Delete {
            status: TaskDelete::parse_from_bytes(bytes)?.exit_status,
        },
        topic => Event::Other(topic.to_owned()),
    })
}

/// How to start a shim.
#[derive(Debug, Clone)]
pub struct ShimConfig {
    /// The program.
    pub program: PathBuf,
    /// What the program is run under, such as `unshare --mount`; often nothing.
    pub wrapper: Vec<String>,
    /// What it finds in `SUPERMACHINE_CONFIG`.
    pub config: Option<PathBuf>,
    /// The most that any call may take.
    pub deadline: Duration,
}

/// A started shim. Dropping it shuts it down and replays its clean-up, as containerd would.
pub struct Shim {
    /// The container's name.
    pub id: String,
    config: ShimConfig,
    bundle: PathBuf,
    client: Option<TaskClient>,
    received: Arc<Received>,
    server: Option<ttrpc::Server>,
    dir: tempfile::TempDir,
}

impl std::fmt::Debug for Shim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shim")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// A new name for a container of a driven shim.
pub fn new_id() -> String {
    unique("driven")
}

impl Shim {
    /// Runs `shim start` in `bundle` and connects to what it started.
    ///
    /// # Errors
    /// With what the shim wrote to its standard error.
    pub fn start(config: &ShimConfig, id: &str, bundle: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("driven-").tempdir()?;
        let address = format!("unix://{}", dir.path().join("events.ttrpc").display());
        let received = Arc::new(Received::default());
        let service = create_events(Arc::clone(&received) as Arc<dyn Events + Send + Sync>);
        let mut server = ttrpc::Server::new()
            .bind(&address)?
            .register_service(service);
        server.start()?;
        let mut shim = Self {
            id: id.to_owned(),
            config: config.clone(),
            bundle: bundle.to_owned(),
            client: None,
            received,
            server: Some(server),
            dir,
        };
        let finished = shim.command(&["start"])?;
        // containerd reads both streams as the answer.
        ensure!(
            !finished.status.success() || finished.stderr.is_empty(),
            "the shim started and said {:?} on stderr",
            finished.errors()
        );
        let said = finished.success()?;
        shim.client = Some(TaskClient::new(Client::connect(&socket_address(&said)?)?));
        Ok(shim)
    }

    /// Runs the shim's program for one action.
    fn command(&self, action: &[&str]) -> Result<Finished> {
        let containerd = self.dir.path().join("containerd.sock");
        let events = self.dir.path().join("events.ttrpc");
        // containerd reads the shim's log here.
        let log = self.bundle.join("log");
        if !log.exists() && self.bundle.is_dir() {
            rustix::fs::mknodat(
                rustix::fs::CWD,
                &log,
                rustix::fs::FileType::Fifo,
                rustix::fs::Mode::from_raw_mode(0o600),
                0,
            )?;
        }
        let mut words = self.config.wrapper.iter().map(OsStr::new);
        let program = self.config.program.as_os_str();
        let mut command = Command::new(words.next().unwrap_or(program));
        command.args(words);
        if !self.config.wrapper.is_empty() {
            command.arg(program);
        }
        command
            .args(["-namespace", NAMESPACE, "-id", &self.id, "-address"])
            .arg(&containerd)
            .args(["-publish-binary", "containerd", "-bundle"])
            .arg(&self.bundle)
            .args(action)
            .env("TTRPC_ADDRESS", &events)
            .env("MAX_SHIM_VERSION", "3");
        if self.bundle.is_dir() {
            command.current_dir(&self.bundle);
        }
        if let Some(config) = &self.config.config {
            command.env("SUPERMACHINE_CONFIG", config);
        }
        // Whoever reads a fifo must be there before it is written to.
        let _log = File::options().read(true).write(true).open(&log).ok();
        Program::run(command, self.config.deadline)
    }

    fn client(&self) -> Result<&TaskClient> {
        self.client.as_ref().context("the shim was not started")
    }

    fn call(&self) -> Call {
        context::with_duration(self.config.deadline)
    }

    /// Create, with the image's files as a read-only lower layer, without standard streams.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn create(&self, bundle: &Bundle) -> Result<u32> {
        let mount = self.overlay(bundle)?;
        self.create_with(|request| request.rootfs = vec![mount])
    }

    /// The mount of the image's files as a read-only lower layer.
    ///
    /// # Errors
    /// The folders of its other layers can't be made.
    pub fn overlay(&self, bundle: &Bundle) -> Result<Mount> {
        let overlay = self.dir.path();
        for layer in ["upper", "work"] {
            fs::create_dir_all(overlay.join(layer))?;
        }
        Ok(Mount {
            type_: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options: vec![
                format!("lowerdir={}", bundle.files.display()),
                format!("upperdir={}", overlay.join("upper").display()),
                format!("workdir={}", overlay.join("work").display()),
            ],
            ..Mount::default()
        })
    }

    /// Create, with whatever `change` makes of the request.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn create_with(&self, change: impl FnOnce(&mut CreateTaskRequest)) -> Result<u32> {
        let mut request = CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle.display().to_string(),
            ..CreateTaskRequest::default()
        };
        change(&mut request);
        Ok(self.client()?.create(self.call(), &request)?.pid)
    }

    /// Start of the first process.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn start_task(&self) -> Result<u32> {
        let request = StartRequest {
            id: self.id.clone(),
            ..StartRequest::default()
        };
        Ok(self.client()?.start(self.call(), &request)?.pid)
    }

    /// Exec of an OCI process, with whatever `change` makes of the request.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn exec_with(
        &self,
        exec_id: &str,
        process: &serde_json::Value,
        change: impl FnOnce(&mut ExecProcessRequest),
    ) -> Result<()> {
        let mut request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..ExecProcessRequest::default()
        };
        request.spec.mut_or_insert_default().value = process.to_string().into_bytes();
        change(&mut request);
        self.client()?.exec(self.call(), &request)?;
        Ok(())
    }

    /// Start of an exec'd process.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn start_exec(&self, exec_id: &str) -> Result<()> {
        let request = StartRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..StartRequest::default()
        };
        self.client()?.start(self.call(), &request)?;
        Ok(())
    }

    /// Wait for an exec'd process, and its Delete; its status.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn end_exec(&self, exec_id: &str) -> Result<u32> {
        let wait = WaitRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..WaitRequest::default()
        };
        let status = self.client()?.wait(self.call(), &wait)?.exit_status;
        self.delete_exec(exec_id)?;
        Ok(status)
    }

    /// Delete of an exec'd process.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn delete_exec(&self, exec_id: &str) -> Result<u32> {
        let delete = DeleteRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..DeleteRequest::default()
        };
        Ok(self.client()?.delete(self.call(), &delete)?.exit_status)
    }

    /// State of the first process.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn state(&self) -> Result<StateResponse> {
        let request = StateRequest {
            id: self.id.clone(),
            ..StateRequest::default()
        };
        Ok(self.client()?.state(self.call(), &request)?)
    }

    /// Wait for the first process.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn wait(&self) -> Result<WaitResponse> {
        let request = WaitRequest {
            id: self.id.clone(),
            ..WaitRequest::default()
        };
        Ok(self.client()?.wait(self.call(), &request)?)
    }

    /// Kill of the first process.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn kill(&self, signal: u32) -> Result<()> {
        let request = KillRequest {
            id: self.id.clone(),
            signal,
            ..KillRequest::default()
        };
        self.client()?.kill(self.call(), &request)?;
        Ok(())
    }

    /// Delete of the first process.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn delete(&self) -> Result<DeleteResponse> {
        let request = DeleteRequest {
            id: self.id.clone(),
            ..DeleteRequest::default()
        };
        Ok(self.client()?.delete(self.call(), &request)?)
    }

    /// Its process.
    ///
    /// # Errors
    /// It left no number in its bundle.
    pub fn pid(&self) -> Result<u32> {
        let path = self.bundle.join("shim.pid");
        let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        Ok(text.trim().parse()?)
    }

    /// The VMM process that it has written down, for whoever cleans up after it.
    ///
    /// # Errors
    /// What it has written down can't be read.
    pub fn recorded_vmm(&self) -> Result<Option<u32>> {
        recorded_vmm(
            &state_directory(self.config.config.as_deref())?,
            NAMESPACE,
            &self.id,
        )
    }

    /// Runs the shim's `delete`, as containerd does when a shim is gone.
    ///
    /// # Errors
    /// With what it wrote to its standard error.
    pub fn clean_up(&self) -> Result<DeleteResponse> {
        let finished = self.command(&["delete"])?;
        ensure!(finished.status.success(), "{}", finished.errors());
        Ok(DeleteResponse::parse_from_bytes(&finished.stdout)?)
    }

    /// The next event.
    ///
    /// # Errors
    /// None came in time.
    pub fn event(&self) -> Result<Event> {
        let until = Instant::now() + self.config.deadline;
        let mut events = self
            .received
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(event) = events.pop_front() {
                return Ok(event);
            }
            let left = until.saturating_duration_since(Instant::now());
            ensure!(
                !left.is_zero(),
                "no event within {:?}",
                self.config.deadline
            );
            events = self
                .received
                .more
                .wait_timeout(events, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// The next events must be these.
    ///
    /// # Errors
    /// They are others, or don't come.
    pub fn expect_events(&self, expected: &[Event]) -> Result<()> {
        for event in expected {
            let found = self
                .event()
                .with_context(|| format!("instead of {event:?}"))?;
            ensure!(found == *event, "found {found:?}, expected {event:?}");
        }
        Ok(())
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        if let Ok(client) = self.client() {
            let request = ShutdownRequest {
                id: self.id.clone(),
                now: true,
                ..ShutdownRequest::default()
            };
            // It may be gone.
            let _ = client.shutdown(context::with_duration(Duration::from_secs(10)), &request);
        }
        let _ = self.command(&["delete"]);
        if let Some(server) = self.server.take() {
            server.shutdown();
        }
    }
}

/// Where shims of this configuration write down what they have.
///
/// # Errors
/// It can't be read.
pub fn state_directory(config: Option<&Path>) -> Result<PathBuf> {
    let table: toml::Table = match config {
        Some(path) => fs::read_to_string(path)?.parse()?,
        None => toml::Table::new(),
    };
    let state = table.get("state").and_then(|state| state.get("directory"));
    let path = state.and_then(|path| path.as_str());
    Ok(path.unwrap_or("/run/supermachine").into())
}

/// The VMM process that a container's shim has written down below `state`.
///
/// # Errors
/// What it has written down can't be read.
pub fn recorded_vmm(state: &Path, namespace: &str, id: &str) -> Result<Option<u32>> {
    let path = state.join(namespace).join(id).join("ledger.json");
    let Ok(text) = fs::read(&path) else {
        return Ok(None);
    };
    let entries: Vec<serde_json::Value> =
        serde_json::from_slice(&text).with_context(|| format!("{}", path.display()))?;
    let pid = entries
        .iter()
        .find_map(|entry| entry["child"]["pid"].as_u64());
    Ok(pid.map(u32::try_from).transpose()?)
}

/// A connection to the shim of a task, by the bundle containerd made for it.
///
/// # Errors
/// There is no address in it, or nobody listens there.
pub fn shim_of(bundle: &Path) -> Result<TaskClient> {
    // containerd 2 keeps what the shim said, containerd 1.7 the address alone.
    let said = ["bootstrap.json", "address"]
        .iter()
        .find_map(|name| fs::read_to_string(bundle.join(name)).ok());
    let said = said.with_context(|| format!("no shim's address in {}", bundle.display()))?;
    Ok(TaskClient::new(Client::connect(&socket_address(
        said.trim(),
    )?)?))
}

/// Where a shim says it listens: JSON since containerd 1.7, the bare address before.
fn socket_address(said: &str) -> Result<String> {
    if said.starts_with("unix://") {
        return Ok(said.to_owned());
    }
    let parameters: serde_json::Value =
        serde_json::from_str(said).with_context(|| format!("the shim said {said:?}"))?;
    match parameters["address"].as_str() {
        Some(address) => Ok(address.to_owned()),
        None => bail!("no address in {said:?}"),
    }
}

/// The gRPC code of a call that was refused.
///
/// # Errors
/// It was not, or failed otherwise.
pub fn refusal<T: std::fmt::Debug>(result: Result<T>) -> Result<(ttrpc::Code, String)> {
    let Err(error) = result else {
        bail!("it went through: {result:?}")
    };
    match error.downcast_ref::<ttrpc::Error>() {
        Some(ttrpc::Error::RpcStatus(status)) => Ok((status.code(), status.message.clone())),
        _ => Err(error.context("no refusal of the shim")),
    }
}
