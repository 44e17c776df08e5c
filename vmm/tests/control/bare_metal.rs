//! Guests of a few instructions, run by a VMM process on /dev/kvm.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};

use libtest_mimic::{Completion, Failed, Trial};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use supermachine_vmm::control::{BootSpec, ConsoleSpec, ControlError, ErrorKind, Exit};

use crate::guests::{CHATTER, CRASHES, HALT, SAY_HI, SPIN, image};
use crate::support::{DEADLINE, Outcome, Vm, check, check_eq, exists, kill_9, test};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        kvm_test("bare_metal::output_then_end", output),
        kvm_test("bare_metal::stopped_when_halted", || stopped(HALT)),
        kvm_test("bare_metal::stopped_when_spinning", || stopped(SPIN)),
        kvm_test("bare_metal::killed_when_spinning", killed),
        kvm_test("bare_metal::boots_once", boots_once),
        kvm_test("bare_metal::paused_and_resumed", paused),
        test("bare_metal::kernel_that_is_none", kernel_that_is_none),
        test("bare_metal::requests_before_boot", requests_before_boot),
        kvm_test("bare_metal::requests_to_absent_devices", absent_devices),
    ]
}

/// A test that needs /dev/kvm; says why when it can't run.
pub(crate) fn kvm_test(name: &str, run: fn() -> Outcome) -> Trial {
    Trial::ignorable_test(name, move || {
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        if let Err(error) = kvm {
            return Ok(Completion::ignored_with(format!("/dev/kvm: {error}")));
        }
        run().map(|()| Completion::Completed)
    })
}

pub(crate) fn no_kernel() -> Result<BootSpec, Failed> {
    Ok(BootSpec {
        vcpus: 1,
        memory: 64 << 20,
        kernel: File::open("/dev/null")?,
        initramfs: None,
        cmdline: String::new(),
        serial: None,
        disks: Vec::new(),
        console: Some(ConsoleSpec {
            ports: vec!["one".to_owned()],
            max_ports: 1,
        }),
        vsock: None,
        balloon: None,
        rng: false,
    })
}

/// A VM that runs `code`, and what it writes to its serial port.
pub(crate) fn guest(code: &[u8]) -> Result<(BootSpec, std::io::PipeReader), Failed> {
    let (reader, writer) = std::io::pipe()?;
    let mut kernel = tempfile::tempfile()?;
    kernel.write_all(&image(code))?;
    kernel.rewind()?;
    let spec = BootSpec {
        kernel,
        serial: Some(OwnedFd::from(writer)),
        ..no_kernel()?
    };
    Ok((spec, reader))
}

/// Boots `code` and waits for its first byte.
fn running(code: &[u8]) -> Result<Vm, Failed> {
    let vm = Vm::spawn("guest")?;
    let (spec, mut serial) = guest(code)?;
    vm.handle.boot(&spec, DEADLINE)?;
    drop(spec);
    let mut byte = [0];
    serial.read_exact(&mut byte)?;
    Ok(vm)
}

fn output() -> Outcome {
    let vm = Vm::spawn("output")?;
    let (spec, mut serial) = guest(SAY_HI)?;
    vm.handle.boot(&spec, DEADLINE)?;
    // Only the child's copy of the pipe stays, so its end is the child's.
    drop(spec);
    let mut text = String::new();
    serial.read_to_string(&mut text)?;
    check_eq(text.as_str(), "hi")?;
    let end = if CRASHES {
        Exit::TripleFault
    } else {
        Exit::PowerOff
    };
    check_eq(vm.end()?, end)?;
    check(!exists(vm.handle.pid()), "the process is still there")
}

fn stopped(code: &[u8]) -> Outcome {
    let vm = running(code)?;
    check_eq(vm.handle.stop(DEADLINE), Exit::Stopped)?;
    check_eq(vm.end()?, Exit::Stopped)
}

fn killed() -> Outcome {
    let vm = running(SPIN)?;
    kill_9(vm.handle.pid())?;
    check_eq(vm.end()?, Exit::Killed { signal: 9 })
}

fn paused() -> Outcome {
    let vm = Vm::spawn("paused")?;
    let (spec, mut serial) = guest(CHATTER)?;
    vm.handle.boot(&spec, DEADLINE)?;
    drop(spec);
    let mut byte = [0];
    for _ in 0..3 {
        serial.read_exact(&mut byte)?;
        vm.handle.pause()?;
        // What was written before is in the pipe already; more must not come.
        while ready(&serial, 0) {
            serial.read_exact(&mut byte)?;
        }
        check(!ready(&serial, 100), "a paused guest goes on")?;
        vm.handle.resume()?;
        serial.read_exact(&mut byte)?;
    }
    vm.handle.pause()?;
    check_eq(vm.handle.stop(DEADLINE), Exit::Stopped)
}

/// Whether there is something to read within these milliseconds.
fn ready(pipe: &std::io::PipeReader, milliseconds: u8) -> bool {
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(milliseconds)).is_ok_and(|count| count > 0)
}

fn refused<T: std::fmt::Debug>(result: Result<T, ControlError>, kind: ErrorKind) -> Outcome {
    match result {
        Err(ControlError::Refused(message)) if message.kind == kind => Ok(()),
        result => Err(format!("found {result:?}, expected a refusal of kind {kind:?}").into()),
    }
}

fn boots_once() -> Outcome {
    let vm = running(HALT)?;
    let (again, _serial) = guest(HALT)?;
    refused(vm.handle.boot(&again, DEADLINE), ErrorKind::State)?;
    check_eq(vm.handle.stop(DEADLINE), Exit::Stopped)
}

fn kernel_that_is_none() -> Outcome {
    let vm = Vm::spawn("no-kernel")?;
    let boot = vm.handle.boot(&no_kernel()?, DEADLINE);
    // Where there is no hypervisor either, that may be what is found first.
    if File::open("/dev/kvm").is_ok() {
        refused(boot, ErrorKind::Invalid)?;
    } else {
        check(
            matches!(boot, Err(ControlError::Refused(_))),
            format!("found {boot:?}"),
        )?;
    }
    // It answered and lives.
    check_eq(vm.handle.stop(DEADLINE), Exit::Stopped)
}

fn requests_before_boot() -> Outcome {
    let vm = Vm::spawn("early")?;
    refused(vm.handle.attach_port(0, None, None), ErrorKind::State)?;
    refused(vm.handle.set_balloon(0), ErrorKind::State)?;
    refused(vm.handle.pause(), ErrorKind::State)?;
    refused(vm.handle.resume(), ErrorKind::State)?;
    refused(vm.handle.balloon_stats(), ErrorKind::State)
}

fn absent_devices() -> Outcome {
    let vm = Vm::spawn("bare")?;
    let (mut spec, _serial) = guest(HALT)?;
    spec.console = None;
    vm.handle.boot(&spec, DEADLINE)?;
    refused(vm.handle.attach_port(0, None, None), ErrorKind::State)?;
    refused(vm.handle.close_input(0), ErrorKind::State)?;
    refused(vm.handle.set_balloon(0), ErrorKind::State)
}
