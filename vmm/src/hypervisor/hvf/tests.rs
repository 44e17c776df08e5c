//! The backend over the double of the framework: every kind of exit, and the rules it keeps.

#![cfg(not(target_os = "macos"))]

mod memory;
mod restore;

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use hvf_double::applevisor_sys::{PAGE_SIZE, hv_reg_t, hv_sys_reg_t};
use hvf_double::{Session, Step};
use proptest::prelude::*;

use super::exit::{Access, Trap};
use super::*;
use crate::arch::aarch64::{Entry, VcpuSetup};
use crate::devices::bus::BusDevice;
use crate::exit::Exit;
use crate::hypervisor::{Fault, Kicker, Vcpu as _, VcpuExit, VcpuSeed};
use crate::vcpu::{Buses, Gate};

const ENTRY: Entry = Entry {
    pc: 0x4000_0000,
    x0: 0x4800_0000,
};
const DEVICE: u64 = 0x0a00_0000;
const PC: usize = hv_reg_t::PC as usize;

/// The syndrome of an exception of this class.
fn class(class: u64) -> u64 {
    class << 26 | 1 << 25
}

/// A load or store of `1 << size` bytes.
fn data(size: u64, register: u64, write: bool, signed: bool, wide: bool) -> Step {
    let syndrome = class(0x24)
        | 1 << 24
        | size << 22
        | u64::from(signed) << 21
        | register << 16
        | u64::from(wide) << 15
        | u64::from(write) << 6;
    Step::Exception {
        syndrome,
        address: DEVICE + 8,
    }
}

fn exception(syndrome: u64) -> Step {
    Step::Exception {
        syndrome,
        address: DEVICE,
    }
}

fn set(register: u32, value: u64) -> Step {
    Step::Set { register, value }
}

/// `hvc #0` with this in its registers.
fn hypercall(function: u64, arguments: [u64; 3]) -> Vec<Step> {
    let [first, second, third] = arguments;
    vec![
        set(0, function),
        set(1, first),
        set(2, second),
        set(3, third),
        exception(class(0x16)),
    ]
}

fn vm() -> HvfVm {
    Hvf::open().unwrap().create_vm().unwrap()
}

fn setup(index: u32) -> VcpuSetup {
    VcpuSetup {
        affinity: layout::affinity(index),
        entry: (index == 0).then_some(ENTRY),
    }
}

/// The first vCPU, booted on this thread.
fn first(vm: &HvfVm) -> HvfVcpu {
    let mut vcpu = vm.create_vcpu(0).unwrap().bind().unwrap();
    vcpu.boot(&setup(0)).unwrap();
    vcpu
}

#[test]
fn a_process_has_one_vm_and_leaves_nothing_of_it() {
    let session = Session::begin();
    let hypervisor = Hvf::open().unwrap();
    assert_eq!(hypervisor.caps().max_vcpus, 8);
    let vm = hypervisor.create_vm().unwrap();
    assert_eq!(
        session.gic(),
        Some((layout::GIC_DISTRIBUTOR, layout::GIC_REDISTRIBUTORS))
    );
    assert!(matches!(
        hypervisor.create_vm(),
        Err(HypervisorError::OneVm)
    ));
    let line = vm.irq_line(3).unwrap();
    let seed = vm.create_vcpu(0).unwrap();
    let kicker = seed.kicker();
    drop(seed.bind().unwrap());
    drop(vm);
    assert!(!session.has_vm());
    assert_eq!(session.left(), (0, 0));
    // Whoever is left finds it gone.
    line.set(true);
    kicker.kick();
    assert!(session.interrupts().is_empty());
    drop(hypervisor.create_vm().unwrap());

    session.deny();
    let error = hypervisor.create_vm().unwrap_err();
    assert!(
        error.to_string().contains("com.apple.security.hypervisor"),
        "{error}"
    );
}

#[test]
fn loads_of_each_size_fill_their_register() {
    let session = Session::begin();
    let vm = vm();
    let mut vcpu = first(&vm);
    let mut expected = Vec::new();
    for (size, signed, wide, value) in [
        (0, false, false, 0x88),
        (1, false, false, 0x8877),
        (2, false, false, 0x8877_6655),
        (3, false, true, 0x8877_6655_4433_2211),
        (0, true, false, 0xffff_ff88),
        (0, true, true, 0xffff_ffff_ffff_ff88),
        (1, true, false, 0xffff_8877),
        (1, true, true, 0xffff_ffff_ffff_8877),
        (2, true, true, 0xffff_ffff_8877_6655),
    ] {
        session.script(0, [data(size, 5, false, signed, wide)]);
        match vcpu.run() {
            VcpuExit::MmioRead { address, data } => {
                assert_eq!((address, data.len()), (DEVICE + 8, 1 << size));
                let answer = 0x8877_6655_4433_2211u64.to_be_bytes();
                let (mut answer, len) = (answer, data.len());
                answer[..len].reverse();
                data.copy_from_slice(&answer[..len]);
            }
            other => panic!("{other:?}"),
        }
        expected.push(value);
    }
    // Into no register at all.
    session.script(0, [data(2, 31, false, false, false)]);
    assert!(matches!(vcpu.run(), VcpuExit::MmioRead { .. }));
    session.script(0, [Step::Cancelled]);
    assert!(matches!(vcpu.run(), VcpuExit::Kicked));
    let entries = session.entries(0);
    let found: Vec<_> = entries[1..].iter().map(|entry| entry[5]).collect();
    expected.push(*expected.last().unwrap());
    assert_eq!(found, expected);
    let counters: Vec<_> = entries.iter().map(|entry| entry[PC]).collect();
    let steps: Vec<_> = (0..11).map(|step| ENTRY.pc + 4 * step).collect();
    assert_eq!(counters, steps);
}

#[test]
fn stores_of_each_size_carry_their_register() {
    let session = Session::begin();
    let vm = vm();
    let mut vcpu = first(&vm);
    for size in 0..4 {
        session.script(
            0,
            [
                set(30, 0x8877_6655_4433_2211),
                data(size, 30, true, false, true),
                data(size, 31, true, false, true),
            ],
        );
        let all = [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88];
        for bytes in [all, [0; 8]] {
            match vcpu.run() {
                VcpuExit::MmioWrite { address, data } => {
                    assert_eq!((address, data), (DEVICE + 8, &bytes[..1 << size]));
                }
                other => panic!("{other:?}"),
            }
        }
    }
    session.script(0, [Step::Cancelled]);
    assert!(matches!(vcpu.run(), VcpuExit::Kicked));
    let entries = session.entries(0);
    assert_eq!(entries.last().unwrap()[PC], ENTRY.pc + 4 * 8);
}

#[test]
fn power_calls_are_answered_and_end_the_vm() {
    let session = Session::begin();
    let vm = vm();
    let mut vcpu = first(&vm);
    for (function, answer) in [(0x8400_0000, 0x1_0000), (0x8400_000f, u64::MAX)] {
        session.script(0, hypercall(function, [0; 3]));
        session.script(0, [Step::Cancelled]);
        assert!(matches!(vcpu.run(), VcpuExit::Kicked));
        session.script(0, [Step::Cancelled]);
        assert!(matches!(vcpu.run(), VcpuExit::Kicked));
        let entry = session.entries(0).pop().unwrap();
        // HVC leaves the counter past itself.
        assert_eq!((entry[0], entry[PC]), (answer, ENTRY.pc));
    }
    session.script(0, hypercall(0x8400_0008, [0; 3]));
    assert!(matches!(vcpu.run(), VcpuExit::SystemOff));
    session.script(0, hypercall(0x8400_0009, [0; 3]));
    assert!(matches!(vcpu.run(), VcpuExit::SystemReset));
    // SMC is no way to it.
    session.script(
        0,
        [set(0, 0x8400_0000), exception(class(0x17)), Step::Cancelled],
    );
    assert!(matches!(vcpu.run(), VcpuExit::Kicked));
    let entry = session.entries(0).pop().unwrap();
    assert_eq!((entry[0], entry[PC]), (u64::MAX, ENTRY.pc + 4));
}

#[test]
fn system_registers_nobody_knows_read_zero_and_take_nothing() {
    let session = Session::begin();
    let vm = vm();
    let mut vcpu = first(&vm);
    // MRS X7, S3_0_C15_C2_0, then MSR.
    let access = class(0x18) | 3 << 20 | 15 << 10 | 7 << 5 | 2 << 1;
    session.script(
        0,
        [
            set(7, 9),
            exception(access | 1),
            exception(access),
            Step::Cancelled,
        ],
    );
    assert!(matches!(vcpu.run(), VcpuExit::Kicked));
    let entry = session.entries(0).pop().unwrap();
    assert_eq!((entry[7], entry[PC]), (0, ENTRY.pc + 8));
    match Trap::decode(access | 1) {
        Trap::SystemRegister(register) => {
            assert_eq!(register.name(), "S3_0_C15_C2_0");
            assert!(!super::registers::is_news(register.encoding), "told before");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_access_that_says_nothing_is_counted_and_ends_the_vm() {
    let session = Session::begin();
    let vm = vm();
    let mut vcpu = first(&vm);
    let syndrome = class(0x24) | 6;
    session.script(0, [exception(syndrome)]);
    match vcpu.run() {
        VcpuExit::Fault(Fault::Emulation { details, .. }) => {
            assert_eq!(details, [syndrome, DEVICE, ENTRY.pc]);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(vm.opaque_accesses(), 1);
    // It was not skipped.
    session.script(0, [Step::Cancelled]);
    assert!(matches!(vcpu.run(), VcpuExit::Kicked));
    assert_eq!(session.entries(0).pop().unwrap()[PC], ENTRY.pc);
}

#[test]
fn other_exits_go_on_or_are_faults() {
    let session = Session::begin();
    let vm = vm();
    let mut vcpu = first(&vm);
    // A timer, a wait the kernel did not keep, cache maintenance of device memory.
    let maintenance = class(0x24) | 1 << 8;
    session.script(
        0,
        [
            Step::Timer,
            exception(class(1)),
            exception(maintenance),
            Step::Cancelled,
        ],
    );
    assert!(matches!(vcpu.run(), VcpuExit::Kicked));
    assert_eq!(session.entries(0).pop().unwrap()[PC], ENTRY.pc + 8);
    assert!(!vcpu.save().unwrap().timer_is_masked());

    session.script(0, [exception(class(0x20))]);
    let fetch = vcpu.run();
    assert!(matches!(
        fetch,
        VcpuExit::Fault(Fault::Memory {
            address: DEVICE,
            ..
        })
    ));
    session.script(0, [exception(class(0x3c))]);
    let other = vcpu.run();
    assert!(matches!(other, VcpuExit::Fault(Fault::Unexpected { .. })));
    session.script(0, [Step::Unknown]);
    let unknown = vcpu.run();
    assert!(matches!(unknown, VcpuExit::Fault(Fault::Unexpected { .. })));
    session.script(0, [Step::Fails(0xfae9_4004_u32.cast_signed())]);
    match vcpu.run() {
        VcpuExit::Fault(Fault::Run { error }) => assert!(error.contains("illegal"), "{error}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_vcpu_has_its_affinity_and_all_have_one_clock() {
    let session = Session::begin();
    let vm = vm();
    let seeds: Vec<_> = [0, 1, 17]
        .map(|index| vm.create_vcpu(index).unwrap())
        .into();
    let (done, bound) = mpsc::channel();
    thread::scope(|scope| {
        let mut holds = Vec::new();
        for seed in seeds {
            let (hold, held) = mpsc::channel::<()>();
            holds.push(hold);
            let done = done.clone();
            scope.spawn(move || {
                let vcpu = seed.bind().unwrap();
                done.send(()).unwrap();
                let _ = held.recv();
                drop(vcpu);
            });
            bound.recv().unwrap();
        }
        let mpidr = hv_sys_reg_t::MPIDR_EL1 as u16;
        for affinity in [0, 1, 0x101] {
            let found = session.system_register(affinity, mpidr);
            assert_eq!(found, Some(1 << 31 | affinity));
            // What macOS 15.0 can't save is not offered.
            let features = hv_sys_reg_t::ID_AA64PFR1_EL1 as u16;
            assert_eq!(session.system_register(affinity, features), Some(0));
        }
        let offsets = session.timer_offsets();
        assert_eq!(offsets, [offsets[0]; 3]);
        assert_ne!(offsets[0], 0);
    });
    drop(vm);
    assert_eq!(session.left(), (0, 0));
}

#[test]
fn a_kick_brings_a_vcpu_out_wherever_it_is() {
    let session = Session::begin();
    let vm = vm();
    let seed = vm.create_vcpu(0).unwrap();
    let kicker = seed.kicker();
    // Before it exists.
    kicker.kick();
    let (ask, asked) = mpsc::channel::<()>();
    let (answer, answers) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut vcpu = seed.bind().unwrap();
            vcpu.boot(&setup(0)).unwrap();
            while asked.recv().is_ok() {
                let kicked = matches!(vcpu.run(), VcpuExit::Kicked);
                answer.send(kicked).unwrap();
            }
        });
        ask.send(()).unwrap();
        assert!(answers.recv().unwrap());
        // While it is in the guest.
        ask.send(()).unwrap();
        session.wait_until_inside(0);
        kicker.kick();
        assert!(answers.recv().unwrap());
        // While it is switched off.
        session.script(0, hypercall(0x8400_0002, [0; 3]));
        ask.send(()).unwrap();
        kicker.kick();
        assert!(answers.recv().unwrap());
        drop(ask);
    });
}

/// Remembers stores; loads give 7.
#[derive(Default)]
struct Probe(Mutex<Vec<Vec<u8>>>);

impl BusDevice for Probe {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(7);
    }

    fn write(&self, _: u64, data: &[u8]) -> ControlFlow<Exit> {
        self.0.lock().unwrap().push(data.to_vec());
        ControlFlow::Continue(())
    }
}

struct Open;

impl Gate for Open {
    fn is_closed(&self) -> bool {
        false
    }

    fn rest(&self, _: &mut dyn FnMut() -> Result<Vec<u8>, HypervisorError>) -> bool {
        false
    }
}

#[test]
fn one_processor_starts_another_which_ends_the_vm() {
    let session = Session::begin();
    let vm = vm();
    let probe = Arc::new(Probe::default());
    let mut buses = Buses::default();
    buses.mmio.insert(DEVICE, 0x1000, probe.clone()).unwrap();
    // The first loads, stores what it loaded, switches the second on and itself off.
    session.script(
        0,
        [
            data(2, 4, false, false, false),
            data(2, 4, true, false, false),
        ],
    );
    session.script(0, hypercall(0xc400_0003, [0x1, 0x4100_0000, 5]));
    session.script(0, hypercall(0x8400_0002, [0; 3]));
    session.script(1, hypercall(0x8400_0008, [0; 3]));
    let seeds: Vec<_> = [0, 1].map(|index| vm.create_vcpu(index).unwrap()).into();
    let kickers: Vec<_> = seeds.iter().map(HvfSeed::kicker).collect();
    let buses = &buses;
    let exits: Vec<_> = thread::scope(|scope| {
        let (ready, count) = mpsc::channel();
        let mut starts = Vec::new();
        let mut threads = Vec::new();
        for (index, seed) in (0..).zip(seeds) {
            let (start, go) = mpsc::channel::<()>();
            starts.push(start);
            let ready = ready.clone();
            threads.push(scope.spawn(move || {
                let mut vcpu = seed.bind().unwrap();
                vcpu.boot(&setup(index)).unwrap();
                ready.send(()).unwrap();
                go.recv().unwrap();
                match index {
                    1 => crate::vcpu::run(&mut vcpu, buses, &Open),
                    // What `machine::run` does once another vCPU has ended the VM.
                    _ => loop {
                        match vcpu.run() {
                            VcpuExit::MmioRead { address, data } => buses.mmio.read(address, data),
                            VcpuExit::MmioWrite { address, data } => {
                                let _ = buses.mmio.write(address, data);
                            }
                            VcpuExit::Kicked => break Exit::Stopped,
                            other => panic!("{other:?}"),
                        }
                    },
                }
            }));
            count.recv().unwrap();
        }
        for start in starts {
            start.send(()).unwrap();
        }
        let second = threads.pop().unwrap().join().unwrap();
        kickers[0].kick();
        let first = threads.pop().unwrap().join().unwrap();
        vec![first, second]
    });
    assert_eq!(exits, [Exit::Stopped, Exit::PowerOff]);
    assert_eq!(*probe.0.lock().unwrap(), [[7; 4]]);
    let started = &session.entries(1)[0];
    assert_eq!((started[0], started[PC]), (5, 0x4100_0000));
    assert_eq!(started[hv_reg_t::CPSR as usize], 0x3c5);
}

#[test]
fn lines_are_levels_of_shared_interrupts() {
    let session = Session::begin();
    let vm = vm();
    let line = vm.irq_line(layout::virtio_pin(2)).unwrap();
    let number = 32 + 16 + 2;
    line.raise();
    assert!(line.lower(), "what is left is to be raised again");
    line.pulse();
    assert_eq!(
        session.interrupts(),
        [
            (number, true),
            (number, false),
            (number, true),
            (number, false)
        ]
    );
    let bell = Doorbell::new().unwrap();
    let bound = vm.bind_doorbell(DEVICE, 0, &bell).unwrap();
    assert_eq!(bound, Binding::Exits);
}

proptest! {
    #[test]
    fn any_syndrome_means_something(syndrome: u64, bytes: [u8; 8]) {
        match Trap::decode(syndrome) {
            Trap::Data(access) => {
                prop_assert!(matches!(access.size, 1 | 2 | 4 | 8) && access.register < 32);
                let value = access.extend(bytes);
                let low = u64::from_le_bytes(bytes) & (u64::MAX >> (64 - 8 * access.size.min(4)));
                prop_assert_eq!(value & (u64::MAX >> (64 - 8 * access.size.min(4))), low);
            }
            Trap::SystemRegister(register) => {
                prop_assert!(register.register < 32);
                prop_assert!(register.name().starts_with('S'));
            }
            _ => {}
        }
    }

    #[test]
    fn a_load_leaves_what_the_architecture_says(raw: u64, size in 0u32..4, signed: bool, wide: bool) {
        let access = Access { write: false, size: 1 << size, register: 0, wide, signed };
        let value = match (size, signed) {
            (0, false) => u64::from(raw as u8),
            (1, false) => u64::from(raw as u16),
            (2, false) => u64::from(raw as u32),
            (0, true) => i64::from(raw as i8).cast_unsigned(),
            (1, true) => i64::from(raw as i16).cast_unsigned(),
            (2, true) => i64::from(raw as i32).cast_unsigned(),
            _ => raw,
        };
        let expected = if wide { value } else { u64::from(value as u32) };
        prop_assert_eq!(access.extend(raw.to_le_bytes()), expected);
    }
}
