//! Clones of a VM that runs a container: what each learns of itself when the host connects.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::{Value, json};
use supermachine_protocol::ttrpc::r#async::{Client, transport::Socket};
use supermachine_protocol::ttrpc::context::with_duration;
use supermachine_protocol::{self as protocol, AgentClient, ConnectRequest};
use supermachine_tests::bundle;
use supermachine_tests::program::Program;
use supermachine_vmm::control::{ConsoleSpec, DiskSpec, PortSpec, VsockSpec};

use crate::bad;
use crate::machine::{DEADLINE, Machine};
use crate::support::{World, equal};

const IMAGE: &str = "image";
/// How late a guest may be asked the time, in seconds.
const LATE: u64 = 60;
/// Waits to be told, then shows what is the guest's own: it has no namespaces for that. The shell
/// itself draws the first random numbers, so that clones would draw the same of the same state.
const ASKS: &str = "echo ready; read told; \
    read uuid < /proc/sys/kernel/random/uuid; read boot < /proc/sys/kernel/random/boot_id; \
    echo $uuid; echo $boot; date +%s; hostname; cat /proc/1/root/etc/machine-id";
const STDIN: u32 = protocol::FIRST_STDIO_PORT;
const STDOUT: u32 = STDIN + 1;

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![world.vm_test("clones::each_is_told_who_it_is", identity)]
}

fn identity(world: &World) -> Result<()> {
    let dir = tempfile::tempdir_in(world.files()?)?;
    let image = dir.path().join("image");
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-t", "ext4", "-d"])
        .arg(world.busybox()?)
        .arg(&image)
        .arg("32M");
    Program::run(make, world.host.deadline)?.success()?;
    let snapshot = snapshot(world, dir.path(), &image)?;

    // Times nothing but the host could have told them, one of them before the snapshot.
    let first = identity_of(1_000_000_000, "first", '1', 0xaa);
    let second = identity_of(2_000_000_000, "second", '2', 0xbb);
    let clones = [&first, &second].map(|told| Own::ask(world, &snapshot, &image, told));
    let [first_has, second_has] = clones;
    let (first_has, second_has) = (first_has?, second_has?);
    for (told, own) in [(&first, &first_has), (&second, &second_has)] {
        let time = u64::try_from(told.host_time_ns)? / 1_000_000_000;
        ensure!((time..time + LATE).contains(&own.time), "{told}: {own:?}");
        equal(&own.hostname, &told.hostname)?;
        equal(&own.machine_id, &told.machine_id)?;
        ensure!(own.random.iter().all(|uuid| uuid.len() == 36), "{own:?}");
    }
    for (one, other) in first_has.random.iter().zip(&second_has.random) {
        ensure!(one != other, "both clones have {one}");
    }
    Ok(())
}

fn identity_of(seconds: i64, hostname: &str, digit: char, entropy: u8) -> ConnectRequest {
    let mut request = ConnectRequest::new();
    request.protocol_version = protocol::VERSION;
    request.host_time_ns = seconds * 1_000_000_000;
    request.entropy = vec![entropy; 32];
    request.hostname = hostname.to_owned();
    request.machine_id = digit.to_string().repeat(32);
    request
}

/// A VM whose container waits.
fn snapshot(world: &World, dir: &Path, image: &Path) -> Result<PathBuf> {
    let socket = dir.join("original.sock");
    let (vsock, disk) = (vsock(&socket)?, disk(image)?);
    let agent = bad::agent()?;
    let original = Machine::boot(world, &agent, |spec| {
        spec.disks = vec![disk];
        spec.vsock = Some(vsock);
        spec.console = Some(ConsoleSpec {
            ports: (0..=STDOUT).map(protocol::console_port_name).collect(),
            max_ports: STDOUT + 1,
        });
    })?;
    let log = File::create(dir.join("agent.log"))?;
    original.vm.attach_port(0, None, Some(log.into()))?;
    original.opened()?;
    let (near, far) = ends()?;
    original
        .vm
        .attach_port(STDIN, Some(far.try_clone()?.into()), None)?;
    original.vm.attach_port(STDOUT, None, Some(far.into()))?;
    let told = identity_of(1_500_000_000, "original", '3', 0xcc);
    connected(&socket, &told, async |agent| {
        let create = container()?;
        agent
            .create_container(with_duration(DEADLINE), &create)
            .await?;
        let mut start = protocol::ContainerRequest::new();
        start.container_id = create.container_id;
        agent
            .start_container(with_duration(DEADLINE), &start)
            .await?;
        let mut line = String::new();
        BufReader::new(&near).read_line(&mut line)?;
        equal(line.as_str(), "ready\n")
    })?;
    let snapshot = original.snapshot(dir)?;
    original.end()?;
    Ok(snapshot)
}

/// Does something with an agent that has been told who it is.
fn connected<T>(
    socket: &Path,
    told: &ConnectRequest,
    then: impl AsyncFnOnce(&AgentClient) -> Result<T>,
) -> Result<T> {
    let stream = dial(socket)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::from_std(stream)?;
        let agent = AgentClient::new(Client::new(Socket::from(stream)));
        let mut events = agent.connect(with_duration(DEADLINE), told).await?;
        let first = events.recv().await?.context("no greeting")?;
        ensure!(first.has_ready(), "{first}");
        then(&agent).await
    })
}

/// Both ends of a container's streams; on ours nothing is waited for longer than [`DEADLINE`].
fn ends() -> Result<(UnixStream, UnixStream)> {
    let (near, far) = UnixStream::pair().context("no sockets")?;
    near.set_read_timeout(Some(DEADLINE))?;
    Ok((near, far))
}

fn vsock(socket: &Path) -> Result<VsockSpec> {
    let listener = UnixListener::bind(socket).context("bind a socket")?;
    Ok(VsockSpec { cid: 3, listener })
}

fn disk(path: &Path) -> Result<DiskSpec> {
    Ok(DiskSpec {
        files: vec![File::open(path).context("open a disk")?],
        read_only: true,
        serial: IMAGE.to_owned(),
    })
}

/// What a guest has for itself.
#[derive(Debug)]
struct Own {
    time: u64,
    hostname: String,
    machine_id: String,
    /// What its kernel's generator gave: an id, and the boot's.
    random: [String; 2],
}

impl Own {
    /// Restores a clone, tells it who it is and has it say that.
    fn ask(world: &World, snapshot: &Path, image: &Path, told: &ConnectRequest) -> Result<Self> {
        let dir = tempfile::tempdir_in(world.files()?)?;
        let socket = dir.path().join("vsock");
        let (vsock, disk) = (vsock(&socket)?, disk(image)?);
        let (near, far) = ends()?;
        let (input, output) = (far.try_clone()?, far);
        let clone = Machine::restore(world, snapshot, |spec| {
            spec.disks = vec![disk];
            spec.vsock = Some(vsock);
            spec.max_ports = STDOUT + 1;
            spec.ports = vec![
                PortSpec {
                    port: STDIN,
                    input: Some(input.into()),
                    output: None,
                },
                PortSpec {
                    port: STDOUT,
                    input: None,
                    output: Some(output.into()),
                },
            ];
        })?;
        let lines = connected(&socket, told, async |_| {
            writeln!(&near, "told")?;
            let lines = BufReader::new(&near).lines().take(5);
            lines.collect::<Result<Vec<_>, _>>().context("no answers")
        })?;
        clone.end()?;
        let [uuid, boot, time, hostname, machine_id] =
            <[String; 5]>::try_from(lines).map_err(|lines| anyhow::anyhow!("{lines:?}"))?;
        Ok(Self {
            time: time.parse()?,
            hostname,
            machine_id,
            random: [uuid, boot],
        })
    }
}

/// Connects to the agent; the socket is ready for a reactor.
fn dial(socket: &Path) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    writeln!(stream, "CONNECT {}", protocol::AGENT_VSOCK_PORT)?;
    let mut reply = Vec::new();
    // Byte by byte: what follows the line belongs to the connection.
    while reply.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).context("no connection")?;
        reply.push(byte[0]);
    }
    ensure!(
        reply.starts_with(b"OK "),
        "{}",
        String::from_utf8_lossy(&reply)
    );
    stream.set_nonblocking(true)?;
    Ok(stream)
}

fn container() -> Result<protocol::CreateContainerRequest> {
    let mut spec = bundle::spec("asks", &["sh", "-c", ASKS]);
    if let Value::Object(spec) = &mut spec {
        // It would be the guest's.
        spec.remove("hostname");
    }
    spec["linux"]["namespaces"] = json!([{ "type": "ipc" }, { "type": "mount" }]);
    // For /proc/1/root.
    for set in ["bounding", "effective", "permitted"] {
        spec["process"]["capabilities"][set] = json!(["CAP_SYS_PTRACE"]);
    }
    let mut disk = protocol::SingleDisk::new();
    disk.serial = IMAGE.to_owned();
    disk.fstype = "ext4".to_owned();
    disk.read_only = true;
    let mut rootfs = protocol::Rootfs::new();
    rootfs.set_single_disk(disk);
    let mut stdio = protocol::Stdio::new();
    (stdio.stdin_port, stdio.stdout_port) = (STDIN, STDOUT);
    let mut request = protocol::CreateContainerRequest::new();
    request.container_id = "asks".to_owned();
    request.rootfs = Some(rootfs).into();
    request.spec_json = serde_json::to_vec(&spec)?;
    request.stdio = Some(stdio).into();
    Ok(request)
}
