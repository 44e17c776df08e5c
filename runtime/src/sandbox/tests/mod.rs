//! The Task API's rules, without containerd and without a virtual machine.

mod changes;
mod hooks;
mod pause;
mod stub;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ttrpc::Code;

use super::machine::Event as MachineEvent;
use super::{Error, Kind, Status};
use crate::request::Stdio;
use stub::{Fixture, PID, SHORT, until};

fn none() -> Stdio {
    Stdio::new("", "", "", false).unwrap()
}

fn kind<T: std::fmt::Debug>(result: Result<T, Error>) -> Kind {
    result.unwrap_err().kind()
}

#[tokio::test]
async fn a_life_is_told_in_order_and_leaves_nothing() {
    let mut f = Fixture::new();
    assert_eq!(
        f.sandbox.create(f.request("c1", none())).await.unwrap(),
        PID
    );
    assert_eq!(f.sandbox.state("c1", "").unwrap().status, Status::Created);
    assert_eq!(f.sandbox.start("c1", "").await.unwrap(), PID);
    assert_eq!(f.sandbox.state("c1", "").unwrap().status, Status::Running);
    f.guest.exit("", 7);
    assert_eq!(f.wait("").await.status, 7);
    // Whoever asks late hears it as well.
    assert_eq!(f.wait("").await.status, 7);
    let state = f.sandbox.state("c1", "").unwrap();
    assert_eq!(
        (state.status, state.exit.unwrap().status),
        (Status::Stopped, 7)
    );
    let (pid, exit) = f.sandbox.delete("c1", "").await.unwrap();
    assert_eq!((pid, exit.status), (PID, 7));
    assert_eq!(
        f.told(),
        ["created 4711", "started", "exited 7", "deleted 7"]
    );
    assert_eq!(
        f.guest.log(),
        ["connect", "create 0:0:0", "start", "shutdown"]
    );
    assert_eq!(f.guest.balance(), (1, 1));
    assert!(f.sandbox.is_idle());
    assert_eq!(kind(f.sandbox.wait("c1", "").await), Kind::NotFound);
}

#[tokio::test]
async fn every_guest_is_told_who_it_is() {
    let (one, other) = (Fixture::new(), Fixture::new());
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    one.created().await;
    other.created().await;
    let (one, other) = (one.guest.identity(), other.guest.identity());
    assert_eq!(one.hostname, "host");
    assert!(u128::try_from(one.host_time_ns).unwrap() >= before.as_nanos());
    assert_eq!(one.entropy.len(), 32);
    assert_ne!(one.entropy, other.entropy);
    let id = &one.machine_id;
    assert!(
        id.len() == 32 && id.bytes().all(|b| b"0123456789abcdef".contains(&b)),
        "{id}"
    );
    // A random UUID: version 4, variant 1.
    assert_eq!(&id[12..13], "4");
    assert!("89ab".contains(&id[16..17]), "{id}");
    assert_ne!(one.machine_id, other.machine_id);
}

#[tokio::test]
async fn an_exit_that_overtakes_its_start_is_told_after_it() {
    let mut f = Fixture::new();
    f.created().await;
    f.guest.exit_before_answer("start", "", 3);
    f.sandbox.start("c1", "").await.unwrap();
    f.wait("").await;
    f.sandbox.exec(f.exec_request("e", none())).unwrap_err();
    assert_eq!(f.told(), ["created 4711", "started", "exited 3"]);
}

#[tokio::test]
async fn an_exit_is_told_when_all_output_is_out() {
    let mut f = Fixture::new();
    f.sandbox.create(f.request("c1", f.stdio())).await.unwrap();
    f.sandbox.start("c1", "").await.unwrap();
    f.guest.exit("", 0);
    f.guest.close_port(1);
    f.guest.oom();
    // The out-of-memory event was sent last: when it is here, so is all the rest.
    f.guest.called("create 0:1:2").await;
    let mut told = Vec::new();
    let deadline = tokio::time::Instant::now() + SHORT / 2;
    while tokio::time::Instant::now() < deadline && !told.contains(&"oom".to_owned()) {
        told.extend(f.told());
        tokio::task::yield_now().await;
    }
    assert_eq!(told, ["created 4711", "started", "oom"]);
    assert_eq!(f.sandbox.state("c1", "").unwrap().status, Status::Running);
    f.guest.close_port(2);
    f.wait("").await;
    assert_eq!(f.told(), ["exited 0"]);
    until(|| f.guest.attached().is_empty()).await;
}

#[tokio::test]
async fn output_nobody_takes_delays_an_exit_only_so_long() {
    let f = Fixture::new();
    f.sandbox.create(f.request("c1", f.stdio())).await.unwrap();
    f.sandbox.start("c1", "").await.unwrap();
    f.guest.exit("", 5);
    assert_eq!(f.wait("").await.status, 5);
}

/// A client closes its fifo as soon as it hears of the exit, read or not.
#[tokio::test]
async fn an_exit_is_told_when_the_output_is_read() {
    let mut f = Fixture::with_drain(Duration::from_secs(60));
    let fifo = f.last_words().await;
    f.guest.exit("", 0);
    f.guest.oom();
    let mut told = Vec::new();
    while !told.contains(&"oom".to_owned()) {
        told.extend(f.told());
        tokio::task::yield_now().await;
    }
    assert_eq!(told, ["created 4711", "started", "oom"]);
    assert_eq!(f.sandbox.state("c1", "").unwrap().status, Status::Running);
    f.read(&fifo);
    f.wait("").await;
    assert_eq!(f.told(), ["exited 0"]);
}

#[tokio::test]
async fn output_nobody_reads_delays_an_exit_only_so_long() {
    let f = Fixture::new();
    f.last_words().await;
    f.guest.exit("", 5);
    assert_eq!(f.wait("").await.status, 5);
}

#[tokio::test]
async fn execs_live_and_die_in_order() {
    let mut f = Fixture::new();
    f.running().await;
    f.exec("e1", none()).await.unwrap();
    assert_eq!(f.sandbox.state("c1", "e1").unwrap().status, Status::Running);
    assert_eq!(
        kind(f.sandbox.delete("c1", "e1").await),
        Kind::FailedPrecondition
    );
    f.sandbox.kill("c1", "e1", 15, false).await.unwrap();
    f.guest.exit("e1", 143);
    assert_eq!(f.wait("e1").await.status, 143);
    assert_eq!(f.sandbox.delete("c1", "e1").await.unwrap().1.status, 143);
    assert_eq!(kind(f.sandbox.state("c1", "e1").map(drop)), Kind::NotFound);
    let told = f.told();
    assert_eq!(told[2..], ["added e1", "started e1", "exited e1 143"]);
    assert_eq!(
        f.guest.log()[3..],
        ["exec e1 0:0:0", "signal e115", "forget e1"]
    );
}

#[tokio::test]
async fn what_the_state_does_not_allow_is_refused() {
    let f = Fixture::new();
    let s = &f.sandbox;
    assert_eq!(kind(s.start("c1", "").await), Kind::NotFound);
    assert_eq!(kind(s.state("c1", "").map(drop)), Kind::NotFound);
    assert_eq!(kind(s.kill("c1", "", 9, false).await), Kind::NotFound);
    assert_eq!(kind(s.delete("c1", "").await), Kind::NotFound);
    f.created().await;
    assert_eq!(
        kind(s.exec(f.exec_request("e", none()))),
        Kind::FailedPrecondition
    );
    assert_eq!(kind(s.start("c1", "e").await), Kind::NotFound);
    s.start("c1", "").await.unwrap();
    assert_eq!(kind(s.start("c1", "").await), Kind::FailedPrecondition);
    assert_eq!(kind(s.delete("c1", "").await), Kind::FailedPrecondition);
    assert_eq!(
        kind(s.kill("c1", "", 65, false).await),
        Kind::InvalidArgument
    );
    s.exec(f.exec_request("e", none())).unwrap();
    assert_eq!(
        kind(s.exec(f.exec_request("e", none()))),
        Kind::AlreadyExists
    );
    assert_eq!(
        kind(s.kill("c1", "e", 9, false).await),
        Kind::FailedPrecondition
    );
    f.guest.exit("", 0);
    f.wait("").await;
    assert_eq!(kind(s.start("c1", "").await), Kind::FailedPrecondition);
    assert_eq!(kind(s.kill("c1", "", 9, false).await), Kind::NotFound);
    assert_eq!(
        kind(s.resize("c1", "", 80, 24).await),
        Kind::FailedPrecondition
    );
    assert_eq!(
        kind(s.exec(f.exec_request("x", none()))),
        Kind::FailedPrecondition
    );
    s.delete("c1", "").await.unwrap();
    assert_eq!(kind(s.delete("c1", "").await), Kind::NotFound);
}

#[tokio::test]
async fn one_id_is_created_once() {
    let f = Fixture::new();
    let (one, two) = tokio::join!(
        f.sandbox.create(f.request("c1", none())),
        f.sandbox.create(f.request("c1", none())),
    );
    assert_eq!(one.unwrap(), PID);
    assert_eq!(kind(two), Kind::AlreadyExists);
    let again = f.sandbox.create(f.request("c1", none())).await;
    assert_eq!(kind(again), Kind::AlreadyExists);
    let other = f.sandbox.create(f.request("c2", none())).await;
    assert_eq!(kind(other), Kind::Unimplemented);
    assert_eq!(f.guest.balance(), (1, 0));
}

#[tokio::test]
async fn a_failed_create_leaves_nothing_and_may_be_tried_again() {
    let mut f = Fixture::new();
    f.guest.fail(
        "create",
        Code::NOT_FOUND,
        "exec: \"x\": executable file not found in $PATH",
    );
    let error = f.sandbox.create(f.request("c1", none())).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert_eq!(
        error.to_string(),
        "exec: \"x\": executable file not found in $PATH"
    );
    assert!(f.sandbox.is_idle());
    assert_eq!(f.guest.balance(), (1, 1));
    assert!(f.told().is_empty());
    f.guest.mend();
    f.created().await;
    assert_eq!(f.told(), ["created 4711"]);
}

#[tokio::test]
async fn a_missing_stream_fails_before_anything_is_launched() {
    let f = Fixture::new();
    let stdio = Stdio::new("", "/nonexistent/fifo", "", false).unwrap();
    let error = f.sandbox.create(f.request("c1", stdio)).await.unwrap_err();
    assert!(
        error.chain().contains("/nonexistent/fifo"),
        "{}",
        error.chain()
    );
    assert_eq!(f.guest.balance(), (0, 0));
    f.created().await;
}

#[tokio::test]
async fn an_agent_that_never_listens_meets_a_deadline() {
    let f = Fixture::new();
    f.guest.silent_boot();
    let error = f.sandbox.create(f.request("c1", none())).await.unwrap_err();
    assert_eq!(error.kind(), Kind::DeadlineExceeded);
    assert!(
        error
            .to_string()
            .contains("does not listen; the last it logged is: Kernel panic"),
        "{error}"
    );
    assert_eq!(f.guest.log(), ["killed"]);
    assert_eq!(f.guest.balance(), (1, 1));
}

#[tokio::test]
async fn an_agent_of_another_version_is_refused() {
    let f = Fixture::new();
    f.guest.speak_version(supermachine_protocol::VERSION + 1);
    let error = f.sandbox.create(f.request("c1", none())).await.unwrap_err();
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    assert!(error.to_string().contains("protocol version"), "{error}");
}

#[tokio::test]
async fn a_machine_that_ends_while_booting_says_why() {
    let f = Fixture::new();
    f.guest.silent_boot();
    let (guest, sandbox) = (f.guest.clone(), f.sandbox.clone());
    let request = f.request("c1", none());
    let create = tokio::spawn(async move { sandbox.create(request).await });
    until(|| guest.balance().0 == 1).await;
    guest.die(false);
    let error = create.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::MachineEnded { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("it was told to; the last it logged is: Kernel panic"),
        "{text}"
    );
    assert_eq!(f.guest.balance(), (1, 1));
}

#[tokio::test]
async fn a_machine_that_ends_during_create_makes_no_events() {
    let mut f = Fixture::new();
    f.guest.hang("create");
    let (guest, sandbox) = (f.guest.clone(), f.sandbox.clone());
    let request = f.request("c1", none());
    let create = tokio::spawn(async move { sandbox.create(request).await });
    guest.called("create").await;
    guest.die(true);
    assert!(matches!(
        create.await.unwrap(),
        Err(Error::MachineEnded { .. })
    ));
    assert!(f.told().is_empty());
    assert!(f.sandbox.is_idle());
}

/// As when containerd was restarted meanwhile, and finds a shim that has no container.
#[tokio::test]
async fn a_create_that_was_given_up_is_undone_at_the_end() {
    let mut f = Fixture::new();
    f.guest.hang("create");
    let (guest, sandbox) = (f.guest.clone(), f.sandbox.clone());
    let request = f.request("c1", none());
    let create = tokio::spawn(async move { sandbox.create(request).await });
    guest.called("create").await;
    assert!(f.sandbox.is_idle());
    f.sandbox.end().await;
    assert_eq!(kind(create.await.unwrap()), Kind::FailedPrecondition);
    assert_eq!(f.guest.balance(), (1, 1));
    assert!(f.told().is_empty());
}

#[tokio::test]
async fn a_machine_that_ends_under_a_created_container_ends_it() {
    let mut f = Fixture::new();
    f.created().await;
    f.guest.die(true);
    assert_eq!(f.wait("").await.status, 137);
    f.sandbox.delete("c1", "").await.unwrap();
    assert_eq!(f.told(), ["created 4711", "exited 137", "deleted 137"]);
    assert_eq!(f.guest.balance(), (1, 1));
}

#[tokio::test]
async fn a_machine_that_ends_during_start_ends_the_container_once() {
    let mut f = Fixture::new();
    f.created().await;
    f.guest.hang("start");
    let (guest, sandbox) = (f.guest.clone(), f.sandbox.clone());
    let start = tokio::spawn(async move { sandbox.start("c1", "").await });
    guest.called("start").await;
    guest.die(true);
    assert!(matches!(
        start.await.unwrap(),
        Err(Error::MachineEnded { .. })
    ));
    assert_eq!(f.wait("").await.status, 137);
    assert_eq!(f.told(), ["created 4711", "exited 137"]);
}

#[tokio::test]
async fn a_machine_that_ends_takes_every_process_with_it_init_last() {
    let mut f = Fixture::new();
    f.sandbox.create(f.request("c1", f.stdio())).await.unwrap();
    f.sandbox.start("c1", "").await.unwrap();
    f.exec("e1", f.stdio()).await.unwrap();
    f.sandbox.exec(f.exec_request("idle", none())).unwrap();
    f.told();
    f.guest.die(false);
    assert_eq!(f.wait("").await.status, 255);
    assert_eq!(f.wait("e1").await.status, 255);
    assert_eq!(f.told(), ["exited e1 255", "exited 255"]);
    assert!(f.sandbox.start("c1", "idle").await.is_err());
    assert_eq!(
        kind(f.sandbox.kill("c1", "", 9, false).await),
        Kind::NotFound
    );
    f.sandbox.delete("c1", "").await.unwrap();
    assert_eq!(f.told(), ["deleted 255"]);
}

#[tokio::test]
async fn a_machine_that_ends_after_the_exit_changes_nothing() {
    let mut f = Fixture::new();
    f.running().await;
    f.guest.exit("", 0);
    f.wait("").await;
    f.guest.die(false);
    let (_, exit) = f.sandbox.delete("c1", "").await.unwrap();
    assert_eq!(exit.status, 0);
    assert_eq!(f.told()[2..], ["exited 0", "deleted 0"]);
}

#[tokio::test]
async fn a_guest_that_hangs_in_start_is_killed() {
    let mut f = Fixture::new();
    f.created().await;
    f.guest.hang("start");
    let result = f.sandbox.start("c1", "").await;
    assert_eq!(kind(result), Kind::DeadlineExceeded);
    f.wait("").await;
    assert!(f.guest.log().contains(&"killed".to_owned()));
    assert_eq!(f.told(), ["created 4711", "exited 255"]);
}

#[tokio::test]
async fn sigkill_reaches_a_guest_that_does_not_answer() {
    let f = Fixture::new();
    f.running().await;
    f.guest.hang("signal");
    assert_eq!(
        kind(f.sandbox.kill("c1", "", 15, false).await),
        Kind::DeadlineExceeded
    );
    f.sandbox.kill("c1", "", 9, false).await.unwrap();
    assert_eq!(f.wait("").await.status, 137);
}

#[tokio::test]
async fn a_machine_without_its_agent_is_ended() {
    let f = Fixture::new();
    f.running().await;
    f.guest.lose_agent();
    assert_eq!(f.wait("").await.status, 137);
}

#[tokio::test]
async fn a_guest_that_does_not_power_off_is_killed() {
    let f = Fixture::new();
    f.running().await;
    f.guest.exit("", 0);
    f.wait("").await;
    f.guest.hang("shutdown");
    let delete = f.sandbox.delete("c1", "");
    tokio::time::timeout(Duration::from_secs(5), delete)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(f.guest.log().last().unwrap(), "killed");
    assert!(f.sandbox.is_idle());
}

#[tokio::test]
async fn what_never_ran_can_be_deleted() {
    let mut f = Fixture::new();
    f.running().await;
    f.sandbox.exec(f.exec_request("e", none())).unwrap();
    let sandbox = f.sandbox.clone();
    let waiting = tokio::spawn(async move { sandbox.wait("c1", "e").await });
    tokio::task::yield_now().await;
    f.sandbox.delete("c1", "e").await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().status, 255);
    assert!(!f.guest.log().iter().any(|line| line.starts_with("forget")));

    let mut f2 = Fixture::new();
    f2.created().await;
    f2.sandbox.delete("c1", "").await.unwrap();
    assert_eq!(f2.told(), ["created 4711", "exited 137", "deleted 137"]);
    assert_eq!(f.told()[2..], ["added e"]);
}

#[tokio::test]
async fn an_exec_that_cannot_run_is_stopped_and_can_be_deleted() {
    let mut f = Fixture::new();
    f.running().await;
    f.guest.fail("exec", Code::NOT_FOUND, "no such file");
    assert_eq!(kind(f.exec("e", f.stdio()).await), Kind::NotFound);
    assert_eq!(f.sandbox.state("c1", "e").unwrap().status, Status::Stopped);
    assert_eq!(f.wait("e").await.status, 255);
    f.sandbox.delete("c1", "e").await.unwrap();
    until(|| f.guest.attached().is_empty()).await;
    assert_eq!(f.told()[2..], ["added e"]);
}

#[tokio::test]
async fn ports_serve_again_once_both_sides_closed_them() {
    let f = Fixture::with_ports(3);
    f.running().await;
    f.exec("a", f.stdio()).await.unwrap();
    let error = f.exec("b", f.stdio()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::ResourceExhausted);
    assert!(error.to_string().contains("All 3 console ports"), "{error}");
    assert_eq!(f.guest.attached(), [1, 2]);
    f.guest.close_port(1);
    f.guest.close_port(2);
    f.guest.exit("a", 0);
    f.wait("a").await;
    until(|| f.guest.attached().is_empty()).await;
    f.exec("c", f.stdio()).await.unwrap();
    assert_eq!(f.guest.attached(), [1, 2]);
}

#[tokio::test]
async fn a_terminals_size_waits_for_the_terminal() {
    let f = Fixture::new();
    f.running().await;
    let terminal = Stdio::new("", "", "", true).unwrap();
    f.sandbox.exec(f.exec_request("t", terminal)).unwrap();
    f.sandbox.resize("c1", "t", 100, 30).await.unwrap();
    f.sandbox.start("c1", "t").await.unwrap();
    f.sandbox.resize("c1", "t", 80, 24).await.unwrap();
    // Without a terminal there is nothing to resize, and containerd's clients try anyway.
    f.sandbox.resize("c1", "", 80, 24).await.unwrap();
    let log = f.guest.log();
    assert_eq!(
        log[3..],
        ["exec t 0:0:0", "resize t 100x30", "resize t 80x24"]
    );
}

#[tokio::test]
async fn ending_a_sandbox_ends_all() {
    let mut f = Fixture::new();
    f.running().await;
    f.sandbox.end().await;
    assert_eq!(f.wait("").await.status, 137);
    assert_eq!(f.guest.balance(), (1, 1));
    assert_eq!(f.told(), ["created 4711", "started", "exited 137"]);
}

#[tokio::test]
async fn reports_of_what_is_not_there_are_ignored() {
    let f = Fixture::new();
    f.running().await;
    f.guest.exit("ghost", 1);
    f.guest.machine_event(MachineEvent::PortOpened(999));
    f.guest.close_port(12);
    f.guest.exit("", 0);
    assert_eq!(f.wait("").await.status, 0);
}
