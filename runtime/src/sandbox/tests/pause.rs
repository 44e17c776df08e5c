//! Pausing, and what goes by the guest's cgroup.

use oci_spec::runtime::LinuxResources;
use ttrpc::Code;

use super::stub::Fixture;
use super::{kind, none};
use crate::sandbox::{Kind, Status};

fn text<T: std::fmt::Debug>(result: Result<T, crate::sandbox::Error>) -> String {
    result.unwrap_err().to_string()
}

fn resources(json: &str) -> LinuxResources {
    serde_json::from_str(json).unwrap()
}

#[tokio::test]
async fn a_pause_is_told_and_over_when_it_is_resumed() {
    let mut f = Fixture::new();
    f.running().await;
    let s = &f.sandbox;
    s.pause("c1").await.unwrap();
    assert_eq!(s.state("c1", "").unwrap().status, Status::Paused);
    // What was known when it was paused.
    assert_eq!(s.stats("c1").await.unwrap().pids.current, 7);
    s.resume("c1").await.unwrap();
    assert_eq!(s.state("c1", "").unwrap().status, Status::Running);
    assert_eq!(s.stats("c1").await.unwrap().pids.current, 7);
    assert_eq!(f.told()[2..], ["paused", "resumed"]);
    assert_eq!(f.guest.log()[3..], ["stats", "pause", "resume", "stats"]);
}

#[tokio::test]
async fn transitions_are_refused_in_runcs_words() {
    let f = Fixture::new();
    let s = &f.sandbox;
    assert_eq!(kind(s.pause("c1").await), Kind::NotFound);
    f.created().await;
    assert_eq!(
        text(s.pause("c1").await),
        "cannot pause task in created state"
    );
    assert_eq!(
        text(s.resume("c1").await),
        "cannot resume task in created state"
    );
    s.start("c1", "").await.unwrap();
    assert_eq!(
        text(s.resume("c1").await),
        "cannot resume a running process"
    );
    s.pause("c1").await.unwrap();
    assert_eq!(text(s.pause("c1").await), "cannot pause a paused container");
    assert_eq!(
        text(s.delete("c1", "").await),
        "cannot delete a paused container"
    );
    let exec = s.exec(f.exec_request("e", none()));
    assert_eq!(text(exec), "cannot exec in a paused state");
    let update = s.update("c1", &resources("{}")).await;
    assert_eq!(text(update), "cannot update a paused container");
    s.resume("c1").await.unwrap();
    f.guest.exit("", 0);
    f.wait("").await;
    assert_eq!(
        text(s.pause("c1").await),
        "cannot pause a stopped container"
    );
    assert_eq!(
        text(s.resume("c1").await),
        "cannot resume a stopped container"
    );
    let update = s.update("c1", &resources("{}")).await;
    assert_eq!(text(update), "cannot update a stopped container");
}

#[tokio::test]
async fn signals_wait_for_the_end_of_a_pause() {
    let f = Fixture::new();
    f.running().await;
    let s = &f.sandbox;
    s.pause("c1").await.unwrap();
    for signal in [15, 10, 15] {
        s.kill("c1", "", signal, false).await.unwrap();
    }
    assert_eq!(f.guest.log()[3..], ["stats", "pause"]);
    s.resume("c1").await.unwrap();
    assert_eq!(f.guest.log()[5..], ["resume", "signal 15", "signal 10"]);
}

#[tokio::test]
async fn a_paused_container_can_be_killed() {
    let mut f = Fixture::new();
    f.running().await;
    f.sandbox.pause("c1").await.unwrap();
    f.sandbox.kill("c1", "", 15, false).await.unwrap();
    f.sandbox.kill("c1", "", 9, false).await.unwrap();
    assert_eq!(f.guest.log()[5..], ["resume", "signal 9"]);
    f.guest.exit("", 137);
    assert_eq!(f.wait("").await.status, 137);
    f.sandbox.delete("c1", "").await.unwrap();
    assert_eq!(f.told()[2..], ["paused", "exited 137", "deleted 137"]);
    assert_eq!(f.guest.balance(), (1, 1));
}

#[tokio::test]
async fn a_paused_machine_that_dies_is_an_exit() {
    let mut f = Fixture::new();
    f.running().await;
    f.sandbox.pause("c1").await.unwrap();
    f.guest.die(true);
    assert_eq!(f.wait("").await.status, 137);
    assert_eq!(f.sandbox.state("c1", "").unwrap().status, Status::Stopped);
    assert_eq!(kind(f.sandbox.stats("c1").await), Kind::NotFound);
    f.sandbox.delete("c1", "").await.unwrap();
    assert_eq!(f.told()[2..], ["paused", "exited 137", "deleted 137"]);
}

#[tokio::test]
async fn a_pause_that_fails_changes_nothing() {
    let mut f = Fixture::new();
    f.running().await;
    f.guest.fail("pause", Code::INTERNAL, "");
    assert_eq!(kind(f.sandbox.pause("c1").await), Kind::Internal);
    assert_eq!(f.sandbox.state("c1", "").unwrap().status, Status::Running);
    f.guest.mend();
    f.sandbox.pause("c1").await.unwrap();
    f.guest.fail("resume", Code::INTERNAL, "");
    assert_eq!(kind(f.sandbox.resume("c1").await), Kind::Internal);
    assert_eq!(f.sandbox.state("c1", "").unwrap().status, Status::Paused);
    f.guest.mend();
    f.sandbox.resume("c1").await.unwrap();
    assert_eq!(f.told()[2..], ["paused", "resumed"]);
}

#[tokio::test]
async fn a_silent_guest_has_no_statistics_and_can_be_paused() {
    let f = Fixture::new();
    f.running().await;
    f.guest.hang("stats");
    assert_eq!(kind(f.sandbox.stats("c1").await), Kind::Unavailable);
    f.sandbox.pause("c1").await.unwrap();
    assert_eq!(kind(f.sandbox.stats("c1").await), Kind::Unavailable);
}

#[tokio::test]
async fn limits_reach_guest_balloon_and_processors() {
    let f = Fixture::new();
    f.running().await;
    let json = r#"{"cpu":{"cpus":"1"},"memory":{"limit":134217728},"pids":{"limit":50}}"#;
    f.sandbox.update("c1", &resources(json)).await.unwrap();
    let log = f.guest.log();
    assert!(log[3].starts_with("update {"), "{log:?}");
    assert!(
        log[3].contains("134217728") && !log[3].contains("cpus"),
        "{log:?}"
    );
    assert_eq!(log[4..], ["cpuset 1", "balloon 288"]);
    let above = resources(r#"{"memory":{"limit":1073741824}}"#);
    assert_eq!(
        kind(f.sandbox.update("c1", &above).await),
        Kind::InvalidArgument
    );
    f.guest
        .fail("update", Code::INVALID_ARGUMENT, "memory.max = \"5\": no");
    let refused = f.sandbox.update("c1", &resources(json)).await;
    assert_eq!(kind(refused), Kind::InvalidArgument);
    assert_eq!(f.guest.log().len(), 7);
}
