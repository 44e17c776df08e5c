//! No VMM process outlives its parent, and none ends unseen.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc;

use libtest_mimic::{Failed, Trial};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use supermachine_vmm::control::{Event, Exit, SpawnConfig, VmHandle};
use supermachine_vmm::jail::Layer;

use crate::support::{DEADLINE, Outcome, Vm, check, check_eq, exists, kill_9, test};

const SHORT_LIVED_PARENT: &str = "--short-lived-parent";

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("ends::killed_from_outside", killed_from_outside),
        test("ends::killed_by_handle", killed_by_handle),
        test("ends::handle_dropped", handle_dropped),
        test("ends::dropped_in_callback", dropped_in_callback),
        test("ends::dropped_while_callback_blocks", dropped_while_blocked),
        test("ends::stopped_without_vm", stopped_without_vm),
        test("ends::parent_killed", parent_killed),
        test("ends::socket_closed", socket_closed),
        test("ends::malformed_request", malformed_request),
        test("ends::not_a_socket", not_a_socket),
    ]
}

fn killed_from_outside() -> Outcome {
    let vm = Vm::spawn("killed")?;
    let pid = vm.handle.pid();
    kill_9(pid)?;
    check_eq(vm.end()?, Exit::Killed { signal: 9 })?;
    check(!exists(pid), "not reaped")
}

fn killed_by_handle() -> Outcome {
    let vm = Vm::spawn("killed")?;
    vm.handle.kill();
    check(!exists(vm.handle.pid()), "not reaped when kill returned")?;
    vm.handle.kill();
    check_eq(vm.end()?, Exit::Killed { signal: 9 })
}

fn handle_dropped() -> Outcome {
    let Vm { handle, events } = Vm::spawn("dropped")?;
    let pid = handle.pid();
    drop(handle);
    check(!exists(pid), "not reaped when drop returned")?;
    check_eq(
        events.recv_timeout(DEADLINE)?,
        Event::Ended(Exit::Killed { signal: 9 }),
    )
}

fn dropped_in_callback() -> Outcome {
    let (give, take) = mpsc::channel::<VmHandle>();
    let (sender, events) = mpsc::channel();
    let handle = VmHandle::spawn(
        SpawnConfig::new("callback"),
        Box::new(move |event| {
            drop(take.recv());
            let _ = sender.send(event);
        }),
    )?;
    let pid = handle.pid();
    give.send(handle)?;
    kill_9(pid)?;
    check_eq(
        events.recv_timeout(DEADLINE)?,
        Event::Ended(Exit::Killed { signal: 9 }),
    )
}

/// A callback may wait for the very thread that drops the handle.
fn dropped_while_blocked() -> Outcome {
    let (reached, at_callback) = mpsc::channel();
    let (release, blocked) = mpsc::channel::<()>();
    let handle = VmHandle::spawn(
        SpawnConfig::new("hostile:escape-codes"),
        Box::new(move |_| {
            let _ = reached.send(());
            let _ = blocked.recv();
        }),
    )?;
    at_callback.recv_timeout(DEADLINE)?;
    let pid = handle.pid();
    drop(handle);
    drop(release);
    check(!exists(pid), "not reaped when drop returned")
}

fn stopped_without_vm() -> Outcome {
    let vm = Vm::spawn("stopped")?;
    check_eq(vm.handle.stop(DEADLINE), Exit::Stopped)?;
    check_eq(vm.end()?, Exit::Stopped)
}

/// Says its VMM's process id and waits to be killed.
pub(crate) fn short_lived_parent() -> Option<ExitCode> {
    if std::env::args().nth(1)? != SHORT_LIVED_PARENT {
        return None;
    }
    let handle = VmHandle::spawn(SpawnConfig::new("orphan"), Box::new(|_| {})).unwrap();
    println!("{}", handle.pid());
    loop {
        std::thread::park();
    }
}

fn parent_killed() -> Outcome {
    let mut parent = Command::new("/proc/self/exe")
        .arg(SHORT_LIVED_PARENT)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let stdout = parent.stdout.take().ok_or("no pipe")?;
    BufReader::new(stdout).read_line(&mut line)?;
    let pid = Pid::from_raw(line.trim().parse()?).ok_or("no pid")?;
    let vmm = pidfd_open(pid, PidfdFlags::empty())?;
    parent.kill()?;
    parent.wait()?;
    let timeout = Timespec::try_from(DEADLINE)?;
    let ended = poll(&mut [PollFd::new(&vmm, PollFlags::IN)], Some(&timeout))?;
    check_eq(ended, 1)
}

/// A policy for a child whose parent made no namespace for it.
fn lenient() -> String {
    let names: Vec<_> = Layer::ALL
        .iter()
        .map(|layer| format!("\"{layer}\""))
        .collect();
    let names = names.join(",");
    format!(r#"{{"jail":{{"allow_missing":[{names}],"first_id":1879048192}}}}"#)
}

/// A VMM child without a handle, so that the socket is the test's own.
fn bare_child() -> Result<(Child, UnixStream), Failed> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(DEADLINE))?;
    let child = Command::new("/proc/self/exe")
        .arg0("supermachine-vmm")
        .args(["vmm", "bare", "warn", &lenient()])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let mut header = [0; 8];
    let mut socket = &ours;
    socket.read_exact(&mut header)?;
    let mut greeting = vec![0; header[0].into()];
    socket.read_exact(&mut greeting)?;
    check(
        greeting.starts_with(br#"{"hello""#),
        format!("greeted with {}", String::from_utf8_lossy(&greeting)),
    )?;
    Ok((child, ours))
}

fn wait(child: &mut Child) -> Result<ExitStatus, Failed> {
    let pid = Pid::from_child(child);
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let timeout = Timespec::try_from(DEADLINE)?;
    if poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout))? == 0 {
        child.kill()?;
        child.wait()?;
        return Err("the process did not end".into());
    }
    Ok(child.wait()?)
}

/// The parent lives on here, so the signal at its death plays no part.
fn socket_closed() -> Outcome {
    let (mut child, socket) = bare_child()?;
    drop(socket);
    check(wait(&mut child)?.success(), "it failed")
}

fn malformed_request() -> Outcome {
    let (mut child, mut socket) = bare_child()?;
    socket.write_all(&[3, 0, 0, 0, 0, 0, 0, 0, b'b', b'a', b'd'])?;
    let mut words = Vec::new();
    socket.read_to_end(&mut words)?;
    let words = String::from_utf8_lossy(&words);
    check(words.contains("Frame is no message"), words.as_ref())?;
    check_eq(wait(&mut child)?.code(), Some(1))
}

fn not_a_socket() -> Outcome {
    let mut child = Command::new("/proc/self/exe")
        .arg0("supermachine-vmm")
        .args(["vmm", "file", "warn"])
        .stdin(Stdio::from(File::open("/dev/null")?))
        .spawn()?;
    check_eq(wait(&mut child)?.code(), Some(1))
}
