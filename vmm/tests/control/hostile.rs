//! Children that break the rules: each is killed, reaped and reported once.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::process::{self, ExitCode};
use std::time::Duration;

use libtest_mimic::Trial;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use supermachine_vmm::control::{ControlError, Event, Exit, LogLevel};

use crate::support::{DEADLINE, Outcome, Vm, check, check_eq, check_fault, exists, test};

const PREFIX: &str = "hostile:";

/// Plays the child that the VM's name asks for.
pub(crate) fn child() -> Option<ExitCode> {
    let name = std::env::args().nth(2)?;
    let script = name.strip_prefix(PREFIX)?;
    play(script);
    Some(ExitCode::SUCCESS)
}

fn play(script: &str) {
    match script {
        "leaves-at-once" => process::exit(3),
        "other-version" => say(r#"{"hello":{"version":999}}"#),
        "greets-with-noise" => raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
        _ => say(r#"{"hello":{"version":1}}"#),
    }
    match script {
        "leaves-later" => process::exit(7),
        "nonsense" => say("nonsense"),
        "unknown-event" => say(r#"{"event":{"takeover":{}}}"#),
        "unknown-field" => say(r#"{"event":{"port_opened":{"port":0,"and":1}}}"#),
        "second-greeting" => say(r#"{"hello":{"version":1}}"#),
        "huge-frame" => raw(&[0xff; 8]),
        "half-a-frame" => {
            raw(&[100, 0, 0, 0, 0, 0, 0, 0, b'{']);
            process::exit(0);
        }
        "sends-a-file" => send_a_file(),
        "reply-unasked" => say(r#"{"reply":{"id":12,"result":{"Ok":"done"}}}"#),
        "port-out-of-range" => say(r#"{"event":{"port_opened":{"port":3}}}"#),
        "own-death" => say(r#"{"event":{"ended":{"killed":{"signal":9}}}}"#),
        "stays-after-its-end" => say(r#"{"event":{"ended":"power_off"}}"#),
        "escape-codes" => {
            say(
                r#"{"event":{"log":{"level":"error","target":"t","text":"a\u001b[2J\nERROR forged"}}}"#,
            );
            process::exit(0);
        }
        "log-flood" => {
            for _ in 0..50_000 {
                say(r#"{"event":{"log":{"level":"error","target":"t","text":"flood"}}}"#);
            }
            process::exit(0);
        }
        "port-flood" => {
            // The parent closes the socket when it has had enough.
            wait_for_a_request();
            loop {
                say(r#"{"event":{"port_opened":{"port":0}}}"#);
            }
        }
        "wrong-answer" => {
            wait_for_a_request();
            say(
                r#"{"reply":{"id":0,"result":{"Ok":{"balloon_stats":{"target":0,"actual":0,"free":null,"total":null,"available":null,"disk_caches":null,"major_faults":null,"minor_faults":null}}}}}"#,
            );
        }
        _ => {}
    }
    // Whoever is still here stays until it is killed.
    loop {
        std::thread::park();
    }
}

fn say(body: &str) {
    let mut frame = (body.len() as u32).to_le_bytes().to_vec();
    frame.extend([0; 4]);
    frame.extend(body.as_bytes());
    raw(&frame);
}

/// Standard input is the control socket.
fn raw(bytes: &[u8]) {
    let socket = io::stdin().as_fd().try_clone_to_owned().unwrap();
    if File::from(socket).write_all(bytes).is_err() {
        process::exit(0);
    }
}

fn wait_for_a_request() {
    let mut byte = [0];
    io::stdin().read_exact(&mut byte).unwrap();
}

fn send_a_file() {
    let body = br#"{"event":{"input_ended":{"port":0}}}"#;
    let mut frame = (body.len() as u32).to_le_bytes().to_vec();
    frame.extend(1u32.to_le_bytes());
    frame.extend(body);
    let stdin = io::stdin();
    let files = [stdin.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
    sendmsg(
        stdin.as_fd(),
        &[IoSlice::new(&frame)],
        &mut ancillary,
        SendFlags::empty(),
    )
    .unwrap();
}

fn spawn(script: &str) -> Result<Vm, ControlError> {
    Vm::spawn(&format!("{PREFIX}{script}"))
}

/// A child that greets, then does `script`: it must be gone, for this reason.
fn faults_by(script: &str, part: &str) -> Outcome {
    let vm = spawn(script)?;
    let pid = vm.handle.pid();
    check_fault(&vm.end()?, part)?;
    check(!exists(pid), "the process is still there")
}

/// A program that is no VMM: a clear error, no handle, no process.
fn no_greeting(script: &str, part: &str) -> Outcome {
    let Err(error) = spawn(script) else {
        return Err("it counted as started".into());
    };
    check(
        matches!(&error, ControlError::Greeting { found, .. } if found.contains(part)),
        format!("found {error:?}, expected a greeting error with {part:?}"),
    )
}

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("hostile::leaves_before_greeting", || {
            no_greeting("leaves-at-once", "closed the control socket")
        }),
        test("hostile::other_version", || {
            no_greeting("other-version", "version 999 of the messages, 1 expected")
        }),
        test("hostile::greets_with_noise", || {
            no_greeting("greets-with-noise", "expected")
        }),
        test("hostile::program_that_is_not_there", missing_program),
        test("hostile::nonsense", || {
            faults_by("nonsense", "Frame is no message")
        }),
        test("hostile::unknown_event", || {
            faults_by("unknown-event", "unknown variant")
        }),
        test("hostile::unknown_field", || {
            faults_by("unknown-field", "unknown field")
        }),
        test("hostile::second_greeting", || {
            faults_by("second-greeting", "a second greeting")
        }),
        test("hostile::huge_frame", || faults_by("huge-frame", "at most")),
        test("hostile::sends_a_file", || {
            faults_by("sends-a-file", "more files than the 0 expected")
        }),
        test("hostile::reply_unasked", || {
            faults_by("reply-unasked", "a reply to request 12")
        }),
        test("hostile::port_out_of_range", || {
            faults_by("port-out-of-range", "an event of port 3 of 0")
        }),
        test("hostile::own_death", || {
            faults_by("own-death", "reported its own death")
        }),
        test("hostile::half_a_frame", half_a_frame),
        test("hostile::leaves_later", leaves_later),
        test("hostile::stays_after_its_end", stays_after_its_end),
        test("hostile::escape_codes", escape_codes),
        test("hostile::log_flood", log_flood),
        test("hostile::port_flood", port_flood),
        test("hostile::never_answers", never_answers),
        test("hostile::wrong_answer", wrong_answer),
    ]
}

fn missing_program() -> Outcome {
    let mut config = supermachine_vmm::control::SpawnConfig::new("absent");
    config.exe = "/nonexistent/program".into();
    let error = supermachine_vmm::control::VmHandle::spawn(config, Box::new(|_| {}));
    check(
        matches!(&error, Err(ControlError::Spawn { exe, .. }) if exe.ends_with("program")),
        format!("found {error:?}"),
    )
}

fn half_a_frame() -> Outcome {
    check_eq(spawn("half-a-frame")?.end()?, Exit::Vanished { status: 0 })
}

fn leaves_later() -> Outcome {
    check_eq(spawn("leaves-later")?.end()?, Exit::Vanished { status: 7 })
}

fn stays_after_its_end() -> Outcome {
    let vm = spawn("stays-after-its-end")?;
    let pid = vm.handle.pid();
    check_eq(vm.end()?, Exit::PowerOff)?;
    check(!exists(pid), "the process is still there")
}

fn escape_codes() -> Outcome {
    let (events, _) = spawn("escape-codes")?.all_events()?;
    check_eq(
        events,
        vec![Event::Log {
            level: LogLevel::Error,
            target: "t".to_owned(),
            text: "a [2J ERROR forged".to_owned(),
        }],
    )
}

fn log_flood() -> Outcome {
    let started = std::time::Instant::now();
    let (events, exit) = spawn("log-flood")?.all_events()?;
    check_eq(exit, Exit::Vanished { status: 0 })?;
    // 200 at once and 20 a second.
    let most = 201 + started.elapsed().as_millis() / 50;
    check(
        (200..=most).contains(&(events.len() as u128)),
        format!(
            "{} lines came through, at most {most} expected",
            events.len()
        ),
    )
}

fn port_flood() -> Outcome {
    let vm = spawn("port-flood")?;
    let boot = vm.handle.boot(&crate::bare_metal::no_kernel()?, DEADLINE);
    check(
        matches!(boot, Err(ControlError::Ended(_))),
        format!("found {boot:?}"),
    )?;
    check_fault(&vm.end()?, "port events without end")
}

fn never_answers() -> Outcome {
    let vm = spawn("never-answers")?;
    let timeout = Duration::from_millis(50);
    let boot = vm.handle.boot(&crate::bare_metal::no_kernel()?, timeout);
    check(
        matches!(boot, Err(ControlError::Timeout { after, .. }) if after == timeout),
        format!("found {boot:?}"),
    )?;
    check_eq(vm.handle.stop(timeout), Exit::Killed { signal: 9 })?;
    check_eq(vm.end()?, Exit::Killed { signal: 9 })?;
    let late = vm.handle.set_balloon(0);
    check(
        matches!(late, Err(ControlError::Ended(Exit::Killed { signal: 9 }))),
        format!("found {late:?}"),
    )
}

fn wrong_answer() -> Outcome {
    let vm = spawn("wrong-answer")?;
    let boot = vm.handle.boot(&crate::bare_metal::no_kernel()?, DEADLINE);
    check(
        matches!(&boot, Err(ControlError::Ended(exit)) if check_fault(exit, "wrong kind").is_ok()),
        format!("found {boot:?}"),
    )?;
    vm.end().map(|_| ())
}
