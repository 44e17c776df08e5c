//! A guest goes on in another VM as if nothing had happened.

use super::interrupts::{begun, fixture as interruptible};
use super::*;
use crate::hypervisor::kvm::tests::travelled;

// Fills a general, a vector and a system register, waits in the middle of an instruction (a read
// that has not been answered), then says what it finds.
guest!(
    remembers,
    "mov x11, #0x0a000000",
    "mov x20, #0x1000",
    "mov x0, #0x300000",
    "msr cpacr_el1, x0",
    "isb",
    "mov x0, #0x600d",
    "fmov d3, x0",
    "mov x0, #0x20",
    "msr contextidr_el1, x0",
    "mrs x22, cntvct_el0",
    "ldr w0, [x11]",
    "add x20, x20, x0",
    "mrs x0, contextidr_el1",
    "add x20, x20, x0",
    "str x20, [x11]",
    "fmov x0, d3",
    "str x0, [x11]",
    // How far its counter has come.
    "mrs x0, cntvct_el0",
    "sub x0, x0, x22",
    "str x0, [x11]",
    "2: b 2b",
);

/// A vCPU's, by number.
type Registers = Vec<(u64, Vec<u8>)>;

#[test]
fn a_guest_goes_on_from_the_middle_of_an_instruction() {
    let Some(fixture) = Fixture::new(remembers()) else {
        return;
    };
    let mut vcpu = fixture.vcpu();
    answer(&mut vcpu, 0, &[3, 0, 0, 0]);
    // The answer has not reached the guest yet: saving gives it.
    let state = travelled(&vcpu.save().unwrap());
    let vm = travelled(&fixture.vm.save().unwrap());
    // What passes until it goes on is no time of the guest's.
    std::thread::sleep(std::time::Duration::from_secs(2));
    for _ in 0..2 {
        let (_other, mut copy) = fixture.restored(&vm, &state);
        assert_eq!(written(&mut copy), (0, 0x1000 + 3 + 0x20));
        assert_eq!(written(&mut copy), (0, 0x600d));
        let (_, ticks) = written(&mut copy);
        assert!(ticks > 0, "the counter stands still");
        assert!(ticks < 2 * frequency(), "{ticks} ticks");
    }
    // The one that was saved goes on as well.
    assert_eq!(written(&mut vcpu), (0, 0x1000 + 3 + 0x20));
}

/// Ticks of the counter in a second.
fn frequency() -> u64 {
    let frequency;
    // SAFETY: reads a register that Linux lets everybody read.
    unsafe { std::arch::asm!("mrs {}, cntfrq_el0", out(reg) frequency) };
    frequency
}

#[test]
fn interrupt_controllers_keep_what_they_were_told() {
    let Some(fixture) = interruptible() else {
        return;
    };
    let mut vcpu = fixture.vcpu();
    let level = fixture.vm.irq_line(6).unwrap();
    begun(&mut vcpu, 0);
    level.set(true);
    assert_eq!(written(&mut vcpu), (8, 32 + 6));
    // It is active, in its handler, and its line is high.
    let (state, vm) = (vcpu.save().unwrap(), fixture.vm.save().unwrap());
    let (state, vm) = (travelled(&state), travelled(&vm));

    let (other, mut copy) = fixture.restored(&vm, &state);
    assert_eq!(other.vm.save().unwrap(), vm);
    let [edge, level] = [5, 6].map(|pin| other.vm.irq_line(pin).unwrap());
    assert_eq!(written(&mut copy), (8, 32 + 6));
    level.set(false);
    for _ in 0..2 {
        edge.pulse();
        assert_eq!(written(&mut copy), (8, 32 + 5));
    }
}

#[test]
fn a_timer_goes_off_where_the_guest_goes_on() {
    let Some(fixture) = interruptible() else {
        return;
    };
    let mut vcpu = fixture.vcpu();
    begun(&mut vcpu, frequency());
    let (state, vm) = (vcpu.save().unwrap(), fixture.vm.save().unwrap());
    let (_other, mut copy) = fixture.restored(&vm, &state);
    assert_eq!(written(&mut copy), (8, 27));
}

#[test]
fn a_state_that_no_processor_has_is_refused() {
    let Some(fixture) = Fixture::new(spin()) else {
        return;
    };
    let mut vcpu = fixture.vcpu();
    let good = serde_json::to_value(vcpu.save().unwrap()).unwrap();
    let refused = |change: &dyn Fn(&mut Registers)| {
        let mut state = good.clone();
        let mut registers: Registers = serde_json::from_value(state["registers"].take()).unwrap();
        change(&mut registers);
        state["registers"] = serde_json::to_value(registers).unwrap();
        let state: VcpuState = serde_json::from_value(state).unwrap();
        let mut fresh = Fixture::new(spin()).unwrap().vcpu();
        fresh.restore(&state).unwrap_err()
    };
    // ID_AA64ISAR0_EL1, MPIDR_EL1, and one that there is not.
    let [features, affinity, none] = [(0, 6, 0), (0, 0, 5), (15, 15, 7)]
        .map(|(crn, crm, op2)| 0x6030_0000_0013_0000 | 3 << 14 | crn << 7 | crm << 3 | op2);
    for id in [features, affinity] {
        let error = refused(&|registers| {
            let (_, value) = registers.iter_mut().find(|(of, _)| *of == id).unwrap();
            value[0] ^= 0xff;
        });
        let HypervisorError::Processor { found, .. } = &error else {
            panic!("{id:#x}: {error}");
        };
        assert!(found.contains("S3_0_C0_C"), "{error}");
    }
    let error = refused(&|registers| registers.push((none, vec![0; 8])));
    assert!(
        matches!(&error, HypervisorError::Processor { here, .. } if here == "lacks it"),
        "{error}"
    );
    let error = refused(&|registers| registers[0].1.truncate(3));
    assert!(
        matches!(
            error,
            HypervisorError::Call {
                call: "KVM_SET_ONE_REG",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn an_interrupt_controller_of_another_shape_is_refused() {
    let Some(fixture) = interruptible() else {
        return;
    };
    let _vcpu = fixture.vcpu();
    let good = serde_json::to_value(fixture.vm.save().unwrap()).unwrap();
    for list in ["distributor", "lines", "vcpus"] {
        let mut state = good.clone();
        let mut versions = state["gic"].as_object_mut().unwrap().values_mut();
        let values = versions.next().unwrap()[list].as_array_mut().unwrap();
        let more = values[0].clone();
        values.push(more);
        let state: VmState = serde_json::from_value(state).unwrap();
        let error = fixture.vm.restore(&state).unwrap_err();
        assert!(
            matches!(
                error,
                HypervisorError::Call {
                    call: "KVM_SET_DEVICE_ATTR",
                    ..
                }
            ),
            "{list}: {error}"
        );
    }
}

#[test]
fn an_interrupt_controller_of_another_version_is_refused() {
    let Some(fixture) = interruptible() else {
        return;
    };
    let _vcpu = fixture.vcpu();
    let (named, found, expected) = match fixture.vm.platform.gic.version() {
        Gic::V2 => ("V3", 2, 3),
        Gic::V3 => ("V2", 3, 2),
    };
    let none = serde_json::json!({"distributor": [], "lines": [], "vcpus": []});
    let state = serde_json::json!({"gic": {named: none}});
    let state: VmState = serde_json::from_value(state).unwrap();
    match fixture.vm.restore(&state).unwrap_err() {
        HypervisorError::Unsuitable {
            found: here,
            expected: wanted,
            ..
        } => assert_eq!((here, wanted), (found, expected)),
        other => panic!("{other}"),
    }
}
