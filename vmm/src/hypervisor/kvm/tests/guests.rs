//! Guests of every architecture: kicks and doorbells.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::super::arch::tests::{DEVICE, doorbells, spin};
use super::*;
use crate::hypervisor::{Kicker, Vcpu, VcpuExit, VcpuSeed};

#[test]
fn a_bound_doorbell_rings_without_an_exit_and_only_for_its_value() {
    let Some(fixture) = Fixture::new(doorbells()) else {
        return;
    };
    let (bound, other) = (Doorbell::new().unwrap(), Doorbell::new().unwrap());
    let mut vcpu = fixture.vcpu();
    for (value, bell) in [(1, &bound), (3, &other)] {
        let binding = fixture
            .vm
            .bind_doorbell(DEVICE + 0x50, value, bell)
            .unwrap();
        assert_eq!(binding, Binding::Bound);
    }
    match vcpu.run() {
        VcpuExit::MmioWrite {
            address,
            data: [2, 0, 0, 0],
        } => assert_eq!(address, DEVICE + 0x50),
        other => panic!("{other:?}"),
    }
    assert!(bound.clear().unwrap());
    assert!(!other.clear().unwrap());
}

#[test]
fn a_kick_ends_a_guest_that_never_exits() {
    let Some(fixture) = Fixture::new(spin()) else {
        return;
    };
    let seed = fixture.seed();
    let (kicker, setup) = (seed.kicker(), fixture.setup());
    let out = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut vcpu = seed.bind().unwrap();
            vcpu.boot(&setup).unwrap();
            assert!(matches!(vcpu.run(), VcpuExit::Kicked));
            out.store(true, Ordering::SeqCst);
        });
        // Before, during and after the run.
        let deadline = Instant::now() + Duration::from_secs(20);
        while !out.load(Ordering::SeqCst) {
            kicker.kick();
            assert!(Instant::now() < deadline, "the vCPU did not come out");
            thread::yield_now();
        }
    });
    // The vCPU is gone: nothing to kick, nothing to fear.
    kicker.kick();
}

#[test]
fn a_kick_before_the_run_is_not_lost_and_counts_once() {
    let Some(fixture) = Fixture::new(doorbells()) else {
        return;
    };
    let seed = fixture.seed();
    let kicker = seed.kicker();
    kicker.kick();
    let mut vcpu = seed.bind().unwrap();
    vcpu.boot(&fixture.setup()).unwrap();
    assert!(matches!(vcpu.run(), VcpuExit::Kicked));
    assert!(matches!(vcpu.run(), VcpuExit::MmioWrite { .. }));
}

#[test]
fn a_seed_that_is_never_bound_disarms_its_kicker() {
    let Some(fixture) = Fixture::new(spin()) else {
        return;
    };
    let kicker = fixture.seed().kicker();
    kicker.kick();
}
