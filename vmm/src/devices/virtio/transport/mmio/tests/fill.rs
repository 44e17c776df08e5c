//! A device is filled, and its driver hears of it.

use super::*;

fn contents(bytes: u64) -> Box<block::FileBackend> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    Box::new(block::FileBackend::open(file, false).unwrap())
}

#[test]
fn a_driver_that_is_up_is_told() {
    let fixture = Fixture::new();
    fixture.start();
    let generation = fixture.read(CONFIG_GENERATION);
    fixture.transport.fill(contents(512)).unwrap();
    let calls = fixture.log.calls();
    assert_eq!(calls[1..], [Call::Quiesce, Call::Fill, Call::Resume]);
    assert_eq!(fixture.read(CONFIG_GENERATION), generation + 1);
    assert_eq!(fixture.read(INTERRUPT_STATUS), 2);
    assert_eq!(fixture.edges.load(Ordering::SeqCst), 1);
}

#[test]
fn a_driver_that_may_have_read_the_capacity_is_told() {
    let fixture = Fixture::new();
    fixture.write(STATUS, ACKNOWLEDGE);
    fixture.write(STATUS, ACKNOWLEDGE | DRIVER);
    fixture.transport.fill(contents(512)).unwrap();
    assert_eq!(fixture.read(CONFIG_GENERATION), 1);
    assert_eq!(fixture.edges.load(Ordering::SeqCst), 1);
}

#[test]
fn nobody_is_told_where_nobody_is_and_of_what_failed() {
    let fixture = Fixture::new();
    fixture.transport.fill(contents(512)).unwrap();
    assert_eq!(fixture.edges.load(Ordering::SeqCst), 0);

    let fixture = Fixture::new();
    fixture.start();
    fixture.transport.fill(contents(0)).unwrap_err();
    assert_eq!(fixture.log.calls().last(), Some(&Call::Resume));
    assert_eq!(fixture.read(CONFIG_GENERATION), 0);
    assert_eq!(fixture.edges.load(Ordering::SeqCst), 0);
}
