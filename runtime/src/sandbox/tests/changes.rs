//! An exit and what the container wrote.

use ttrpc::Code;

use super::super::Status;
use super::stub::{Fixture, until};

#[tokio::test]
async fn an_exit_is_told_when_the_changes_are_saved() {
    let mut f = Fixture::new();
    f.running().await;
    f.guest.hang("save");
    f.guest.exit_changed(7);
    f.guest.called("save").await;
    assert_eq!(f.told(), ["created 4711", "started"]);
    assert_eq!(f.sandbox.state("c1", "").unwrap().status, Status::Running);
    // It has ended, so there is nothing to pause.
    f.sandbox.pause("c1").await.unwrap_err();
    // Saying it again saves nothing again.
    f.guest.exit_changed(9);
    f.guest.mend();
    assert_eq!(f.wait("").await.status, 7);
    assert_eq!(f.told(), ["exited 7"]);
    let saved = f.guest.log();
    let saved = saved.iter().filter(|line| line.starts_with("save"));
    assert_eq!(saved.collect::<Vec<_>>(), ["save", "saved c1"]);
}

#[tokio::test]
async fn changes_that_are_lost_hide_no_exit() {
    let f = Fixture::new();
    f.running().await;
    f.guest.fail("save", Code::INTERNAL, "");
    f.guest.exit_changed(3);
    assert_eq!(f.wait("").await.status, 3);
    f.sandbox.delete("c1", "").await.unwrap();
    assert_eq!(f.guest.balance(), (1, 1));
}

#[tokio::test]
async fn a_machine_that_dies_meanwhile_changes_no_exit() {
    let f = Fixture::new();
    f.running().await;
    f.guest.hang("save");
    f.guest.exit_changed(4);
    f.guest.called("save").await;
    f.guest.die(true);
    f.guest.mend();
    assert_eq!(f.wait("").await.status, 4);
}

#[tokio::test]
async fn nothing_is_saved_where_nothing_changed() {
    let f = Fixture::new();
    f.running().await;
    f.guest.exit("", 0);
    f.wait("").await;
    until(|| !f.guest.log().is_empty()).await;
    assert!(!f.guest.log().iter().any(|line| line.starts_with("save")));
}
