//! Free pages told on request, and free pages the guest has filled.

use std::thread::JoinHandle;
use std::time::Duration;

use super::*;

/// Somebody asks for free pages; returns once the command is there for the driver to see.
fn ask(rig: &mut Rig<Balloon>, limit: Duration) -> (u32, JoinHandle<Result<u64, BalloonError>>) {
    let before = rig.interrupt.config_count();
    let handle = rig.device.handle();
    let asking = std::thread::spawn(move || handle.discard_free_pages(limit));
    rig.run_until(|rig| rig.interrupt.config_count() > before);
    (u32::from_le_bytes(rig.config(8)), asking)
}

const LONG: Duration = Duration::from_secs(20);

fn say(rig: &mut Rig<Balloon>, id: u32) {
    let command = rig.guest.put(&id.to_le_bytes());
    assert_eq!(rig.exchange(HINTS, &[command]).written, 0);
}

fn hint(rig: &mut Rig<Balloon>, first: u64, pages: u64) {
    let buffer = Buffer::writable(page(first), (pages * PAGE) as u32);
    assert_eq!(rig.exchange(HINTS, &[buffer]).written, 0);
}

#[test]
fn pages_hinted_on_request_leave_the_host() {
    let mut rig = rig(balloon());
    assert_eq!(rig.config(8), [0; 4]);
    for run in 0..2 {
        let first = run * 16;
        let (id, asking) = ask(&mut rig, LONG);
        assert!(id >= 2, "0 and 1 have meanings of their own");
        // Before the command is repeated, and under another, nothing is meant.
        hint(&mut rig, first, 1);
        say(&mut rig, id + 1);
        hint(&mut rig, first + 1, 1);
        say(&mut rig, id);
        hint(&mut rig, first + 2, 3);
        hint(&mut rig, first + 7, 1);
        say(&mut rig, 0);
        assert_eq!(asking.join().unwrap().unwrap(), 4 * PAGE);
        assert_eq!(
            rig.config(8),
            1_u32.to_le_bytes(),
            "the driver gets its pages back"
        );
        // Too late.
        hint(&mut rig, first + 10, 1);
        say(&mut rig, id);
        hint(&mut rig, first + 11, 1);
        let expected = [2, 3, 4, 7].map(|index| first + index);
        let there: Vec<_> = gone(&rig, 32)
            .into_iter()
            .filter(|at| *at >= first)
            .collect();
        assert_eq!(there, expected);
    }
    let handle = rig.device.handle();
    let metrics = handle.metrics();
    assert_eq!(metrics.hinted_bytes.get(), 8 * PAGE);
    assert_eq!(metrics.stale_hints.get(), 8);
    assert_eq!(rig.faults.count(), 0);
}

#[test]
fn a_guest_that_never_ends_its_hints_is_not_waited_for() {
    let mut rig = rig(balloon());
    let (id, asking) = ask(&mut rig, Duration::from_millis(200));
    say(&mut rig, id);
    hint(&mut rig, 1, 2);
    let handle = rig.device.handle();
    assert!(matches!(
        handle.discard_free_pages(LONG),
        Err(BalloonError::Busy)
    ));
    let error = asking.join().unwrap().unwrap_err();
    assert!(matches!(error, BalloonError::Unfinished { discarded } if discarded == 2 * PAGE));
    // The driver has its pages back: whatever it says now is no hint.
    hint(&mut rig, 5, 1);
    assert_eq!(gone(&rig, 8), [1, 2]);

    let (_, asking) = ask(&mut rig, LONG);
    rig.device.reset();
    let error = asking.join().unwrap().unwrap_err();
    assert!(matches!(error, BalloonError::Unfinished { discarded: 0 }));
    assert!(matches!(
        handle.discard_free_pages(LONG),
        Err(BalloonError::NoHints)
    ));
    // A driver that has not agreed to it is not asked.
    rig.activate_queues(F_VERSION_1, 0, &[0, 1]).unwrap();
    assert!(matches!(
        handle.discard_free_pages(LONG),
        Err(BalloonError::NoHints)
    ));
}

#[test]
fn commands_may_be_anything() {
    let mut rig = rig(balloon());
    let (id, asking) = ask(&mut rig, LONG);
    let short = rig.guest.put(&id.to_le_bytes()[..3]);
    rig.exchange(HINTS, &[short]);
    let handle = rig.device.handle();
    assert_eq!(handle.metrics().remainders.get(), 1);
    // Command and pages in one chain, and more than the command.
    let command = rig.guest.put(&[&id.to_le_bytes()[..], &[9; 5]].concat());
    let pages = Buffer::writable(page(3), 2 * PAGE as u32);
    rig.exchange(HINTS, &[command, pages]);
    assert_eq!(gone(&rig, 8), [3, 4]);
    say(&mut rig, u32::MAX);
    assert_eq!(asking.join().unwrap().unwrap(), 2 * PAGE);
}

#[test]
fn free_pages_that_are_filled_are_kept() {
    let mut rig = rig(balloon());
    let report = |rig: &mut Rig<Balloon>, index: u64| {
        let buffer = Buffer::writable(page(index), PAGE as u32);
        rig.exchange(REPORTING, &[buffer]);
    };
    // Zeroes are what discarded pages are filled with.
    report(&mut rig, 1);
    rig.device.write_config(12, &0xaaaa_aaaa_u32.to_le_bytes());
    report(&mut rig, 2);
    let (id, asking) = ask(&mut rig, LONG);
    say(&mut rig, id);
    hint(&mut rig, 3, 1);
    say(&mut rig, 0);
    assert_eq!(asking.join().unwrap().unwrap(), 0);
    assert_eq!(gone(&rig, 8), [1]);
    assert_eq!(rig.device.handle().metrics().poisoned.get(), 2);
    // In the balloon they are nobody's.
    inflate(&mut rig, [4]);
    assert_eq!(gone(&rig, 8), [1, 4]);

    // A driver that has not agreed to the feature has nothing to say about it.
    rig.device.reset();
    assert_eq!(rig.config(12), [0; 4]);
    rig.activate_queues(F_VERSION_1 | F_PAGE_REPORTING, 0, &[0, 1, 2])
        .unwrap();
    rig.device.write_config(12, &[1]);
    let buffer = Buffer::writable(page(6), PAGE as u32);
    rig.exchange(2, &[buffer]);
    assert_eq!(gone(&rig, 8), [1, 4, 6]);
}
