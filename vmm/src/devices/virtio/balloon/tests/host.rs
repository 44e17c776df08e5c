//! What the host asks of a balloon: targets, statistics.

use std::time::Duration;

use super::*;

fn stat(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

#[test]
fn statistics_are_kept_and_asked_for_by_returning_the_buffer() {
    let mut rig = rig(balloon());
    let handle = rig.device.handle();
    let first = [
        stat(4, 100),
        stat(5, 2000),
        stat(77, 9),
        stat(4, 111),
        vec![6, 0],
    ]
    .concat();
    let buffer = rig.guest.put(&first);
    let head = rig.submit(STATS, &[buffer]);
    assert_eq!(rig.used(STATS), None, "the device keeps it");
    let stats = handle.report(Duration::ZERO).unwrap().stats;
    assert_eq!(
        (stats.free, stats.total, stats.available),
        (Some(111), Some(2000), None)
    );

    // Somebody wants fresh ones, in another thread; the guest answers.
    let asking = handle.clone();
    let asked = std::thread::spawn(move || asking.report(Duration::from_secs(20)).unwrap().stats);
    rig.run_until(|rig| rig.queues[usize::from(STATS)].used_index() == 1);
    assert_eq!(
        rig.used(STATS).map(|used| (used.head, used.written)),
        Some((head, 0))
    );
    rig.guest.write(buffer.addr, &stat(6, 42));
    rig.submit(STATS, &[Buffer { len: 10, ..buffer }]);
    let stats = asked.join().unwrap();
    assert_eq!((stats.available, stats.free), (Some(42), None));
    assert_eq!(handle.metrics().stats_updates.get(), 2);

    // A driver with two buffers gets the older back.
    let newer = rig.guest.put(&stat(8, 1));
    rig.submit(STATS, &[newer]);
    assert!(rig.used(STATS).is_some());
    assert_eq!(rig.queues[usize::from(STATS)].lent(), 1);
}

#[test]
fn statistics_nobody_sends_are_not_waited_for_without_end() {
    let rig = rig(balloon());
    let handle = rig.device.handle();
    handle.set_target(8 * PAGE).unwrap();
    let report = handle.report(Duration::from_millis(5)).unwrap();
    assert_eq!(
        report,
        Report {
            target: 8 * PAGE,
            actual: 0,
            stats: Stats::default()
        }
    );
}

#[test]
fn a_target_is_told_by_configuration_and_interrupt() {
    let mut rig = Rig::new(balloon());
    let handle = rig.device.handle();
    handle.set_target(100 * PAGE + 5).unwrap();
    rig.activate();
    assert_eq!(
        rig.interrupt.config_count(),
        0,
        "a driver reads it when it starts"
    );
    assert_eq!(u32::from_le_bytes(rig.config(0)), 100);
    handle.set_target(7 * PAGE).unwrap();
    handle.set_target(7 * PAGE).unwrap();
    assert_eq!(rig.interrupt.config_count(), 1);
    assert_eq!(
        (handle.target(), u32::from_le_bytes(rig.config(0))),
        (7 * PAGE, 7)
    );
    let limit = MEMORY - FLOOR;
    handle.set_target(limit).unwrap();
    let error = handle.set_target(limit + 1).unwrap_err();
    assert!(
        matches!(error, BalloonError::Target { asked, limit: most } if asked == limit + 1 && most == limit)
    );
    assert_eq!(handle.target(), limit);
}

#[test]
fn a_target_is_waited_for() {
    let rig = Rig::new(balloon());
    let handle = rig.device.handle();
    assert_eq!(handle.wait_for_target(Duration::ZERO).unwrap(), 0);
    handle.set_target(8 * PAGE).unwrap();
    let error = handle
        .wait_for_target(Duration::from_millis(5))
        .unwrap_err();
    assert!(matches!(error, BalloonError::Short { target, actual: 0 } if target == 8 * PAGE));

    let mut device = rig.device;
    let waiting = handle.clone();
    let reached = std::thread::spawn(move || waiting.wait_for_target(Duration::from_secs(20)));
    device.write_config(4, &3_u32.to_le_bytes());
    device.write_config(4, &8_u32.to_le_bytes());
    assert_eq!(reached.join().unwrap().unwrap(), 8 * PAGE);

    // The host may come to the guest as well, and a reset empties the balloon.
    handle.set_target(0).unwrap();
    let waiting = handle.clone();
    let reached = std::thread::spawn(move || waiting.wait_for_target(Duration::from_secs(20)));
    device.reset();
    assert_eq!(reached.join().unwrap().unwrap(), 0);
}
