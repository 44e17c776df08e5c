//! Guests of a few instructions on the host's KVM. They run at [`CODE`] with the MMU off.

use super::super::tests::Fixture;
use super::super::*;
use super::layout;
use crate::arch::VcpuSetup;
use crate::arch::aarch64::{Entry, Gic};
use crate::hypervisor::{IrqLine, Kicker, Vcpu, VcpuExit, VcpuSeed};
use crate::memory::GuestMemory;

mod interrupts;
mod state;

pub(in super::super) const CODE: u64 = layout::RAM + 0x10_0000;
/// Where nothing is mapped, and guests take for a device.
pub(in super::super) const DEVICE: u64 = layout::VIRTIO;

guest!(
    mmio,
    "mov x1, #0x0a000000",
    "ldr w0, [x1, #4]",
    "add w0, w0, #1",
    "str w0, [x1, #8]",
    "ldr x0, [x1]",
    "strh w0, [x1]",
    // PSCI's SYSTEM_OFF.
    "mov x0, #8",
    "movk x0, #0x8400, lsl #16",
    "hvc #0",
);

guest!(
    pub(in super::super) doorbells,
    "mov x1, #0x0a000000",
    "mov w0, #1",
    "str w0, [x1, #0x50]",
    "mov w0, #2",
    "str w0, [x1, #0x50]",
    "2: b 2b",
);

guest!(pub(in super::super) spin, "2: b 2b");

// Two registers at once, which a syndrome can't tell.
guest!(pairs, "mov x1, #0x0a000000", "ldp w2, w3, [x1]", "2: b 2b",);

// Has PSCI start another processor, which says who it is and resets the machine.
guest!(
    two_processors,
    "mov x0, #3",
    "movk x0, #0xc400, lsl #16",
    "mov x1, #1",
    "adr x2, 3f",
    "mov x3, #0x77",
    "hvc #0",
    "2: wfi",
    "b 2b",
    "3: mov x1, #0x0a000000",
    "str x0, [x1]",
    "mrs x0, mpidr_el1",
    "str x0, [x1, #8]",
    "mov x0, #9",
    "movk x0, #0x8400, lsl #16",
    "hvc #0",
);

/// Nothing: the MMU is off.
pub(in super::super) fn prepare(_: &GuestMemory) {}

pub(in super::super) fn setup(_: &CpuCaps) -> VcpuSetup {
    VcpuSetup {
        affinity: 0,
        entry: Some(Entry { pc: CODE, x0: 0 }),
    }
}

/// Where the guest writes next, and what.
fn written(vcpu: &mut KvmVcpu) -> (u64, u64) {
    match vcpu.run() {
        VcpuExit::MmioWrite { address, data } => {
            let mut value = [0; 8];
            value[..data.len()].copy_from_slice(data);
            (address - DEVICE, u64::from_le_bytes(value))
        }
        other => panic!("{other:?}"),
    }
}

/// Answers what the guest reads next.
fn answer(vcpu: &mut KvmVcpu, at: u64, bytes: &[u8]) {
    match vcpu.run() {
        VcpuExit::MmioRead { address, data } => {
            assert_eq!(address, DEVICE + at);
            data.copy_from_slice(bytes);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn device_memory_is_read_and_written_with_its_width() {
    let Some(fixture) = Fixture::new(mmio()) else {
        return;
    };
    let mut vcpu = fixture.vcpu();
    answer(&mut vcpu, 4, &0x0102_0304u32.to_le_bytes());
    assert_eq!(written(&mut vcpu), (8, 0x0102_0305));
    answer(&mut vcpu, 0, &0x1122_3344_5566_7788u64.to_le_bytes());
    match vcpu.run() {
        VcpuExit::MmioWrite {
            address: DEVICE,
            data,
        } => assert_eq!(data, [0x88, 0x77]),
        other => panic!("{other:?}"),
    }
    assert!(matches!(vcpu.run(), VcpuExit::SystemOff));
}

#[test]
fn an_access_that_cannot_be_taken_apart_is_told_with_its_address() {
    let Some(fixture) = Fixture::new(pairs()) else {
        return;
    };
    match fixture.vcpu().run() {
        VcpuExit::Fault(Fault::Emulation { details, .. }) => assert_eq!(details[0], DEVICE),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_processor_starts_another() {
    let Some(fixture) = Fixture::new(two_processors()) else {
        return;
    };
    let seeds = [0, 1].map(|index| fixture.vm.create_vcpu(index).unwrap());
    fixture.vm.complete().unwrap();
    let [first, second] = seeds;
    let kicker = first.kicker();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut vcpu = first.bind().unwrap();
            vcpu.boot(&fixture.setup()).unwrap();
            assert!(matches!(vcpu.run(), VcpuExit::Kicked));
        });
        let mut vcpu = second.bind().unwrap();
        let setup = VcpuSetup {
            affinity: layout::affinity(1),
            entry: None,
        };
        vcpu.boot(&setup).unwrap();
        assert_eq!(written(&mut vcpu), (0, 0x77));
        let (at, affinity) = written(&mut vcpu);
        assert_eq!((at, affinity & 0xff_ffff), (8, layout::affinity(1)));
        assert!(matches!(vcpu.run(), VcpuExit::SystemReset));
        kicker.kick();
    });
}
