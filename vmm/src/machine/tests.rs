//! The life of a VM: over the fake, and of small guests on the host's KVM.

// Its guests are x86_64 programs.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code)]

mod fill;
mod snapshot;

use std::arch::global_asm;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::{Barrier, mpsc};
use std::thread;
use std::time::Duration;

use vm_memory::GuestAddress;

use super::assembly::check;
use super::*;
use crate::arch::KernelError;
use crate::config::DiskConfig;
use crate::devices::virtio::balloon::BalloonConfig;
use crate::hypervisor::fake::{Fake, Step};
use crate::hypervisor::{Fault, HypervisorError};

const WAIT: Duration = Duration::from_secs(30);

/// An ELF file for the given machine with `code` as its only segment, at 1 MiB.
fn elf(machine: u16, code: &[u8]) -> File {
    const AT: u64 = 0x10_0000;
    let mut image = Vec::new();
    image.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    image.extend_from_slice(&2u16.to_le_bytes());
    image.extend_from_slice(&machine.to_le_bytes());
    image.extend_from_slice(&1u32.to_le_bytes());
    for word in [AT, 64, 0] {
        image.extend_from_slice(&word.to_le_bytes());
    }
    image.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        image.extend_from_slice(&half.to_le_bytes());
    }
    // One PT_LOAD, readable and executable.
    image.extend_from_slice(&1u32.to_le_bytes());
    image.extend_from_slice(&5u32.to_le_bytes());
    for word in [0x1000, AT, AT, code.len() as u64, code.len() as u64, 0x1000] {
        image.extend_from_slice(&word.to_le_bytes());
    }
    image.resize(0x1000, 0);
    image.extend_from_slice(code);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&image).unwrap();
    file
}

fn config(code: &[u8]) -> VmConfig {
    let mut config = VmConfig::new(elf(62, code));
    config.memory = 64 << 20;
    config
}

/// `mov dx, port; mov al, value; out dx, al` for each pair.
fn out(writes: &[(u16, u8)]) -> Vec<u8> {
    let mut code = Vec::new();
    for (port, value) in writes {
        code.extend_from_slice(&[0x66, 0xba]);
        code.extend_from_slice(&port.to_le_bytes());
        code.extend_from_slice(&[0xb0, *value, 0xee]);
    }
    code
}

/// `jmp .`
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// `ud2`, without an IDT.
const CRASH: [u8; 2] = [0x0f, 0x0b];

// Leaves 64-bit mode for real mode and jumps to f000:fff0, as Linux does as a last resort.
global_asm!(
    ".pushsection .rodata.guests",
    "vmm_guest_restart:",
    // The rest runs below 1 MiB.
    "lea rsi, [rip + vmm_guest_restart_32]",
    "mov edi, 0x8000",
    "mov ecx, 64",
    "cld",
    "rep movsb",
    // A GDT with 16-bit segments: 0x08 code, 0x10 data, and 0x18 32-bit code.
    "mov rax, 0",
    "mov [0x8100], rax",
    "movabs rax, 0x00009b000000ffff",
    "mov [0x8108], rax",
    "movabs rax, 0x000093000000ffff",
    "mov [0x8110], rax",
    "movabs rax, 0x00cf9b000000ffff",
    "mov [0x8118], rax",
    "mov word ptr [0x8120], 0x1f",
    "mov qword ptr [0x8122], 0x8100",
    "lgdt [0x8120]",
    // To compatibility mode.
    "mov esp, 0x7000",
    "push 0x18",
    "mov eax, 0x8000",
    "push rax",
    "retfq",
    "vmm_guest_restart_32:",
    ".code32",
    "mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    "mov ecx, 0xc0000080",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    ".byte 0xea",
    ".long vmm_guest_restart_16 - vmm_guest_restart_32 + 0x8000",
    ".word 8",
    ".code16",
    "vmm_guest_restart_16:",
    "mov ax, 0x10",
    "mov ds, ax",
    "mov ss, ax",
    "mov eax, cr0",
    "and al, 0xfe",
    "mov cr0, eax",
    ".byte 0xea",
    ".word 0xfff0, 0xf000",
    "vmm_guest_restart_end:",
    ".code64",
    ".popsection",
);

fn real_mode_restart() -> Vec<u8> {
    unsafe extern "C" {
        #[link_name = "vmm_guest_restart"]
        static START: u8;
        #[link_name = "vmm_guest_restart_end"]
        static END: u8;
    }
    let (start, end) = (&raw const START, &raw const END);
    // SAFETY: both symbols are of this binary's read-only data, one after the other.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }.to_vec()
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

fn run(code: &[u8]) -> Option<Exit> {
    Some(wait(&build(config(code))?.start().unwrap()))
}

#[test]
fn every_end_has_its_reason() {
    for (code, expected) in [
        (out(&[(0x600, 0x34)]), Exit::PowerOff),
        (out(&[(0x602, 1)]), Exit::Reset),
        (out(&[(0x64, 0xfe)]), Exit::Reset),
        (CRASH.to_vec(), Exit::TripleFault),
        (real_mode_restart(), Exit::Reset),
    ] {
        // Whatever comes after the end is not run.
        let code = [code, SPIN.to_vec()].concat();
        let Some(exit) = run(&code) else { return };
        assert_eq!(exit, expected);
    }
}

#[test]
fn the_log_comes_out_of_com1() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let text: Vec<_> = b"hello\n".iter().map(|byte| (0x3f8, *byte)).collect();
    let mut config = config(&[out(&text), out(&[(0x600, 0x34)])].concat());
    config.serial = Some(writer.into());
    let Some(vm) = build(config) else { return };
    assert_eq!(wait(&vm.start().unwrap()), Exit::PowerOff);
    let mut log = String::new();
    reader.read_to_string(&mut log).unwrap();
    assert_eq!(log, "hello\n");
}

#[test]
fn a_guest_that_never_exits_can_be_stopped() {
    let mut config = config(&SPIN);
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
    let Some(vm) = build(config(&SPIN)) else {
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
    let Some(vm) = build(config(&SPIN)) else {
        return;
    };
    drop(vm);
}

#[test]
fn a_vm_takes_more_devices_than_there_are_interrupt_pins() {
    let mut config = config(&out(&[(0x600, 0x34)]));
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
    assert_eq!(wait(&running), Exit::PowerOff);
}

#[test]
fn bad_kernels_are_told_before_anything_is_done() {
    let error = |kernel: File| match Vm::new(VmConfig::new(kernel)) {
        Err(Error::Kernel(error)) => error,
        other => panic!("{other:?}"),
    };
    let found = error(elf(183, &SPIN)).to_string();
    assert!(
        found.contains("aarch64") && found.contains("expected x86_64"),
        "{found}"
    );
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
        let mut config = config(&SPIN);
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
    let mut config = config(&SPIN);
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
    running
        .memory
        .discard(GuestAddress(4 * UNIT), UNIT)
        .unwrap();
    assert_eq!(hypervisor.record().renewed, [(4 * UNIT, UNIT)]);
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
        vec![
            Step::Kicked,
            Step::PioWrite {
                port: 0x600,
                size: 1,
                data: vec![0x34],
            },
        ],
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
    assert_eq!(record.mapped[&0], (0, 64 << 20));
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
    let magic = Step::MmioRead {
        address: 0xd000_0000,
        len: 4,
    };
    let reset = Step::MmioWrite {
        address: 0xd000_0070,
        data: vec![0; 4],
    };
    let scripts = vec![vec![magic, reset, Step::SystemOff]];
    let (hypervisor, running) = fake(scripts, |config| config.rng = true);
    assert_eq!(running.wait(), Exit::PowerOff);
    assert_eq!(hypervisor.record().doorbells, [(0xd000_0050, 0)]);
}

#[test]
fn ram_beyond_the_hole_is_mapped_above_4_gib() {
    let (hypervisor, running) = fake(vec![vec![Step::SystemOff]], |config| {
        config.memory = 5 << 30
    });
    running.wait();
    let record = hypervisor.record();
    assert_eq!(record.mapped[&0], (0, 3 << 30));
    assert_eq!(record.mapped[&1], (4 << 30, 2 << 30));
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
