//! A transport goes on where another was.

use super::*;
use crate::devices::virtio::Position;
use crate::snapshot::state;

/// What driver and device of `up` are, after a while.
fn saved(up: &Fixture) -> TransportState {
    up.transport.quiesce().unwrap();
    let mut state = up.transport.save();
    state.queues[0].position = Position { avail: 7, used: 6 };
    state
}

#[test]
fn a_restored_transport_is_what_the_saved_one_was() {
    let up = Fixture::new();
    up.start();
    up.transport
        .lines
        .interrupt_status
        .store(1, Ordering::SeqCst);
    let state = saved(&up);
    let bytes = state::encode(&state).unwrap();

    let down = Fixture::new();
    down.transport
        .restore(state::decode(&bytes).unwrap())
        .unwrap();
    assert_eq!(down.log.calls(), [], "nothing works before the start");
    let mut again = down.transport.save();
    // The device has no queues yet.
    again.queues[0].position = state.queues[0].position;
    assert_eq!(again, state);

    down.transport.start_restored();
    assert_eq!(down.transport.save().queues, state.queues);
    assert_eq!(down.log.calls(), up.log.calls()[..1]);
    // What it had not acknowledged, and that the configuration is another.
    assert_eq!(down.edges.load(Ordering::SeqCst), 2);
    assert_eq!(down.read(INTERRUPT_STATUS), 3);
    assert_eq!(down.read(STATUS), up.read(STATUS));
    assert_eq!(down.read(CONFIG_GENERATION), up.read(CONFIG_GENERATION) + 1);
}

#[test]
fn a_driver_that_was_not_up_goes_on_setting_up() {
    let half = Fixture::new();
    half.write(STATUS, ACKNOWLEDGE);
    half.write(STATUS, ACKNOWLEDGE | DRIVER);
    half.accept(F_VERSION_1);
    let state = half.transport.save();

    let other = Fixture::new();
    other.transport.restore(state).unwrap();
    other.transport.start_restored();
    assert_eq!(other.log.calls(), []);
    other.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(other.read(STATUS), ACKNOWLEDGE | DRIVER | FEATURES_OK);
}

#[test]
fn a_broken_device_stays_broken() {
    let up = Fixture::new();
    up.start();
    up.transport.state().faults.needs_reset(&"test");
    let state = saved(&up);
    up.transport.resume();
    assert_eq!(up.log.calls().last(), Some(&Call::Quiesce));

    let other = Fixture::new();
    other.transport.restore(state).unwrap();
    other.transport.start_restored();
    assert_eq!(other.log.calls(), []);
    assert_ne!(other.read(STATUS) & NEEDS_RESET, 0);
}

#[test]
fn states_that_cannot_be_are_refused() {
    let up = Fixture::new();
    up.start();
    let good = saved(&up);
    let changes: [&dyn Fn(&mut TransportState); 9] = [
        &|state| state.id = "block0".into(),
        &|state| state.device_type = 2,
        &|state| state.offered |= 1 << 50,
        &|state| state.accepted |= 1 << 50,
        &|state| state.status = DRIVER_OK,
        &|state| state.status |= 1 << 20,
        &|state| state.interrupt_status = 4,
        &|state| state.queues.truncate(1),
        &|state| state.queues.push(state.queues[0]),
    ];
    for change in changes {
        let mut bad = good.clone();
        change(&mut bad);
        let error = Fixture::new().transport.restore(bad.clone()).unwrap_err();
        assert!(
            matches!(error, StateError::Value { .. }),
            "{bad:?}: {error}"
        );
    }
    // Rings outside of RAM stop the device, as they do a driver's.
    let mut outside = good;
    outside.queues[0].descriptors = 1 << 40;
    let other = Fixture::new();
    other.transport.restore(outside).unwrap();
    other.transport.start_restored();
    assert_ne!(other.read(STATUS) & NEEDS_RESET, 0);
    assert_eq!(other.faults.lock().unwrap().len(), 1);
}
