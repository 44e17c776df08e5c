//! Namespaces, a fake machine, and a client with verbs that tests read well with.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use supermachine_agent::{Disk, Error, Platform, Port};
use supermachine_protocol as protocol;
use supermachine_protocol::ttrpc;
use supermachine_protocol::ttrpc::context::with_timeout;

/// How a test went, if it did not panic.
pub(crate) enum Outcome {
    Passed,
    Skipped(&'static str),
}

pub(crate) type Case = (&'static str, fn() -> Outcome);

const DEADLINE: Duration = Duration::from_secs(20);
/// Set in the child that lives in the namespaces.
const INSIDE: &str = "SUPERMACHINE_TEST_INSIDE";

pub(crate) fn main(cases: &[Case]) -> ExitCode {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    if std::env::args().any(|arg| arg == "--list") {
        for (name, _) in cases {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    if std::env::var_os(INSIDE).is_none() {
        return enter();
    }
    set_up();
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (name, case) in cases {
        if filter
            .as_ref()
            .is_some_and(|filter| !name.contains(filter.as_str()))
        {
            continue;
        }
        let started = Instant::now();
        match std::panic::catch_unwind(case) {
            Ok(Outcome::Passed) => {
                passed += 1;
                println!(
                    "test {name} ... ok ({:.2} s)",
                    started.elapsed().as_secs_f32()
                );
            }
            Ok(Outcome::Skipped(reason)) => {
                skipped += 1;
                println!("test {name} ... skipped: {reason}");
            }
            Err(_) => {
                failed += 1;
                println!("test {name} ... FAILED");
            }
        }
    }
    // In libtest's words, so that whoever adds results up counts these too.
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {word}. {passed} passed; {failed} failed; {skipped} ignored");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs this program again as PID 1 of new namespaces, as which it will be handed orphans.
fn enter() -> ExitCode {
    let flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID;
    if let Err(error) = unshare(flags) {
        println!("test result: 0 passed; 0 failed; all skipped: no namespaces of our own: {error}");
        return ExitCode::SUCCESS;
    }
    let status = Command::new("/proc/self/exe")
        .args(std::env::args().skip(1))
        .env(INSIDE, "1")
        .status()
        .expect("the test program runs again");
    ExitCode::from(u8::try_from(status.code().unwrap_or(255)).unwrap_or(255))
}

fn set_up() {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).unwrap();
    mount(
        Some("tmpfs"),
        "/run",
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=0755"),
    )
    .unwrap();
    let cgroups = mount(
        Some("none"),
        "/sys/fs/cgroup",
        Some("cgroup2"),
        MsFlags::empty(),
        none,
    );
    // Busy: it is there already.
    assert!(matches!(cgroups, Ok(()) | Err(Errno::EBUSY)), "{cgroups:?}");
    fs::create_dir_all("/sys/fs/cgroup/containers").unwrap();
    make_image(Path::new("/run/image"));
}

/// Busybox and nothing else, as an image would have it.
fn make_image(root: &Path) {
    for directory in ["bin", "etc", "tmp", "proc", "sys", "dev", "run"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
    for applet in APPLETS {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    )
    .unwrap();
}

const APPLETS: [&str; 30] = [
    "mkdir",
    "chmod",
    "chown",
    "ln",
    "mknod",
    "mkfifo",
    "rm",
    "mv",
    "sh",
    "cat",
    "echo",
    "sleep",
    "id",
    "env",
    "pwd",
    "hostname",
    "stty",
    "dd",
    "head",
    "wc",
    "ls",
    "true",
    "false",
    "kill",
    "grep",
    "ps",
    "tr",
    "touch",
    "sha256sum",
    "mount",
];

/// Console ports are sockets, disks are directories under /run.
#[derive(Clone, Default)]
struct Fake {
    guest_ends: Arc<Mutex<HashMap<u32, UnixStream>>>,
    /// The disks that partitions are of, whose directories stand for them.
    partitions: Arc<Mutex<HashMap<String, String>>>,
}

#[async_trait]
impl Platform for Fake {
    async fn open_port(&self, port: u32) -> Result<Port, Error> {
        let end = self.guest_ends.lock().unwrap().remove(&port);
        let end = end.ok_or_else(|| Error::NotFound {
            kind: "console port",
            name: port.to_string(),
        })?;
        end.set_nonblocking(true).unwrap();
        Ok(Port {
            fd: OwnedFd::from(end),
            virtio: false,
        })
    }

    async fn find_disk(&self, serial: &str) -> Result<Disk, Error> {
        let partitions = self.partitions.lock().unwrap();
        let disk = partitions.get(serial).map_or(serial, String::as_str);
        let path = PathBuf::from("/run").join(disk);
        if path.exists() {
            Ok(Disk::Directory(path))
        } else {
            Err(Error::NotFound {
                kind: "disk",
                name: serial.to_owned(),
            })
        }
    }

    async fn partition(
        &self,
        serial: &str,
        partitions: &[&protocol::Partition],
    ) -> Result<(), Error> {
        let mut known = self.partitions.lock().unwrap();
        known.extend(
            partitions
                .iter()
                .map(|part| (part.name.clone(), serial.to_owned())),
        );
        Ok(())
    }
}

/// An agent, and a host connected to it.
pub(crate) struct Machine {
    fake: Fake,
    client: protocol::AgentClient,
    events: tokio::sync::Mutex<ttrpc::r#async::ClientStreamReceiver<protocol::Event>>,
    seen: Mutex<Vec<protocol::Event>>,
    _server: ttrpc::r#async::Server,
    directory: tempfile::TempDir,
}

/// The host's ends of a process's streams.
pub(crate) struct HostEnds {
    pub(crate) stdio: protocol::Stdio,
    pub(crate) stdin: Option<UnixStream>,
    pub(crate) stdout: Option<UnixStream>,
    pub(crate) stderr: Option<UnixStream>,
}

/// Runs a test against a fresh machine.
pub(crate) fn on_machine(test: impl AsyncFnOnce(&Machine)) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let machine = Machine::start().await;
        tokio::time::timeout(DEADLINE, test(&machine))
            .await
            .expect("the test ends in time");
        machine
            .client
            .shutdown(call(), &protocol::Empty::new())
            .await
            .unwrap();
        let left = fs::read_dir("/sys/fs/cgroup/containers").unwrap().flatten();
        assert_eq!(
            left.filter(|entry| entry.path().is_dir()).count(),
            0,
            "cgroups are left"
        );
    });
    Outcome::Passed
}

impl Machine {
    async fn start() -> Self {
        let directory = tempfile::tempdir_in("/run").unwrap();
        let address = format!("unix://{}/socket", directory.path().display());
        let fake = Fake::default();
        let changes = directory.path().join("changes");
        let listener = UnixListener::bind(&changes).unwrap();
        let platform = Box::new(fake.clone());
        let server = supermachine_agent::serve(&address, platform, directory.path(), listener)
            .await
            .unwrap();
        let connection = ttrpc::r#async::Client::connect(&address).await.unwrap();
        let client = protocol::AgentClient::new(connection);
        let mut request = protocol::ConnectRequest::new();
        request.protocol_version = protocol::VERSION;
        let mut events = client.connect(with_timeout(0), &request).await.unwrap();
        assert!(events.recv().await.unwrap().unwrap().has_ready());
        Self {
            fake,
            client,
            events: tokio::sync::Mutex::new(events),
            seen: Mutex::default(),
            _server: server,
            directory,
        }
    }

    pub(crate) fn client(&self) -> &protocol::AgentClient {
        &self.client
    }

    /// Ports for stdin, stdout and stderr, or for a terminal.
    pub(crate) fn ports(&self, terminal: bool) -> HostEnds {
        let mut guest = self.fake.guest_ends.lock().unwrap();
        let mut port = || {
            let (host, end) = UnixStream::pair().unwrap();
            let number = (1..).find(|number| !guest.contains_key(number)).unwrap();
            guest.insert(number, end);
            (number, Some(host))
        };
        let mut stdio = protocol::Stdio::new();
        stdio.terminal = terminal;
        let (stdin, stdout, stderr);
        (stdio.stdin_port, stdin) = port();
        (stdio.stdout_port, stdout) = port();
        (stdio.stderr_port, stderr) = if terminal { (0, None) } else { port() };
        HostEnds {
            stdio,
            stdin,
            stdout,
            stderr,
        }
    }

    pub(crate) fn create_request(
        &self,
        id: &str,
        spec: &Value,
        ends: &HostEnds,
    ) -> protocol::CreateContainerRequest {
        let mut overlay = protocol::OverlayRootfs::new();
        overlay.lower_disks = vec!["image".to_owned()];
        let mut rootfs = protocol::Rootfs::new();
        rootfs.set_overlay(overlay);
        let mut request = protocol::CreateContainerRequest::new();
        request.container_id = id.to_owned();
        request.rootfs = Some(rootfs).into();
        request.spec_json = spec.to_string().into_bytes();
        request.stdio = Some(ends.stdio.clone()).into();
        request
    }

    pub(crate) async fn create(
        &self,
        id: &str,
        spec: &Value,
        ends: &HostEnds,
    ) -> ttrpc::Result<u32> {
        let request = self.create_request(id, spec, ends);
        self.client
            .create_container(call(), &request)
            .await
            .map(|response| response.pid)
    }

    pub(crate) async fn start_container(&self, id: &str) -> ttrpc::Result<()> {
        self.client
            .start_container(call(), &container(id))
            .await
            .map(drop)
    }

    /// Creates and starts a container.
    pub(crate) async fn run(&self, id: &str, spec: &Value) -> HostEnds {
        let terminal = spec["process"]["terminal"].as_bool().unwrap_or(false);
        let ends = self.ports(terminal);
        self.create(id, spec, &ends).await.unwrap();
        self.start_container(id).await.unwrap();
        ends
    }

    pub(crate) async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
    ) -> ttrpc::Result<HostEnds> {
        let ends = self.ports(process["terminal"].as_bool().unwrap_or(false));
        let mut request = protocol::ExecProcessRequest::new();
        request.container_id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        request.process_json = process.to_string().into_bytes();
        request.stdio = Some(ends.stdio.clone()).into();
        self.client
            .exec_process(call(), &request)
            .await
            .map(|_| ends)
    }

    pub(crate) async fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> ttrpc::Result<()> {
        let mut request = protocol::SignalRequest::new();
        request.container_id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        request.signal = signal;
        request.all = all;
        self.client.signal(call(), &request).await.map(drop)
    }

    pub(crate) async fn delete(&self, id: &str) -> ttrpc::Result<()> {
        self.client
            .delete_container(call(), &container(id))
            .await
            .map(drop)
    }

    /// Where the agent tells changes.
    pub(crate) fn changes(&self) -> PathBuf {
        self.directory.path().join("changes")
    }

    /// Waits for a process's exit and returns its status.
    pub(crate) async fn exit(&self, id: &str, exec_id: &str) -> u32 {
        self.exit_event(id, exec_id).await.status
    }

    /// Waits for a container's end and returns whether it has changed its root.
    pub(crate) async fn changed(&self, id: &str) -> bool {
        self.exit_event(id, "").await.changes
    }

    async fn exit_event(&self, id: &str, exec_id: &str) -> protocol::Exit {
        let wanted = |event: &protocol::Event| {
            event.has_exit() && event.exit().container_id == id && event.exit().exec_id == exec_id
        };
        loop {
            if let Some(event) = self.seen.lock().unwrap().iter().find(|event| wanted(event)) {
                return event.exit().clone();
            }
            let event = self.events.lock().await.recv().await.unwrap().unwrap();
            self.seen.lock().unwrap().push(event);
        }
    }

    /// What a container that runs by itself wrote, and its status.
    pub(crate) async fn output(&self, id: &str, spec: &Value) -> (String, String, u32) {
        let mut ends = self.run(id, spec).await;
        drop(ends.stdin.take());
        let (stdout, stderr) = (text(ends.stdout).await, text(ends.stderr).await);
        let status = self.exit(id, "").await;
        self.delete(id).await.unwrap();
        (stdout, stderr, status)
    }
}

impl HostEnds {
    pub(crate) fn close_stdin(&mut self) {
        if let Some(stdin) = self.stdin.take() {
            stdin.shutdown(std::net::Shutdown::Both).unwrap();
        }
    }
}

pub(crate) fn call() -> ttrpc::context::Context {
    with_timeout(i64::try_from(DEADLINE.as_nanos()).unwrap())
}

pub(crate) fn container(id: &str) -> protocol::ContainerRequest {
    let mut request = protocol::ContainerRequest::new();
    request.container_id = id.to_owned();
    request
}

pub(crate) fn process_request(id: &str, exec_id: &str) -> protocol::ProcessRequest {
    let mut request = protocol::ProcessRequest::new();
    request.container_id = id.to_owned();
    request.exec_id = exec_id.to_owned();
    request
}

/// Everything up to the end of a stream.
pub(crate) async fn bytes(stream: Option<UnixStream>) -> Vec<u8> {
    let Some(mut stream) = stream else {
        return Vec::new();
    };
    let read = move || -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        stream.read_to_end(&mut all)?;
        Ok(all)
    };
    tokio::task::spawn_blocking(read).await.unwrap().unwrap()
}

pub(crate) async fn text(stream: Option<UnixStream>) -> String {
    String::from_utf8(bytes(stream).await).unwrap()
}

/// Reads until `wanted` has come, and returns everything up to it.
pub(crate) async fn until(stream: &UnixStream, wanted: &str) -> String {
    let mut stream = stream.try_clone().unwrap();
    let wanted = wanted.to_owned();
    let read = move || {
        let mut all = Vec::new();
        let mut byte = [0];
        while !String::from_utf8_lossy(&all).contains(&wanted) {
            match stream.read(&mut byte) {
                Ok(1) => all.push(byte[0]),
                other => panic!(
                    "{other:?} before {wanted:?} after {:?}",
                    String::from_utf8_lossy(&all)
                ),
            }
        }
        String::from_utf8_lossy(&all).into_owned()
    };
    tokio::task::spawn_blocking(read).await.unwrap()
}

pub(crate) async fn send(stream: &UnixStream, data: Vec<u8>) {
    let mut stream = stream.try_clone().unwrap();
    tokio::task::spawn_blocking(move || stream.write_all(&data))
        .await
        .unwrap()
        .unwrap();
}

const CAPS: [&str; 8] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

pub(crate) fn process(args: &[&str]) -> Value {
    json!({
        "args": args,
        "cwd": "/",
        "env": ["PATH=/bin", "TERM=xterm"],
        "user": {"uid": 0, "gid": 0},
        "capabilities": {"bounding": CAPS, "effective": CAPS, "permitted": CAPS},
        "noNewPrivileges": true,
    })
}

/// The code and the text of a call that was refused.
pub(crate) fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other:?}"),
    }
}

/// The arguments of a shell script.
pub(crate) fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

/// A config much like containerd's default.
pub(crate) fn spec(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": process(args),
        "root": {"path": "rootfs"},
        "hostname": "guest-container",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
            "maskedPaths": ["/proc/kcore", "/proc/keys"],
            "readonlyPaths": ["/proc/sys", "/proc/bus"],
        },
    })
}
