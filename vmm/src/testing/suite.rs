//! What every device has to pass, whatever it does.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Rig, hostile};
use crate::devices::virtio::{F_RING_EVENT_IDX, F_RING_INDIRECT_DESC, F_VERSION_1, VirtioDevice};

/// Runs the suite on devices made by `make`. `prove` drives an active device through something it
/// is for, and panics when that fails; it has to work with any subset of ring features.
///
/// # Panics
/// When a device fails, which is what a test wants.
pub fn run<D: VirtioDevice>(make: impl Fn() -> D, prove: impl Fn(&mut Rig<D>)) {
    fresh(&mut Rig::new(make()));
    active(&mut Rig::new(make()), &prove);
    wrapped(&mut Rig::new(make()), &prove);
    incomplete(&mut Rig::new(make()), &prove);
    reset_and_reactivate(&mut Rig::new(make()), &prove);
    fault_then_reset(&mut Rig::new(make()), &prove);
    still(&mut Rig::new(make()), &prove);
    saved_and_restored(&mut Rig::new(make()), &make, &prove);
}

/// Drives a device with a script of misdeeds made from `bytes`, then resets it and proves that it
/// works as before.
///
/// # Panics
/// When the device panics, doesn't come to rest or fails the proof.
pub fn survives<D: VirtioDevice>(device: D, bytes: &[u8], prove: impl Fn(&mut Rig<D>)) {
    let mut rig = Rig::new(device);
    hostile::run(&mut rig, bytes);
    rig.device.reset();
    rig.activate();
    prove(&mut rig);
    assert_eq!(rig.faults.count(), 0);
}

/// Identity and configuration space of a device that was never active.
fn fresh<D: VirtioDevice>(rig: &mut Rig<D>) {
    let device = &mut rig.device;
    assert!(!device.id().is_empty());
    assert_ne!(device.device_type(), 0);
    assert!(!device.queue_max_sizes().is_empty());
    assert!(
        device
            .queue_max_sizes()
            .iter()
            .all(|size| size.is_power_of_two())
    );
    let transport = F_VERSION_1 | F_RING_INDIRECT_DESC | F_RING_EVENT_IDX;
    assert_eq!(
        device.features() & transport,
        0,
        "ring features are the transport's"
    );

    // Every width and place reads the same bytes, and nothing beyond the end but zeroes.
    let mut whole = [0; 256];
    device.read_config(0, &mut whole);
    for width in [1, 2, 4, 8] {
        for offset in 0..whole.len() - width {
            let mut part = [0xee; 8];
            device.read_config(offset as u64, &mut part[..width]);
            assert_eq!(
                part[..width],
                whole[offset..offset + width],
                "{width} bytes at {offset}"
            );
        }
    }
    for offset in [4096, u64::from(u32::MAX), u64::MAX - 3, u64::MAX] {
        let mut beyond = [0xee; 8];
        device.read_config(offset, &mut beyond);
        assert_eq!(beyond, [0; 8], "config space at {offset:#x}");
        device.write_config(offset, &[0xff; 8]);
    }
    device.reset();
    device.reset();
}

/// The device works with and without the ring features.
fn active<D: VirtioDevice>(rig: &mut Rig<D>, prove: &impl Fn(&mut Rig<D>)) {
    for ring in [
        0,
        F_RING_EVENT_IDX,
        F_RING_INDIRECT_DESC,
        F_RING_EVENT_IDX | F_RING_INDIRECT_DESC,
    ] {
        let features = rig.device.features() | F_VERSION_1 | ring;
        rig.activate_with(features, 0).expect("activation");
        rig.run();
        prove(rig);
        assert_eq!(rig.faults.count(), 0);
        rig.device.reset();
    }
}

/// Indexes run over the end of 16 bits.
fn wrapped<D: VirtioDevice>(rig: &mut Rig<D>, prove: &impl Fn(&mut Rig<D>)) {
    for features in [rig.all_features(), rig.device.features() | F_VERSION_1] {
        rig.activate_with(features, u16::MAX).expect("activation");
        prove(rig);
        prove(rig);
        assert_eq!(rig.faults.count(), 0);
        rig.device.reset();
    }
}

/// A driver that left queues out gets an error or a device without them, and another chance.
fn incomplete<D: VirtioDevice>(rig: &mut Rig<D>, prove: &impl Fn(&mut Rig<D>)) {
    let all: Vec<u16> = (0..).take(rig.queues.len()).collect();
    let mut subsets: Vec<Vec<u16>> = vec![vec![]];
    subsets.extend(all.iter().map(|&left_out| {
        all.iter()
            .copied()
            .filter(|&index| index != left_out)
            .collect()
    }));
    for subset in subsets {
        // Either answer will do.
        let _ = rig.activate_queues(rig.all_features(), 0, &subset);
        for queue in &rig.queues {
            queue.ring_bell();
        }
        rig.run();
        rig.device.reset();
    }
    rig.activate();
    prove(rig);
}

/// A reset device leaves memory alone, and works again when it is activated again.
fn reset_and_reactivate<D: VirtioDevice>(rig: &mut Rig<D>, prove: &impl Fn(&mut Rig<D>)) {
    for _ in 0..2 {
        rig.activate();
        prove(rig);
        // Requests on their way must not survive the reset.
        for queue in &mut rig.queues {
            let buffer = rig.guest.room(64);
            queue.submit(&[buffer]);
            queue.ring_bell();
        }
        rig.device.reset();
        let before = snapshot(rig);
        for queue in &rig.queues {
            queue.ring_bell();
        }
        rig.run();
        assert!(
            snapshot(rig) == before,
            "a reset device touched guest memory"
        );
    }
    rig.activate();
    prove(rig);
    assert_eq!(rig.faults.count(), 0);
}

/// A broken queue stops the device, once, and a reset mends it.
fn fault_then_reset<D: VirtioDevice>(rig: &mut Rig<D>, prove: &impl Fn(&mut Rig<D>)) {
    for broken in 0..rig.queues.len() {
        rig.activate();
        rig.run();
        let queue = &mut rig.queues[broken];
        let beyond = queue
            .avail_index()
            .wrapping_add(queue.size())
            .wrapping_add(1);
        queue.set_avail_index(beyond);
        queue.ring_bell();
        rig.run();
        if rig.faults.count() == 0 {
            // A device may look at a queue only when it has something for it.
            prove_harmless(rig, broken);
            continue;
        }
        assert_eq!(rig.faults.count(), 1, "queue {broken}");

        // Nothing is touched any more, on no queue.
        let before = snapshot(rig);
        for queue in &rig.queues {
            queue.ring_bell();
        }
        rig.run();
        assert!(
            snapshot(rig) == before,
            "a broken device touched guest memory"
        );
        assert_eq!(rig.faults.count(), 1, "a fault is reported once");
        rig.device.reset();
        rig.activate();
        prove(rig);
        assert_eq!(rig.faults.count(), 0);
        rig.device.reset();
    }
}

/// A device that is held still touches nothing, and goes on as if nothing had been.
fn still<D: VirtioDevice>(rig: &mut Rig<D>, prove: &impl Fn(&mut Rig<D>)) {
    // Inactive, it has nothing to stop.
    rig.device.quiesce().expect("an inactive device");
    rig.device.resume().expect("an inactive device");
    rig.activate();
    for _ in 0..2 {
        prove(rig);
        rig.device.quiesce().expect("an active device");
        let (before, saved) = (snapshot(rig), rig.device.save());
        for queue in &rig.queues {
            queue.ring_bell();
        }
        rig.run();
        assert!(
            snapshot(rig) == before,
            "a device held still touched memory"
        );
        assert_eq!(rig.device.save(), saved);
        rig.device.quiesce().expect("a device held still");
        rig.device.resume().expect("a device held still");
        rig.run();
        assert_eq!(rig.faults.count(), 0);
    }
    prove(rig);
    // A reset ends it in either state.
    rig.device.quiesce().expect("an active device");
    rig.device.reset();
    rig.activate();
    prove(rig);
}

/// What was saved makes another device the same, whose driver goes on with it.
fn saved_and_restored<D: VirtioDevice>(
    rig: &mut Rig<D>,
    make: &impl Fn() -> D,
    prove: &impl Fn(&mut Rig<D>),
) {
    let mut fresh = make();
    fresh
        .restore(rig.device.save().device)
        .expect("a fresh state");
    assert_eq!(fresh.save(), rig.device.save());
    for features in [rig.all_features(), rig.device.features() | F_VERSION_1] {
        rig.activate_with(features, u16::MAX).expect("activation");
        prove(rig);
        for _ in 0..2 {
            rig.device.quiesce().expect("an active device");
            let saved = rig.device.save();
            let mut twin = make();
            twin.restore(saved.device.clone()).expect("its own state");
            assert_eq!(twin.save().device, saved.device);
            rig.replace(make(), features).expect("its own state");
            rig.run();
            prove(rig);
            assert_eq!(rig.faults.count(), 0);
        }
        rig.device.reset();
    }
}

/// A queue the device did not look at: it must not have used anything of it.
fn prove_harmless<D: VirtioDevice>(rig: &mut Rig<D>, broken: usize) {
    assert_eq!(rig.queues[broken].used_index(), 0, "queue {broken}");
    rig.device.reset();
}

fn snapshot<D>(rig: &Rig<D>) -> Vec<u8> {
    let region = rig.guest.memory().iter().next().expect("a region");
    rig.guest.read(
        region.start_addr().0,
        usize::try_from(region.len()).expect("a small guest"),
    )
}
