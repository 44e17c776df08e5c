//! A guest goes on in another VM as if nothing had happened.

use super::*;
use crate::hypervisor::kvm::tests::travelled;

// Fills a general, a vector and a model-specific register, waits in the middle of an instruction
// (a port read that has not been answered), then says what it finds.
guest!(
    remembers,
    "mov rax, cr4",
    "or eax, 0x200",
    "mov cr4, rax",
    "movdqu xmm3, [rip + 2f]",
    "mov r15d, 0x1000",
    // SYSENTER_CS, which nothing here uses.
    "mov ecx, 0x174",
    "mov eax, 0x20",
    "xor edx, edx",
    "wrmsr",
    "mov dx, 0x600",
    "xor eax, eax",
    "in al, dx",
    "add r15d, eax",
    "rdmsr",
    "add eax, r15d",
    "mov dx, 0x601",
    "out dx, eax",
    "mov edi, 0x60000",
    "movdqu [rdi], xmm3",
    "mov eax, [rdi]",
    "out dx, eax",
    "ud2",
    ".balign 16",
    "2: .long 0x600df00d, 0, 0, 0",
);

fn written(vcpu: &mut KvmVcpu, expected: u16) -> u32 {
    match vcpu.run() {
        VcpuExit::PioWrite { port, data, .. } => {
            assert_eq!(port, expected);
            let mut value = [0; 4];
            value[..data.len()].copy_from_slice(data);
            u32::from_le_bytes(value)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_guest_goes_on_from_the_middle_of_an_instruction() {
    let Some(fixture) = Fixture::new(remembers()) else {
        return;
    };
    let mut vcpu = fixture.vcpu();
    match vcpu.run() {
        VcpuExit::PioRead {
            port: 0x600, data, ..
        } => data[0] = 3,
        other => panic!("{other:?}"),
    }
    // The answer has not reached the guest yet: saving gives it.
    let state = travelled(&vcpu.save().unwrap());
    let vm = travelled(&fixture.vm.save().unwrap());

    for _ in 0..2 {
        let (_other, mut copy) = fixture.restored(&vm, &state);
        assert_eq!(written(&mut copy, 0x601), 0x1000 + 3 + 0x20);
        assert_eq!(written(&mut copy, 0x601), 0x600d_f00d);
        assert!(matches!(copy.run(), VcpuExit::Shutdown));
    }
    // The one that was saved goes on as well.
    assert_eq!(written(&mut vcpu, 0x601), 0x1000 + 3 + 0x20);
}

#[test]
fn interrupt_controllers_keep_their_routes() {
    let Some(fixture) = Fixture::new(interrupts()) else {
        return;
    };
    let mut vcpu = fixture.vcpu();
    written(&mut vcpu, 0x500);
    let (vm, state) = (fixture.vm.save().unwrap(), vcpu.save().unwrap());

    let (other, mut copy) = fixture.restored(&vm, &state);
    let line = other.vm.irq_line(5).unwrap();
    for _ in 0..2 {
        line.pulse();
        written(&mut copy, 0x501);
    }
}

#[test]
fn a_state_that_no_processor_has_is_refused() {
    let Some(fixture) = Fixture::new(spin()) else {
        return;
    };
    let mut vcpu = fixture.vcpu();
    let good = serde_json::to_value(vcpu.save().unwrap()).unwrap();
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut state = good.clone();
        change(&mut state);
        let state: VcpuState = serde_json::from_value(state).unwrap();
        let mut fresh = Fixture::new(spin()).unwrap().vcpu();
        fresh.restore(&state).unwrap_err()
    };
    let error = refused(&|state| {
        state["msrs"].as_array_mut().unwrap().push(
            serde_json::to_value(kvm_bindings::kvm_msr_entry {
                index: 0xdead_0000,
                data: 1,
                ..Default::default()
            })
            .unwrap(),
        );
    });
    assert!(
        matches!(
            error,
            HypervisorError::Msr {
                index: 0xdead_0000,
                value: 1
            }
        ),
        "{error}"
    );
    let error = refused(&|state| {
        state["xsave"].as_array_mut().unwrap().truncate(100);
    });
    assert!(
        matches!(
            error,
            HypervisorError::Call {
                call: "KVM_SET_XSAVE",
                ..
            }
        ),
        "{error}"
    );
    let with_leaf = |change: &dyn Fn(&mut kvm_bindings::kvm_cpuid_entry2)| {
        refused(&|state| {
            let leaves = state["cpuid"].as_array_mut().unwrap();
            for leaf in leaves {
                let mut entry = serde_json::from_value(leaf.clone()).unwrap();
                change(&mut entry);
                *leaf = serde_json::to_value(entry).unwrap();
            }
        })
    };
    let other_maker = with_leaf(&|leaf| {
        if leaf.function == 0 {
            leaf.ebx = u32::from_le_bytes(*b"Sand");
        }
    });
    let more_features = with_leaf(&|leaf| {
        if leaf.function == 7 && leaf.index == 0 {
            leaf.ebx = u32::MAX;
        }
    });
    for error in [other_maker, more_features] {
        assert!(
            matches!(error, HypervisorError::Processor { .. }),
            "{error}"
        );
    }
}
