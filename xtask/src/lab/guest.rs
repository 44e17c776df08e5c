//! The lab's side of the channel: started by the lab's init, runs what the host asks for.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::channel::{self, Frames, Kind, Request};
use crate::step::quiet;

/// The exchange disk, and where it is mounted while a session runs.
const EXCHANGE: &str = "/dev/vdb";
const EXCHANGE_DIR: &str = "/run/exchange";
/// Every process of a session is in this cgroup: ending it ends them all.
const CGROUP: &str = "/sys/fs/cgroup/session";
/// How long output may still come once the command itself has ended, after its last byte.
const LINGER: Duration = Duration::from_millis(500);

/// How long containerd and kvm may take: seconds, but minutes where the host is overloaded.
const SERVICES: Duration = Duration::from_secs(300);

/// What the port's reader tells the main loop.
enum Event {
    Frame(Kind, Vec<u8>),
    /// The host closed the port.
    Gone,
}

/// A session's running command, seen from the main loop.
struct Active {
    stdin: Sender<Vec<u8>>,
    /// Set before its processes are killed: one that is about to start, doesn't.
    cancelled: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

/// The port's writing side, shared by the threads of a session.
#[derive(Clone)]
struct Port(Arc<Mutex<File>>);

impl Port {
    fn send(&self, kind: Kind, payload: &[u8]) {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The reader learns of a broken port; there is nobody else to tell.
        let _ = channel::send(&mut *file, kind, payload);
    }
}

/// Serves sessions until the lab ends.
pub(crate) fn run() -> Result<()> {
    let file = open_port()?;
    let port = Port(Arc::new(Mutex::new(
        file.try_clone().context("cannot clone the port")?,
    )));
    let (events, incoming) = mpsc::channel();
    let (resume, resumed) = mpsc::channel();
    thread::spawn(move || read_port(file, &events, &resumed));

    let mut active: Option<Active> = None;
    while let Ok(event) = incoming.recv() {
        match event {
            Event::Frame(Kind::Hello, number) => {
                stop(active.take());
                if let Err(error) = release_exchange() {
                    port.send(Kind::Stderr, format!("lab: {error:#}\n").as_bytes());
                    port.send(Kind::Exit, &125_i32.to_le_bytes());
                    continue;
                }
                port.send(Kind::Ready, &number);
            }
            Event::Frame(Kind::Run, request) => {
                stop(active.take());
                let (stdin, input) = mpsc::channel();
                let (port, cancelled) = (port.clone(), Arc::new(AtomicBool::new(false)));
                let flag = Arc::clone(&cancelled);
                let thread = thread::spawn(move || serve(&request, &port, input, &flag));
                active = Some(Active {
                    stdin,
                    cancelled,
                    thread,
                });
            }
            Event::Frame(Kind::Stdin, bytes) => {
                if let Some(active) = &active {
                    let _ = active.stdin.send(bytes);
                }
            }
            Event::Frame(Kind::Kill, _) => kill_session(active.as_ref()),
            Event::Frame(..) => {}
            Event::Gone => {
                stop(active.take());
                // A blocking write to the port returns once a host is there again.
                port.send(Kind::Idle, &[]);
                let _ = resume.send(());
            }
        }
    }
    bail!("the port's reader ended")
}

fn open_port() -> Result<File> {
    let ports = fs::read_dir("/sys/class/virtio-ports").context("no virtio-serial in this lab")?;
    for port in ports.flatten() {
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if name.trim() == channel::PORT {
            let device = Path::new("/dev").join(port.file_name());
            return OpenOptions::new()
                .read(true)
                .write(true)
                .open(&device)
                .with_context(|| format!("cannot open {}", device.display()));
        }
    }
    bail!("no virtio-serial port is named {}", channel::PORT)
}

fn read_port(mut file: File, events: &Sender<Event>, resumed: &Receiver<()>) {
    let mut frames = Frames::default();
    loop {
        let event = match frames.next(&mut file) {
            Ok(Some((kind, payload))) => Event::Frame(kind, payload),
            Ok(None) => Event::Gone,
            Err(_) => return,
        };
        let gone = matches!(event, Event::Gone);
        if events.send(event).is_err() || (gone && resumed.recv().is_err()) {
            return;
        }
    }
}

fn kill_session(active: Option<&Active>) {
    if let Some(active) = active {
        active.cancelled.store(true, Ordering::SeqCst);
    }
    let _ = fs::write(Path::new(CGROUP).join("cgroup.kill"), "1");
}

fn stop(active: Option<Active>) {
    kill_session(active.as_ref());
    if let Some(active) = active {
        drop(active.stdin);
        let _ = active.thread.join();
    }
}

/// One session from request to exit status.
fn serve(request: &[u8], port: &Port, stdin: Receiver<Vec<u8>>, cancelled: &AtomicBool) {
    let code = match serde_json::from_slice(request).context("a request I don't understand") {
        Ok(request) => run_request(&request, port, stdin, cancelled),
        Err(error) => Err(error),
    };
    let code = code.unwrap_or_else(|error| {
        port.send(Kind::Stderr, format!("lab: {error:#}\n").as_bytes());
        125
    });
    port.send(Kind::Exit, &code.to_le_bytes());
}

fn run_request(
    request: &Request,
    port: &Port,
    stdin: Receiver<Vec<u8>>,
    cancelled: &AtomicBool,
) -> Result<i32> {
    prepare(request)?;
    wait_for_services(cancelled)?;
    port.send(Kind::Started, &[]);
    let status = match request.tty {
        Some(size) => with_terminal(request, size, port, stdin)?,
        None => with_pipes(request, port, stdin)?,
    };
    if request.out {
        send_out(port)?;
    }
    Ok(status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

/// Mounts the exchange disk, shows its folders under /mnt and installs this build.
fn prepare(request: &Request) -> Result<()> {
    fs::create_dir_all(CGROUP).context("cannot make the session's cgroup")?;
    for dir in ["/out", EXCHANGE_DIR] {
        let _ = fs::remove_dir_all(dir);
        fs::create_dir_all(dir).with_context(|| format!("cannot make {dir}"))?;
    }
    if request.mounts.is_empty() && !request.install {
        return Ok(());
    }
    quiet(Command::new("mount").args(["-o", "noatime", EXCHANGE, EXCHANGE_DIR]))?;
    for name in &request.mounts {
        let target = format!("/mnt/{name}");
        fs::create_dir_all(&target).with_context(|| format!("cannot make {target}"))?;
        let from = format!("{EXCHANGE_DIR}/mnt/{name}");
        quiet(Command::new("mount").args(["--bind", &from, &target]))?;
    }
    if request.install {
        // Beside and renamed: a running binary can't be written over.
        let from = format!("{EXCHANGE_DIR}/build/.");
        quiet(Command::new("cp").args(["-a", "--remove-destination", &from, "/"]))?;
    }
    Ok(())
}

/// Undoes the mounts of an earlier session, so that the host may write the exchange disk anew.
fn release_exchange() -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read the mounts")?;
    let ours = |path: &&str| *path == EXCHANGE_DIR || path.starts_with("/mnt/");
    let targets = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .filter(ours);
    for target in targets.collect::<Vec<_>>().into_iter().rev() {
        quiet(Command::new("umount").arg(target)).context(
            "something left by an earlier run still uses its folders: `cargo xtask lab down` and up",
        )?;
    }
    Ok(())
}

/// The lab's init starts both in the background: containerd and the loading of kvm.
fn wait_for_services(cancelled: &AtomicBool) -> Result<()> {
    let deadline = Instant::now() + SERVICES;
    while !Path::new("/dev/kvm").exists() || UnixStream::connect(super::CONTAINERD).is_err() {
        if cancelled.load(Ordering::SeqCst) {
            bail!("ended before the command was started");
        }
        if Instant::now() > deadline {
            let log = fs::read_to_string("/var/log/containerd.log").unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(10).collect();
            bail!(
                "no /dev/kvm or no containerd after {SERVICES:?}; /dev/kvm there: {}; containerd said, last line first:\n{}",
                Path::new("/dev/kvm").exists(),
                tail.join("\n")
            );
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The command, entered into the session's cgroup by a shell that it then replaces.
fn command(request: &Request, wrapper: &[&str]) -> Command {
    let mut command = Command::new("/bin/sh");
    let enter = format!("echo $$ > {CGROUP}/cgroup.procs && exec \"$@\"");
    command
        .args(["-c", &enter, "lab"])
        .args(wrapper)
        .args(&request.argv);
    command
        .env_clear()
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .env("PATH", super::PATH);
    // On the disk: /tmp is memory, which a guest's disk image would eat.
    command.env("TMPDIR", "/var/tmp");
    command
        .envs(request.env.iter().map(|(key, value)| (key, value)))
        .current_dir("/root");
    command
}

fn with_pipes(request: &Request, port: &Port, stdin: Receiver<Vec<u8>>) -> Result<ExitStatus> {
    let mut child = command(request, &[])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start /bin/sh")?;
    let (output, ended) = Output::new();
    if let Some(pipe) = child.stdin.take() {
        thread::spawn(move || feed(pipe, &stdin));
    }
    if let Some(pipe) = child.stdout.take() {
        forward(pipe, port.clone(), Kind::Stdout, output.clone());
    }
    if let Some(pipe) = child.stderr.take() {
        forward(pipe, port.clone(), Kind::Stderr, output.clone());
    }
    reap(child, output, &ended)
}

fn with_terminal(
    request: &Request,
    (rows, columns): (u16, u16),
    port: &Port,
    stdin: Receiver<Vec<u8>>,
) -> Result<ExitStatus> {
    let size = nix::pty::Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pty = nix::pty::openpty(&size, None).context("cannot open a terminal")?;
    let slave = File::from(pty.slave);
    let clone = |file: &File| file.try_clone().context("cannot clone a terminal");
    let mut command = command(request, &["setsid", "--ctty", "--wait"]);
    command
        .stdin(clone(&slave)?)
        .stdout(clone(&slave)?)
        .stderr(slave);
    let child = command.spawn().context("cannot start /bin/sh")?;
    // The command holds the terminal's other side: with ours gone too, its end is our EOF.
    drop(command);
    let (output, ended) = Output::new();
    let master = File::from(pty.master);
    let input = clone(&master)?;
    thread::spawn(move || feed(input, &stdin));
    forward(master, port.clone(), Kind::Stdout, output.clone());
    reap(child, output, &ended)
}

/// Writes what the host sends until an empty frame, then closes.
fn feed(mut pipe: impl Write, stdin: &Receiver<Vec<u8>>) {
    while let Ok(bytes) = stdin.recv() {
        if bytes.is_empty() || pipe.write_all(&bytes).and_then(|()| pipe.flush()).is_err() {
            return;
        }
    }
}

/// What the threads that forward output tell the one that waits for its end.
#[derive(Clone)]
struct Output {
    /// Counted when a chunk is read and again when it is sent.
    moves: Arc<AtomicUsize>,
    /// Never sent on: dropped with the last thread.
    _alive: Sender<()>,
}

impl Output {
    fn new() -> (Self, Receiver<()>) {
        let (alive, ended) = mpsc::channel();
        (
            Self {
                moves: Arc::default(),
                _alive: alive,
            },
            ended,
        )
    }
}

/// Sends a pipe's bytes as frames of `kind`.
fn forward(mut pipe: impl Read + Send + 'static, port: Port, kind: Kind, output: Output) {
    thread::spawn(move || {
        let mut chunk = vec![0; 30 * 1024];
        while let Ok(count @ 1..) = pipe.read(&mut chunk) {
            output.moves.fetch_add(1, Ordering::SeqCst);
            port.send(kind, chunk.get(..count).unwrap_or_default());
            output.moves.fetch_add(1, Ordering::SeqCst);
        }
    });
}

/// Waits for the command, then for the rest of its output: to EOF, or, where something it left
/// in the background holds the pipes, until nothing came for a while.
fn reap(mut child: Child, output: Output, ended: &Receiver<()>) -> Result<ExitStatus> {
    let status = child.wait().context("cannot wait for the command")?;
    let moves = Arc::clone(&output.moves);
    drop(output);
    loop {
        let before = moves.load(Ordering::SeqCst);
        if ended.recv_timeout(LINGER) == Err(RecvTimeoutError::Disconnected) {
            return Ok(status);
        }
        let after = moves.load(Ordering::SeqCst);
        if before == after && after.is_multiple_of(2) {
            return Ok(status);
        }
    }
}

fn send_out(port: &Port) -> Result<()> {
    let mut tar = Command::new("tar")
        .args(["-C", "/out", "-cf", "-", "."])
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start tar")?;
    let mut pipe = tar.stdout.take().context("tar has no output")?;
    let mut chunk = vec![0; 30 * 1024];
    loop {
        let count = pipe.read(&mut chunk).context("cannot read from tar")?;
        if count == 0 {
            break;
        }
        port.send(Kind::Out, chunk.get(..count).unwrap_or_default());
    }
    tar.wait().context("cannot wait for tar")?;
    Ok(())
}
