//! Clones of a VM whose agent waits: what each learns of itself when the host connects.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
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
/// A container that shows what is the guest's own: it has no namespaces for that.
const ASKS: &str = "date +%s; hostname; cat /proc/1/root/etc/machine-id; \
    cat /proc/sys/kernel/random/boot_id; cat /proc/sys/kernel/random/uuid; \
    head -c 16 /dev/urandom | od -An -tx1";

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
    let snapshot = snapshot(world, dir.path())?;

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
        ensure!(own.random.iter().all(|text| text.len() >= 32), "{own:?}");
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

/// A VM whose agent listens and has been asked nothing; its one disk is empty.
fn snapshot(world: &World, dir: &Path) -> Result<std::path::PathBuf> {
    let empty = dir.join("empty");
    File::create(&empty)?;
    let vsock = vsock(&dir.join("original.sock"))?;
    let disk = disk(&empty)?;
    let agent = bad::agent()?;
    let original = Machine::boot(world, &agent, |spec| {
        spec.disks = vec![disk];
        spec.vsock = Some(vsock);
        spec.console = Some(ConsoleSpec {
            ports: (0..2).map(protocol::console_port_name).collect(),
            max_ports: 2,
        });
    })?;
    let log = File::create(dir.join("agent.log"))?;
    original.vm.attach_port(0, None, Some(log.into()))?;
    original.opened()?;
    let snapshot = original.snapshot(dir)?;
    original.end()?;
    Ok(snapshot)
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
    /// What its kernel's generator gives: the boot's id, a fresh id, bytes.
    random: [String; 3],
}

impl Own {
    /// Restores a clone, tells it who it is and has it say that.
    fn ask(world: &World, snapshot: &Path, image: &Path, told: &ConnectRequest) -> Result<Self> {
        let dir = tempfile::tempdir_in(world.files()?)?;
        let socket = dir.path().join("vsock");
        let (vsock, disk) = (vsock(&socket)?, disk(image)?);
        let (said, output) = UnixStream::pair()?;
        said.set_read_timeout(Some(DEADLINE))?;
        let clone = Machine::restore(world, snapshot, |spec| {
            spec.disks = vec![disk];
            spec.vsock = Some(vsock);
            spec.max_ports = 2;
            spec.ports = vec![PortSpec {
                port: protocol::FIRST_STDIO_PORT,
                input: None,
                output: Some(output.into()),
            }];
        })?;
        let agent = dial(&socket)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let lines = runtime.block_on(async {
            let agent = AgentClient::new(Client::new(Socket::from(
                tokio::net::UnixStream::from_std(agent)?,
            )));
            let mut events = agent.connect(with_duration(DEADLINE), told).await?;
            let ready = events.recv().await?.context("no greeting")?;
            ensure!(ready.has_ready(), "{ready}");
            agent
                .create_container(with_duration(DEADLINE), &container()?)
                .await?;
            let mut start = protocol::ContainerRequest::new();
            start.container_id = "asks".to_owned();
            agent
                .start_container(with_duration(DEADLINE), &start)
                .await?;
            let lines = BufReader::new(said).lines().take(6);
            lines.collect::<Result<Vec<_>, _>>().context("no answers")
        })?;
        clone.end()?;
        let [time, hostname, machine_id, random @ ..] =
            <[String; 6]>::try_from(lines).map_err(|lines| anyhow::anyhow!("{lines:?}"))?;
        Ok(Self {
            time: time.parse()?,
            hostname,
            machine_id,
            random,
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
    stdio.stdout_port = protocol::FIRST_STDIO_PORT;
    let mut request = protocol::CreateContainerRequest::new();
    request.container_id = "asks".to_owned();
    request.rootfs = Some(rootfs).into();
    request.spec_json = serde_json::to_vec(&spec)?;
    request.stdio = Some(stdio).into();
    Ok(request)
}
