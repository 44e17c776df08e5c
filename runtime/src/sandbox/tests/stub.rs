//! A machine without a guest, and an agent that does what a test says, over the real protocol.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use supermachine_protocol as protocol;
use tokio::net::UnixStream;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, ServerStreamSender, TtrpcContext};
use ttrpc::{Code, get_status};

use super::super::machine::{
    Ending, Event as MachineEvent, GuestContainer, Launched, Launcher, Machine, Timeouts,
};
use super::super::{Error, Event, Inner, Sandbox, Slot};
use crate::events::Exit;
use crate::hooks::Hooks;
use crate::plan::MachineSize;
use crate::request::{self, Stdio};

pub(super) const PID: u32 = 4711;

/// The test's hands on machine and agent.
#[derive(Clone)]
pub(super) struct Guest {
    state: Arc<Mutex<State>>,
    directory: PathBuf,
}

#[derive(Default)]
struct State {
    machine: Option<UnboundedSender<MachineEvent>>,
    agent: Option<UnboundedSender<protocol::Event>>,
    log: Vec<String>,
    /// What it was told of itself.
    identity: protocol::ConnectRequest,
    attached: HashSet<u32>,
    hang: HashSet<&'static str>,
    fail: HashMap<&'static str, (Code, &'static str)>,
    /// Sent before the named call is answered.
    before: HashMap<&'static str, protocol::Event>,
    silent_boot: bool,
    hooks: Hooks,
    version: u32,
    launched: u32,
    released: u32,
}

impl Guest {
    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut self.state.lock().unwrap())
    }

    /// What the host runs around the container's life.
    pub(super) fn hooks(&self, hooks: Hooks) {
        self.with(|state| state.hooks = hooks);
    }

    /// Never answers this call.
    pub(super) fn hang(&self, call: &'static str) {
        self.with(|state| state.hang.insert(call));
    }

    pub(super) fn fail(&self, call: &'static str, code: Code, text: &'static str) {
        self.with(|state| state.fail.insert(call, (code, text)));
    }

    pub(super) fn mend(&self) {
        self.with(|state| {
            state.fail.clear();
            state.hang.clear();
            state.silent_boot = false;
        });
    }

    /// Its agent never begins to listen.
    pub(super) fn silent_boot(&self) {
        self.with(|state| state.silent_boot = true);
    }

    pub(super) fn speak_version(&self, version: u32) {
        self.with(|state| state.version = version);
    }

    pub(super) fn exit_before_answer(&self, call: &'static str, exec_id: &str, status: u32) {
        self.with(|state| state.before.insert(call, exit_event(exec_id, status)));
    }

    pub(super) fn exit(&self, exec_id: &str, status: u32) {
        let event = exit_event(exec_id, status);
        self.with(|state| state.agent.as_ref().unwrap().send(event).unwrap());
    }

    /// Its container has changed its root.
    pub(super) fn exit_changed(&self, status: u32) {
        let mut event = exit_event("", status);
        event.mut_exit().changes = true;
        self.with(|state| state.agent.as_ref().unwrap().send(event).unwrap());
    }

    pub(super) fn oom(&self) {
        let mut oom = protocol::Oom::new();
        oom.container_id = "c1".to_owned();
        let mut event = protocol::Event::new();
        event.set_oom(oom);
        self.with(|state| state.agent.as_ref().unwrap().send(event).unwrap());
    }

    pub(super) fn identity(&self) -> protocol::ConnectRequest {
        self.with(|state| state.identity.clone())
    }

    /// The agent's connection breaks while its machine runs on.
    pub(super) fn lose_agent(&self) {
        self.with(|state| state.agent = None);
    }

    pub(super) fn close_port(&self, port: u32) {
        self.machine_event(MachineEvent::PortClosed(port));
    }

    pub(super) fn machine_event(&self, event: MachineEvent) {
        // A machine that has ended says nothing more.
        self.with(|state| state.machine.as_ref().map(|machine| machine.send(event)));
    }

    pub(super) fn die(&self, killed: bool) {
        self.machine_event(MachineEvent::Ended {
            reason: "it was told to".to_owned(),
            how: if killed {
                Ending::Killed
            } else {
                Ending::Failed
            },
        });
        self.with(|state| {
            state.machine = None;
            state.agent = None;
        });
    }

    pub(super) fn log(&self) -> Vec<String> {
        self.with(|state| state.log.clone())
    }

    pub(super) fn attached(&self) -> Vec<u32> {
        let mut ports: Vec<u32> = self.with(|state| state.attached.iter().copied().collect());
        ports.sort_unstable();
        ports
    }

    /// Machines launched and given back.
    pub(super) fn balance(&self) -> (u32, u32) {
        self.with(|state| (state.launched, state.released))
    }

    /// Waits until the call has reached the agent.
    pub(super) async fn called(&self, call: &str) {
        until(|| self.log().iter().any(|line| line.starts_with(call))).await;
    }

    /// What happens to a request to the machine's process: it is logged, and fails if the test
    /// says so.
    fn control(&self, name: &'static str) -> Result<(), Error> {
        let fail = self.with(|state| {
            state.log.push(name.to_owned());
            state.fail.contains_key(name)
        });
        if fail {
            return Err(Error::Machine {
                what: name,
                source: "the test says so".into(),
            });
        }
        Ok(())
    }

    /// What happens to every call: it is logged, and hangs or fails if the test says so.
    async fn call(&self, name: &'static str, detail: String) -> ttrpc::Result<()> {
        let (hang, fail) = self.with(|state| {
            state
                .log
                .push(format!("{name} {detail}").trim_end().to_owned());
            if let Some(event) = state.before.remove(name) {
                state.agent.as_ref().unwrap().send(event).unwrap();
            }
            (state.hang.contains(name), state.fail.get(name).copied())
        });
        if hang {
            std::future::pending::<()>().await;
        }
        match fail {
            Some((code, text)) => Err(ttrpc::Error::RpcStatus(get_status(code, text))),
            None => Ok(()),
        }
    }
}

fn exit_event(exec_id: &str, status: u32) -> protocol::Event {
    let mut exit = protocol::Exit::new();
    exit.container_id = "c1".to_owned();
    exit.exec_id = exec_id.to_owned();
    exit.status = status;
    let mut event = protocol::Event::new();
    event.set_exit(exit);
    event
}

/// Waits for a condition, not for a time.
pub(super) async fn until(condition: impl Fn() -> bool) {
    let poll = async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), poll)
        .await
        .expect("the condition never came true");
}

#[async_trait]
impl Launcher for Guest {
    async fn launch(&self, _: &request::Create) -> Result<Launched, Error> {
        let (machine, events) = mpsc::unbounded_channel();
        let silent = self.with(|state| {
            state.machine = Some(machine);
            state.launched += 1;
            state.silent_boot
        });
        if !silent {
            self.machine_event(MachineEvent::PortOpened(0));
        }
        Ok(Launched {
            machine: Arc::new(self.clone()),
            events,
            guest: GuestContainer {
                rootfs: protocol::Rootfs::new(),
                spec_json: b"{}".to_vec(),
                files: Vec::new(),
                hostname: "host".to_owned(),
            },
            hooks: self.with(|state| state.hooks.clone()),
        })
    }
}

#[async_trait]
impl Machine for Guest {
    fn pid(&self) -> u32 {
        PID
    }

    async fn attach(&self, port: u32, _: Option<OwnedFd>, _: Option<OwnedFd>) -> Result<(), Error> {
        self.with(|state| assert!(state.attached.insert(port), "port {port} is in use"));
        self.machine_event(MachineEvent::PortOpened(port));
        Ok(())
    }

    async fn detach(&self, port: u32) {
        self.with(|state| state.attached.remove(&port));
    }

    async fn dial_agent(&self) -> Result<UnixStream, Error> {
        let path = self.directory.join(format!("agent{}", self.balance().0));
        let listener = UnixListener::bind(&path).unwrap();
        let mut server = Server::new()
            .add_listener(Listener::try_from(listener).unwrap())
            .register_service(protocol::create_agent(Arc::new(self.clone())));
        server.start().await.unwrap();
        let stream = UnixStream::connect(&path).await.unwrap();
        // The listener ends with the server; what is connected lives on.
        tokio::spawn(async move {
            server.stop_listen().await;
            std::future::pending::<()>().await;
        });
        Ok(stream)
    }

    async fn save_changes(&self, container_id: &str) -> Result<(), Error> {
        self.control("save")?;
        let hang = self.with(|state| state.hang.contains("save"));
        if hang {
            let released = self.clone();
            until(|| !released.with(|state| state.hang.contains("save"))).await;
        }
        self.with(|state| state.log.push(format!("saved {container_id}")));
        Ok(())
    }

    fn size(&self) -> MachineSize {
        MachineSize {
            memory: 512 << 20,
            overhead: 96 << 20,
            least: 64 << 20,
        }
    }

    async fn pause(&self) -> Result<(), Error> {
        self.control("pause")
    }

    async fn resume(&self) -> Result<(), Error> {
        self.control("resume")
    }

    async fn set_balloon(&self, bytes: u64) -> Result<(), Error> {
        self.with(|state| state.log.push(format!("balloon {}", bytes >> 20)));
        Ok(())
    }

    async fn set_cpuset(&self, cpuset: String) -> Result<(), Error> {
        self.with(|state| state.log.push(format!("cpuset {cpuset}")));
        Ok(())
    }

    fn adopt(&self, _: u32) -> Result<(), Error> {
        Ok(())
    }

    async fn kill(&self) {
        self.with(|state| state.log.push("killed".to_owned()));
        self.die(true);
    }

    async fn release(&self) {
        self.with(|state| state.released += 1);
    }

    fn last_words(&self) -> String {
        "Kernel panic".to_owned()
    }

    async fn log_ended(&self) {}
}

fn empty() -> ttrpc::Result<protocol::Empty> {
    Ok(protocol::Empty::new())
}

#[async_trait]
impl protocol::Agent for Guest {
    async fn connect(
        &self,
        _: &TtrpcContext,
        identity: protocol::ConnectRequest,
        stream: ServerStreamSender<protocol::Event>,
    ) -> ttrpc::Result<()> {
        self.call("connect", String::new()).await?;
        let mut ready = protocol::Ready::new();
        let (agent, mut events): (_, UnboundedReceiver<protocol::Event>) =
            mpsc::unbounded_channel();
        ready.protocol_version = self.with(|state| {
            state.agent = Some(agent);
            state.identity = identity;
            state.version
        });
        let mut first = protocol::Event::new();
        first.set_ready(ready);
        stream.send(&first).await?;
        while let Some(event) = events.recv().await {
            stream.send(&event).await?;
        }
        Ok(())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        req: protocol::CreateContainerRequest,
    ) -> ttrpc::Result<protocol::ProcessResponse> {
        self.call("create", ports(&req.stdio)).await?;
        Ok(protocol::ProcessResponse::new())
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        _: protocol::ContainerRequest,
    ) -> ttrpc::Result<protocol::Empty> {
        self.call("start", String::new()).await?;
        empty()
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        req: protocol::ExecProcessRequest,
    ) -> ttrpc::Result<protocol::ProcessResponse> {
        self.call("exec", format!("{} {}", req.exec_id, ports(&req.stdio)))
            .await?;
        Ok(protocol::ProcessResponse::new())
    }

    async fn signal(
        &self,
        _: &TtrpcContext,
        req: protocol::SignalRequest,
    ) -> ttrpc::Result<protocol::Empty> {
        self.call("signal", format!("{}{}", req.exec_id, req.signal))
            .await?;
        empty()
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        _: protocol::ContainerRequest,
    ) -> ttrpc::Result<protocol::StatsResponse> {
        self.call("stats", String::new()).await?;
        let mut stats = protocol::StatsResponse::new();
        stats.pids.mut_or_insert_default().current = 7;
        Ok(stats)
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        req: protocol::UpdateContainerRequest,
    ) -> ttrpc::Result<protocol::Empty> {
        let json = String::from_utf8_lossy(&req.resources_json).into_owned();
        self.call("update", json).await?;
        empty()
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        req: protocol::ResizePtyRequest,
    ) -> ttrpc::Result<protocol::Empty> {
        let detail = format!("{} {}x{}", req.exec_id, req.columns, req.rows);
        self.call("resize", detail).await?;
        empty()
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        req: protocol::ProcessRequest,
    ) -> ttrpc::Result<protocol::Empty> {
        self.call("forget", req.exec_id).await?;
        empty()
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _: protocol::Empty,
    ) -> ttrpc::Result<protocol::Empty> {
        self.call("shutdown", String::new()).await?;
        self.machine_event(MachineEvent::Ended {
            reason: "powered off".to_owned(),
            how: Ending::Orderly,
        });
        empty()
    }
}

fn ports(stdio: &protocol::Stdio) -> String {
    format!(
        "{}:{}:{}",
        stdio.stdin_port, stdio.stdout_port, stdio.stderr_port
    )
}

/// A sandbox over a stub, and what it tells.
pub(super) struct Fixture {
    pub(super) sandbox: Sandbox,
    pub(super) guest: Guest,
    pub(super) events: UnboundedReceiver<Event>,
    directory: tempfile::TempDir,
}

pub(super) const SHORT: Duration = Duration::from_millis(150);

impl Fixture {
    pub(super) fn new() -> Self {
        Self::with_ports(16)
    }

    pub(super) fn with_ports(last: u32) -> Self {
        Self::with(last, SHORT)
    }

    pub(super) fn with_drain(drain: Duration) -> Self {
        Self::with(16, drain)
    }

    fn with(last_port: u32, drain: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let guest = Guest {
            state: Arc::default(),
            directory: directory.path().to_owned(),
        };
        guest.speak_version(protocol::VERSION);
        let (sender, events) = mpsc::unbounded_channel();
        let inner = Inner {
            launcher: Box::new(guest.clone()),
            timeouts: Timeouts {
                boot: SHORT,
                call: SHORT,
                stop: SHORT,
                drain,
            },
            stdio_ports: (protocol::FIRST_STDIO_PORT, last_port),
            events: sender,
            slot: Mutex::new(Slot::Empty),
            creating: watch::Sender::default(),
            ending: watch::Sender::default(),
        };
        let sandbox = Sandbox {
            inner: Arc::new(inner),
        };
        Self {
            sandbox,
            guest,
            events,
            directory,
        }
    }

    /// Output goes to a file, so that there are ports without anybody at the other end.
    pub(super) fn stdio(&self) -> Stdio {
        let out = format!("file://{}", self.directory.path().join("out").display());
        Stdio::new("", &out, &out, false).unwrap()
    }

    /// Runs a container until its last output is in the fifo that is answered.
    pub(super) async fn last_words(&self) -> PathBuf {
        let path = self.directory.path().join("fifo");
        let mode = nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR;
        nix::unistd::mkfifo(&path, mode).unwrap();
        let stdio = Stdio::new("", path.to_str().unwrap(), "", false).unwrap();
        self.sandbox
            .create(self.request("c1", stdio))
            .await
            .unwrap();
        self.sandbox.start("c1", "").await.unwrap();
        std::fs::write(&path, "last words").unwrap();
        self.guest.close_port(1);
        path
    }

    /// Reads what is in a fifo, as a client does.
    pub(super) fn read(&self, fifo: &Path) {
        let mut options = std::fs::OpenOptions::new();
        // Its writers may have gone already.
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, nix::libc::O_NONBLOCK);
        let mut client = options.read(true).open(fifo).unwrap();
        std::io::Read::read_to_end(&mut client, &mut Vec::new()).unwrap();
    }

    pub(super) fn request(&self, id: &str, stdio: Stdio) -> request::Create {
        request::Create::new("default", id, self.directory.path(), Vec::new(), stdio).unwrap()
    }

    pub(super) async fn created(&self) {
        let none = Stdio::new("", "", "", false).unwrap();
        self.sandbox.create(self.request("c1", none)).await.unwrap();
    }

    pub(super) async fn running(&self) {
        self.created().await;
        self.sandbox.start("c1", "").await.unwrap();
    }

    pub(super) fn exec_request(&self, exec_id: &str, stdio: Stdio) -> request::Exec {
        let process = br#"{"cwd":"/","args":["true"],"user":{"uid":0,"gid":0}}"#;
        request::Exec::new("c1", exec_id, process, stdio).unwrap()
    }

    pub(super) async fn exec(&self, exec_id: &str, stdio: Stdio) -> Result<u32, Error> {
        self.sandbox.exec(self.exec_request(exec_id, stdio))?;
        self.sandbox.start("c1", exec_id).await
    }

    pub(super) async fn wait(&self, exec_id: &str) -> Exit {
        tokio::time::timeout(Duration::from_secs(10), self.sandbox.wait("c1", exec_id))
            .await
            .expect("nobody reported the exit")
            .unwrap()
    }

    /// The events so far, each in a word or two.
    pub(super) fn told(&mut self) -> Vec<String> {
        let mut told = Vec::new();
        while let Ok(event) = self.events.try_recv() {
            told.push(match event {
                Event::Created { pid, .. } => format!("created {pid}"),
                Event::Started { .. } => "started".to_owned(),
                Event::ExecAdded { exec_id, .. } => format!("added {exec_id}"),
                Event::ExecStarted { exec_id, .. } => format!("started {exec_id}"),
                Event::Exited { exec_id, exit, .. } => {
                    format!("exited {exec_id} {}", exit.status).replace("  ", " ")
                }
                Event::Deleted { exit, .. } => format!("deleted {}", exit.status),
                Event::OutOfMemory { .. } => "oom".to_owned(),
                Event::Paused { .. } => "paused".to_owned(),
                Event::Resumed { .. } => "resumed".to_owned(),
            });
        }
        told
    }
}
