//! A VM that goes on from a snapshot of one whose agent waits, against the same VM booted.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use supermachine_protocol::{AgentClient, ContainerRequest};
use supermachine_vmm::control::{DiskSpec, PortSpec, RestoreSpec, VsockSpec};
use tokio::runtime::{Builder, Runtime};
use ttrpc::r#async::{Client, transport::Socket};
use ttrpc::context::with_duration;

use crate::boots::{PROFILED, exec, exec_of};
use crate::machine::{self, Files, Running, Time, null};
use crate::memory;
use crate::trace::{Point, Tracer, now};

/// Where the agent listens.
const AGENT: u32 = 1024;
const DEADLINE: Duration = Duration::from_secs(120);

/// A snapshot, and what it took.
#[derive(Debug)]
pub(crate) struct Snapshot {
    path: PathBuf,
    /// From the request to the file having its name, in nanoseconds.
    pub(crate) took: u64,
    /// KiB of the file, as long as it is and as far as it is on the disk.
    pub(crate) length: u64,
    pub(crate) used: u64,
}

/// One restore; times in nanoseconds from the VMM's exec.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clone {
    /// To the guest having accepted a connection, which is the first that is heard of it.
    pub(crate) accepted: u64,
    /// To the agent's first answer to a call.
    pub(crate) answered: u64,
    /// KiB that the VMM has for itself once idle, guest RAM included.
    pub(crate) private: u64,
}

/// Boots a VM with the agent and all devices, and saves it. The answer has also how long that VM
/// took from exec to the agent's first answer.
pub(crate) fn snapshot(
    tracer: &Tracer,
    exe: &Path,
    files: &Files,
    dir: &Path,
) -> Result<(Snapshot, u64)> {
    let runtime = one_thread()?;
    let run = || {
        let running = machine::boot_agent(exe, files)?;
        running.agent_ready()?;
        call(&runtime, &files.socket())?;
        Ok((running, now()?))
    };
    let ((running, answered), records, _) = tracer.record(&[exec()], run)?;
    let booted = answered.saturating_sub(exec_of(&records, running.pid())?);
    let Running::Ours(vm, _) = &running else {
        bail!("only our VMM is snapshotted here");
    };
    vm.pause().context("the VM does not pause")?;
    let start = now()?;
    let path = vm.snapshot(dir, &[], DEADLINE).context("no snapshot")?;
    let took = now()?.saturating_sub(start);
    running.kill();
    let file = path.metadata().context("the snapshot is gone")?;
    let snapshot = Snapshot {
        path,
        took,
        length: file.len() >> 10,
        used: file.blocks() / 2,
    };
    Ok((snapshot, booted))
}

/// Restores one in a process of its own, and waits for its agent; with `profile`, leaves a trace of
/// system calls and faults there.
pub(crate) fn clone(
    tracer: &Tracer,
    exe: &Path,
    files: &Files,
    snapshot: &Snapshot,
    time: Time,
    profile: Option<&Path>,
) -> Result<Clone> {
    let _ = std::fs::remove_file(files.socket());
    let listener = UnixListener::bind(files.socket()).context("cannot bind the vsock socket")?;
    let mut spec = RestoreSpec::new(File::open(&snapshot.path).context("no snapshot")?);
    // As for a host's own.
    spec.verify_memory = false;
    spec.serial = Some(null()?);
    let disk = File::options().read(true).write(true).open(files.disk());
    spec.disks = vec![DiskSpec {
        files: vec![disk.context("cannot open the disk")?],
        read_only: false,
        serial: "bench".to_owned(),
    }];
    spec.max_ports = machine::PORTS;
    spec.ports = vec![PortSpec {
        port: 0,
        input: None,
        output: Some(null()?),
    }];
    spec.vsock = Some(VsockSpec { cid: 3, listener });
    let runtime = one_thread()?;
    let run = || {
        let vm = machine::start(exe, files, time, Box::new(|_| ()))?;
        vm.restore(&spec, DEADLINE)
            .context("our VMM does not restore")?;
        let accepted = call(&runtime, &files.socket())?;
        Ok((vm, accepted, now()?))
    };
    let points = match profile {
        Some(_) => PROFILED.map(Point::all).into(),
        None => vec![exec()],
    };
    let ((vm, accepted, answered), records, text) = tracer.record(&points, run)?;
    if let Some(raw) = profile {
        std::fs::write(raw, text).context("cannot keep a profile")?;
    }
    let start = exec_of(&records, vm.pid())?;
    let private = memory::all_private(vm.pid())?;
    vm.kill();
    Ok(Clone {
        accepted: accepted.saturating_sub(start),
        answered: answered.saturating_sub(start),
        private,
    })
}

/// Asks the agent something it has to answer; tells when the guest had accepted the connection.
///
/// On one thread, as the runtime does: where one thread reads answers and another has them, the two
/// may spin for 1.5 ms to hand one over, if they share a processor.
fn call(runtime: &Runtime, socket: &Path) -> Result<u64> {
    let mut stream = UnixStream::connect(socket).context("no socket into the guest")?;
    stream.set_read_timeout(Some(DEADLINE))?;
    writeln!(stream, "CONNECT {AGENT}")?;
    let mut reply = Vec::new();
    while reply.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).context("no connection")?;
        reply.push(byte[0]);
    }
    let accepted = now()?;
    ensure!(
        reply.starts_with(b"OK "),
        "{}",
        String::from_utf8_lossy(&reply)
    );
    stream.set_nonblocking(true)?;
    let answer = runtime.block_on(async {
        let stream = tokio::net::UnixStream::from_std(stream)?;
        let agent = AgentClient::new(Client::new(Socket::from(stream)));
        let request = ContainerRequest::new();
        anyhow::Ok(agent.list_pids(with_duration(DEADLINE), &request).await)
    })?;
    // There is no such container, and the agent says so.
    match answer {
        Err(ttrpc::Error::RpcStatus(status))
            if status.code() == ttrpc::Code::NOT_FOUND
                || status.code() == ttrpc::Code::INVALID_ARGUMENT => {}
        other => bail!("the agent answered {other:?}"),
    }
    Ok(accepted)
}

fn one_thread() -> Result<Runtime> {
    let mut runtime = Builder::new_current_thread();
    runtime.enable_all().build().context("no runtime")
}
