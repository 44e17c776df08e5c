//! The life of a VM: over the fake, and of small guests on the host's KVM.

mod fill;
#[allow(dead_code, reason = "some are for other tests")]
#[path = "../../tests/guests/mod.rs"]
mod guests;
mod snapshot;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::fs::File;
use std::io::{Read, Write};
use std::sync::{Barrier, mpsc};
use std::thread;
use std::time::Duration;

use vm_memory::GuestAddress;

use super::assembly::check;
use super::*;
use crate::arch::KernelError;
use crate::arch::current::layout;
use crate::config::DiskConfig;
use crate::devices::virtio::balloon::BalloonConfig;
use crate::devices::virtio::console::ConsoleConfig;
use crate::hypervisor::fake::{Fake, Step};
use crate::hypervisor::{Fault, HypervisorError};
use guests::{SAY_HI, SPIN};

const WAIT: Duration = Duration::from_secs(30);

fn config(code: &[u8]) -> VmConfig {
    let mut kernel = tempfile::tempfile().unwrap();
    kernel.write_all(&guests::image(code)).unwrap();
    let mut config = VmConfig::new(kernel);
    config.memory = 64 << 20;
    config
}

/// Where RAM starts.
fn ram() -> u64 {
    layout::ram_ranges(64 << 20)[0].0.0
}

/// The VM, or none and a word why on a host without KVM.
fn build(config: VmConfig) -> Option<Vm> {
    match Vm::new(config) {
        Ok(vm) => Some(vm),
        Err(Error::Hypervisor(error @ HypervisorError::Absent { .. })) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn wait(vm: &RunningVm) -> Exit {
    let (vm, (sender, exit)) = (vm.clone(), mpsc::channel());
    thread::spawn(move || sender.send(vm.wait()));
    exit.recv_timeout(WAIT).expect("the VM did not end")
}

/// How a guest that says "hi" ends.
const AFTER_HI: Exit = if guests::CRASHES {
    Exit::TripleFault
} else {
    Exit::PowerOff
};

#[test]
fn the_log_comes_out_of_the_serial_port() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut config = config(SAY_HI);
    config.serial = Some(writer.into());
    let Some(vm) = build(config) else { return };
    assert_eq!(wait(&vm.start().unwrap()), AFTER_HI);
    let mut log = String::new();
    reader.read_to_string(&mut log).unwrap();
    assert_eq!(log, "hi");
}

#[test]
fn a_guest_that_never_exits_can_be_stopped() {
    let mut config = config(SPIN);
    // The others wait to be started by the first.
    config.vcpus = 4;
    let Some(vm) = build(config) else { return };
    let running = vm.start().unwrap();
    running.stop();
    assert_eq!(wait(&running), Exit::Stopped);
    // Its end does not change any more.
    running.stop();
    assert_eq!(wait(&running), Exit::Stopped);
}

#[test]
fn dropping_a_running_vm_stops_it() {
    let Some(vm) = build(config(SPIN)) else {
        return;
    };
    let running = vm.start().unwrap();
    let (sender, dropped) = mpsc::channel();
    thread::spawn(move || {
        drop(running);
        sender.send(()).unwrap();
    });
    dropped.recv_timeout(WAIT).expect("the VM did not stop");
}

#[test]
fn a_vm_that_is_never_started_leaves_nothing_behind() {
    let Some(vm) = build(config(SPIN)) else {
        return;
    };
    drop(vm);
}

#[test]
fn a_vm_takes_more_devices_than_there_are_interrupt_pins() {
    let mut config = config(SAY_HI);
    config.rng = true;
    config.balloon = Some(BalloonConfig::default());
    for index in 0..40 {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let serial = format!("disk{index}");
        config.disks.push(DiskConfig {
            files: vec![file],
            read_only: false,
            serial,
        });
    }
    let Some(vm) = build(config) else { return };
    let running = vm.start().unwrap();
    assert!(running.balloon().is_some());
    assert!(running.console().is_none());
    assert_eq!(wait(&running), AFTER_HI);
}

#[test]
fn bad_kernels_are_told_before_anything_is_done() {
    let error = |kernel: File| match Vm::new(VmConfig::new(kernel)) {
        Err(Error::Kernel(error)) => error,
        other => panic!("{other:?}"),
    };
    assert!(matches!(
        error(tempfile::tempfile().unwrap()),
        KernelError::Format { .. }
    ));

    let missing = VmConfig::open_kernel(std::path::Path::new("/nonexistent/vmlinux"));
    let missing = missing.unwrap_err();
    assert!(matches!(missing, Error::KernelMissing { .. }));
    assert_eq!(
        missing.to_string(),
        "Kernel image /nonexistent/vmlinux does not exist"
    );
    let directory = VmConfig::open_kernel(std::path::Path::new("/proc/1/mem/x")).unwrap_err();
    assert!(
        matches!(directory, Error::KernelOpen { .. }),
        "{directory:?}"
    );
}

#[test]
fn sizes_are_checked() {
    let with = |vcpus, memory| {
        let mut config = config(SPIN);
        (config.vcpus, config.memory) = (vcpus, memory);
        check(&config).map(|_| ())
    };
    for vcpus in [0, 255, u32::MAX] {
        assert!(matches!(
            with(vcpus, 64 << 20),
            Err(Error::Vcpus { max: 254, .. })
        ));
    }
    for memory in [0, 4096, (64 << 20) + 1] {
        assert!(
            matches!(with(1, memory), Err(Error::MemorySize { .. })),
            "{memory}"
        );
    }
    assert!(with(254, 64 << 20).is_ok());
}

/// Builds a VM of the fake and runs it.
fn fake(scripts: Vec<Vec<Step>>, change: impl FnOnce(&mut VmConfig)) -> (Fake, Running) {
    let vcpus = scripts.len() as u32;
    run_on(Fake::new(scripts), |config| {
        config.vcpus = vcpus;
        change(config);
    })
}

fn run_on(hypervisor: Fake, change: impl FnOnce(&mut VmConfig)) -> (Fake, Running) {
    let mut config = config(SPIN);
    change(&mut config);
    let kernel = check(&config).unwrap();
    let running = Assembly::new(&hypervisor, config, &kernel)
        .unwrap()
        .start()
        .unwrap();
    (hypervisor, running)
}

#[test]
fn memory_that_the_hypervisor_holds_goes_back_through_it() {
    const UNIT: u64 = 2 << 20;
    let scripts = vec![vec![Step::UntilKicked]];
    let (hypervisor, running) = run_on(Fake::new(scripts).holding(UNIT), |_| ());
    assert_eq!(running.memory.discard_unit(), UNIT);
    let start = ram() + 4 * UNIT;
    running.memory.discard(GuestAddress(start), UNIT).unwrap();
    assert_eq!(hypervisor.record().renewed, [(start, UNIT)]);
    running.stop();
    assert_eq!(running.wait(), Exit::Stopped);
}

#[test]
fn the_end_of_one_vcpu_brings_out_the_others() {
    let scripts = vec![
        vec![
            Step::UntilKicked,
            Step::Fault(Fault::EntryFailed { reason: 1 }),
        ],
        vec![Step::Kicked, Step::SystemOff],
        vec![
            Step::UntilKicked,
            Step::Fault(Fault::EntryFailed { reason: 1 }),
        ],
    ];
    let (hypervisor, running) = fake(scripts, |_| ());
    assert_eq!(running.wait(), Exit::PowerOff);
    let record = hypervisor.record();
    assert_eq!(record.booted.len(), 3);
    assert_eq!(
        record
            .booted
            .iter()
            .filter(|setup| setup.entry.is_some())
            .count(),
        1
    );
    assert_eq!(record.mapped[&0], (ram(), 64 << 20));
}

#[test]
fn a_fault_of_a_vcpu_ends_the_vm_as_that() {
    let fault = Fault::Emulation {
        suberror: 1,
        details: Vec::new(),
    };
    let (_, running) = fake(vec![vec![Step::Fault(fault.clone())]], |_| ());
    assert_eq!(running.wait(), Exit::Fault(fault.to_string()));
}

#[test]
fn a_guest_without_ioeventfds_reaches_its_devices_by_exits() {
    let device = layout::virtio_address(0);
    let magic = Step::MmioRead {
        address: device,
        len: 4,
    };
    let reset = Step::MmioWrite {
        address: device + 0x70,
        data: vec![0; 4],
    };
    let scripts = vec![vec![magic, reset, Step::SystemOff]];
    let (hypervisor, running) = fake(scripts, |config| config.console = Some(console()));
    assert_eq!(running.wait(), Exit::PowerOff);
    assert_eq!(hypervisor.record().doorbells, [(device + 0x50, 4)]);
}

#[test]
fn few_doorbells_are_bound_of_a_console_with_many_ports_and_none_of_what_rarely_rings() {
    let ringing = Fake::new(vec![vec![Step::SystemOff]]).ringing();
    let (hypervisor, running) = run_on(ringing, |config| {
        config.rng = true;
        config.balloon = Some(BalloonConfig::default());
        config.console = Some(console());
    });
    assert_eq!(running.wait(), Exit::PowerOff);
    let address = layout::virtio_address(0) + 0x50;
    let expected: Vec<_> = (4..10).map(|queue| (address, queue)).collect();
    assert_eq!(hypervisor.record().doorbells, expected);
}

fn console() -> ConsoleConfig {
    ConsoleConfig {
        ports: Vec::new(),
        max_ports: 17,
        events: Box::new(|_| ()),
    }
}

const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn a_pause_holds_every_vcpu_until_it_is_over() {
    let (hypervisor, running) = fake(vec![vec![Step::Forever]; 3], |_| ());
    running.pause(LIMIT).unwrap();
    // It is one state, however often it is asked for.
    running.pause(LIMIT).unwrap();
    assert_eq!(hypervisor.record().resumed, 0);
    running.resume();
    while hypervisor.record().resumed < 3 {
        thread::yield_now();
    }
    running.pause(LIMIT).unwrap();
    // A paused VM can be ended.
    running.stop();
    assert_eq!(running.wait(), Exit::Stopped);
    assert!(matches!(running.pause(LIMIT), Err(PauseError::Ended)));
}

#[test]
fn a_pause_outlasts_the_end_of_another() {
    let barrier = Arc::new(Barrier::new(2));
    let stuck = vec![Step::Meet(Arc::clone(&barrier)), Step::Forever];
    let (_, running) = fake(vec![stuck], |_| ());
    thread::scope(|scope| {
        let pausing = scope.spawn(|| running.pause(LIMIT));
        while !running.pauses() {
            thread::yield_now();
        }
        running.resume();
        barrier.wait();
        pausing.join().unwrap().unwrap();
    });
    assert!(running.pauses());
    running.stop();
}

#[test]
fn a_pause_that_fails_leaves_the_vm_running() {
    let barrier = Arc::new(Barrier::new(2));
    let stuck = vec![
        Step::Meet(Arc::clone(&barrier)),
        Step::UntilKicked,
        Step::SystemOff,
    ];
    let (hypervisor, running) = fake(vec![stuck, vec![Step::Forever]], |_| ());
    let error = running.pause(Duration::from_millis(30)).unwrap_err();
    assert!(
        matches!(error, PauseError::Busy { inside: 1 | 2, .. }),
        "{error}"
    );
    barrier.wait();
    // The vCPU that was stuck meets no pause; the kicks of the failed one take it on.
    assert_eq!(running.wait(), Exit::PowerOff);
    assert!(hypervisor.record().resumed <= 1);
}
