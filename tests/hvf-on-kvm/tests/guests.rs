//! The functions, with guests of a few instructions.

#![cfg(all(target_os = "linux", target_arch = "aarch64"))]
#![allow(unsafe_code)]

mod support;

use std::sync::mpsc;
use std::thread;

use hvf_on_kvm::applevisor_sys::hv_error_t::{HV_BAD_ARGUMENT, HV_BUSY, HV_DENIED};
use hvf_on_kvm::applevisor_sys::{
    hv_error_t, hv_exit_reason_t, hv_gic_config_create, hv_gic_create, hv_gic_get_icc_reg,
    hv_gic_icc_reg_t, hv_gic_set_icc_reg, hv_gic_set_spi, hv_gic_set_state, hv_gic_state_create,
    hv_gic_state_get_data, hv_gic_state_get_size, hv_reg_t, hv_return_t, hv_simd_fp_reg_t,
    hv_sys_reg_t, hv_vcpu_get_reg, hv_vcpu_get_simd_fp_reg, hv_vcpu_set_vtimer_offset,
    hv_vcpus_exit, hv_vm_create, hv_vm_destroy, hv_vm_map, hv_vm_unmap, os_release,
};
use support::{ALL, Memory, RAM, REDISTRIBUTORS, REGISTERS, VECTORS, Vcpu, Vm, done};

/// Where nothing is.
const DEVICE: u64 = 0x0a00_0000;

fn is(error: hv_error_t) -> hv_return_t {
    (error as u32).cast_signed()
}

fn counter() -> u64 {
    let count: u64;
    // SAFETY: reads a register that every process may read.
    unsafe {
        std::arch::asm!("isb", "mrs {}, cntvct_el0", out(reg) count, options(nomem, nostack));
    }
    count
}

#[test]
fn registers_come_back_as_they_were_set() {
    let _vm = Vm::new(&[]);
    let vcpu = Vcpu::new(3);
    for (register, value) in REGISTERS.into_iter().zip(1..) {
        vcpu.set(register, value << 40 | value);
    }
    let special = [
        (hv_reg_t::PC, RAM + 8),
        (hv_reg_t::CPSR, 0x6000_03c5),
        (hv_reg_t::FPCR, 1 << 24),
        (hv_reg_t::FPSR, 1 << 27),
    ];
    let system = [
        (hv_sys_reg_t::SP_EL0, 0x1110),
        (hv_sys_reg_t::SP_EL1, 0x2220),
        (hv_sys_reg_t::ELR_EL1, 0x3330),
        (hv_sys_reg_t::SPSR_EL1, 0x3c5),
        (hv_sys_reg_t::TPIDR_EL1, u64::MAX),
        (hv_sys_reg_t::CNTV_CVAL_EL0, 1 << 50),
    ];
    special
        .iter()
        .for_each(|(register, value)| vcpu.set(*register, *value));
    system
        .iter()
        .for_each(|(register, value)| vcpu.set_sys(*register, *value));
    for (register, value) in REGISTERS.into_iter().zip(1..) {
        assert_eq!(vcpu.get(register), value << 40 | value, "{register:?}");
    }
    for (register, value) in special {
        assert_eq!(vcpu.get(register), value, "{register:?}");
    }
    for (register, value) in system {
        assert_eq!(vcpu.get_sys(register), value, "{register:?}");
    }
    assert_eq!(vcpu.get_sys(hv_sys_reg_t::MPIDR_EL1) & 0xff_ffff, 3);
    // The MMU is off.
    assert_eq!(vcpu.get_sys(hv_sys_reg_t::SCTLR_EL1) & 1, 0);
}

#[test]
fn a_call_comes_out_past_its_instruction() {
    let vm = Vm::new(program! {
        "mov x0, #7"
        "hvc #0"
        "add x1, x0, #1"
        "fmov v5.2d, #2.0"
        "hvc #0"
    });
    let vcpu = Vcpu::new(0);
    vcpu.set_sys(hv_sys_reg_t::CPACR_EL1, 3 << 20);
    vcpu.run_to_call();
    assert_eq!(vcpu.get(hv_reg_t::X0), 7);
    assert_eq!(vcpu.get(hv_reg_t::PC), RAM + 8);
    vcpu.set(hv_reg_t::X0, 41);
    vcpu.run_to_call();
    assert_eq!(vcpu.get(hv_reg_t::X1), 42);
    assert_eq!(vcpu.get(hv_reg_t::PC), RAM + 20);
    let mut value = 0;
    // SAFETY: the pointer takes a value.
    done(unsafe { hv_vcpu_get_simd_fp_reg(vcpu.id, hv_simd_fp_reg_t::Q5, &raw mut value) });
    let two = u128::from(2.0_f64.to_bits());
    assert_eq!(value, two << 64 | two);
    drop(vcpu);
    drop(vm);
}

#[test]
fn loads_and_stores_are_their_callers_to_carry_out() {
    let _vm = Vm::new(program! {
        "mov x2, #0x0a000000"
        "mov w3, #0x55aa"
        "strh w3, [x2, #4]"
        "ldrb w4, [x2, #8]"
        "ldr w17, [x2, #12]"
        "str xzr, [x2, #16]"
        "hvc #0"
    });
    let vcpu = Vcpu::new(0);
    let before = 0x1234_5678_9abc_def0;
    vcpu.set(hv_reg_t::X17, before);

    let store = vcpu.run_to_access();
    assert!(store.write);
    assert_eq!((store.address, store.size), (DEVICE + 4, 2));
    assert_eq!(vcpu.get(store.register) & 0xffff, 0x55aa);
    // It waits at the instruction, as on Apple's processors.
    assert_eq!(vcpu.get(hv_reg_t::PC), RAM + 8);
    vcpu.skip();
    assert_eq!(vcpu.get(hv_reg_t::PC), RAM + 12);
    // What stood in for the real register is itself again.
    assert_eq!(vcpu.get(hv_reg_t::X17), before);

    let load = vcpu.run_to_access();
    assert!(!load.write);
    assert_eq!((load.address, load.size), (DEVICE + 8, 1));
    // Of which the guest has asked for a byte.
    vcpu.set(load.register, 0xf80);
    vcpu.skip();
    assert_eq!(vcpu.get(hv_reg_t::X4), 0x80);
    assert_eq!(vcpu.get(hv_reg_t::X17), before);

    let load = vcpu.run_to_access();
    assert_eq!((load.address, load.size), (DEVICE + 12, 4));
    vcpu.set(load.register, 0xcafe_f00d);
    vcpu.skip();
    assert_eq!(vcpu.get(hv_reg_t::X17), 0xcafe_f00d);

    let store = vcpu.run_to_access();
    assert_eq!((store.address, store.size), (DEVICE + 16, 8));
    assert_eq!(vcpu.get(store.register), 0);
    vcpu.skip();
    vcpu.run_to_call();
}

#[test]
fn an_access_that_is_done_again_finds_what_was_mapped_meanwhile() {
    const AWAY: u64 = RAM + (1 << 30);
    let _vm = Vm::new(program! {
        "mov x2, #0x80000000"
        "ldr x3, [x2, #8]"
        "str x3, [x2, #16]"
        "hvc #0"
    });
    let memory = Memory::new(0x4000);
    memory.put(8, &77_u64.to_le_bytes());
    let vcpu = Vcpu::new(0);
    let load = vcpu.run_to_access();
    assert_eq!(load.address, AWAY + 8);
    // SAFETY: the memory stays until it is unmapped.
    done(unsafe { hv_vm_map(memory.at(), AWAY, 0x4000, ALL) });
    vcpu.run_to_call();
    assert_eq!(vcpu.get(hv_reg_t::X3), 77);
    // SAFETY: the memory is there, and the guest stands still.
    let stored = unsafe { memory.at().cast::<u64>().add(2).read() };
    assert_eq!(stored, 77);
    // SAFETY: takes no pointers.
    done(unsafe { hv_vm_unmap(AWAY, 0x4000) });
    vcpu.set(hv_reg_t::PC, RAM);
    assert_eq!(vcpu.run_to_access().address, AWAY + 8);
}

#[test]
fn an_access_that_says_nothing_of_itself_exits_too() {
    let _vm = Vm::new(program! {
        "mov x2, #0x0a000000"
        "ldp x3, x4, [x2, #32]"
    });
    let vcpu = Vcpu::new(0);
    let exit = vcpu.run();
    assert_eq!(exit.reason, hv_exit_reason_t::EXCEPTION);
    assert_eq!(exit.exception.syndrome >> 26, 0x24);
    assert_eq!(exit.exception.syndrome >> 24 & 1, 0);
    assert_eq!(exit.exception.physical_address & !0xfff, DEVICE);
}

#[test]
fn a_breakpoint_of_the_guests_own_is_the_guests() {
    let vm = Vm::new(program! {
        "msr vbar_el1, x0"
        "isb"
        "brk #3"
        "hvc #0"
    });
    // Back behind it.
    vm.vector(
        0x200,
        program! {
            "mrs x5, esr_el1"
            "mrs x6, elr_el1"
            "add x7, x6, #4"
            "msr elr_el1, x7"
            "eret"
        },
    );
    let vcpu = Vcpu::new(0);
    vcpu.set(hv_reg_t::X0, VECTORS);
    vcpu.run_to_call();
    assert_eq!(vcpu.get(hv_reg_t::X5), 0x3c << 26 | 1 << 25 | 3);
    assert_eq!(vcpu.get(hv_reg_t::X6), RAM + 8);
    assert_eq!(vcpu.get(hv_reg_t::PC), RAM + 16);
}

/// Has interrupt 48 come to vCPU 0, calls, and then waits for it with interrupts on.
fn waits_for_a_line() -> Vm {
    let vm = Vm::new(program! {
        "msr vbar_el1, x0"
        // GICD_CTLR.EnableGrp1, GICD_ICFGR3, GICD_IGROUPR1, GICD_ISENABLER1, GICD_IROUTER48.
        "mov x1, #0x08000000"
        "mov w2, #2"
        "str w2, [x1]"
        "str wzr, [x1, #0xc0c]"
        "mov w2, #0x10000"
        "str w2, [x1, #0x84]"
        "str w2, [x1, #0x104]"
        "add x3, x1, #0x6000"
        "str xzr, [x3, #0x180]"
        "mov x2, #0xff"
        "msr icc_pmr_el1, x2"
        "mov x2, #1"
        "msr icc_igrpen1_el1, x2"
        "isb"
        "hvc #0"
        "msr daifclr, #2"
        "10: wfi"
        "b 10b"
    });
    vm.vector(
        0x280,
        program! {
            "mrs x0, icc_iar1_el1"
            "hvc #0"
            "msr icc_eoir1_el1, x0"
            "eret"
        },
    );
    vm
}

fn set_line(level: bool) {
    // SAFETY: takes no pointers.
    done(unsafe { hv_gic_set_spi(48, level) });
}

fn cancel(id: u64) {
    // SAFETY: there is one number.
    done(unsafe { hv_vcpus_exit(&raw const id, 1) });
}

#[test]
fn a_line_interrupts_while_it_is_high() {
    let _vm = waits_for_a_line();
    let vcpu = Vcpu::new(0);
    vcpu.set(hv_reg_t::X0, VECTORS);
    vcpu.run_to_call();
    thread::scope(|scope| {
        scope.spawn(|| set_line(true));
        vcpu.run_to_call();
    });
    assert_eq!(vcpu.get(hv_reg_t::X0), 48);
    // Still high: again.
    vcpu.run_to_call();
    assert_eq!(vcpu.get(hv_reg_t::X0), 48);
    set_line(false);
    let id = vcpu.id;
    thread::scope(|scope| {
        scope.spawn(move || cancel(id));
        assert_eq!(vcpu.run().reason, hv_exit_reason_t::CANCELED);
    });
}

#[test]
fn a_line_that_was_high_before_the_first_run_interrupts() {
    let _vm = waits_for_a_line();
    set_line(true);
    let vcpu = Vcpu::new(0);
    vcpu.set(hv_reg_t::X0, VECTORS);
    vcpu.run_to_call();
    vcpu.run_to_call();
    assert_eq!(vcpu.get(hv_reg_t::X0), 48);
}

/// What the interrupt controller holds, without the CPU interfaces.
fn gic_state() -> Vec<u8> {
    // SAFETY: the state exists until it is released, and there is room for it.
    unsafe {
        let state = hv_gic_state_create();
        assert!(!state.is_null());
        let mut size = 0;
        done(hv_gic_state_get_size(state, &raw mut size));
        let mut blob = vec![0; size];
        done(hv_gic_state_get_data(state, blob.as_mut_ptr().cast()));
        os_release(state);
        blob
    }
}

#[test]
fn an_interrupt_that_was_pending_is_pending_in_the_next_vm() {
    const INTERFACE: [hv_gic_icc_reg_t; 3] = [
        hv_gic_icc_reg_t::SRE_EL1,
        hv_gic_icc_reg_t::PMR_EL1,
        hv_gic_icc_reg_t::IGRPEN1_EL1,
    ];
    let vm = waits_for_a_line();
    let vcpu = Vcpu::new(0);
    vcpu.set(hv_reg_t::X0, VECTORS);
    vcpu.run_to_call();
    set_line(true);
    let blob = gic_state();
    let interface = INTERFACE.map(|register| {
        let mut value = 0;
        // SAFETY: the pointer takes a value.
        done(unsafe { hv_gic_get_icc_reg(vcpu.id, register, &raw mut value) });
        value
    });
    assert_eq!(interface[2], 1);
    let pc = vcpu.get(hv_reg_t::PC);
    drop(vcpu);
    drop(vm);

    let _vm = waits_for_a_line();
    let vcpu = Vcpu::new(0);
    vcpu.set(hv_reg_t::PC, pc);
    vcpu.set_sys(hv_sys_reg_t::VBAR_EL1, VECTORS);
    // SAFETY: the pointers have as many bytes as is said.
    unsafe {
        let short = hv_gic_set_state(blob.as_ptr().cast(), blob.len() - 4);
        assert_eq!(short, is(HV_BAD_ARGUMENT));
        done(hv_gic_set_state(blob.as_ptr().cast(), blob.len()));
        for (register, value) in INTERFACE.into_iter().zip(interface) {
            done(hv_gic_set_icc_reg(vcpu.id, register, value));
        }
    }
    assert_eq!(gic_state(), blob);
    // It is as high as it was.
    for _ in 0..2 {
        vcpu.run_to_call();
        assert_eq!(vcpu.get(hv_reg_t::X0), 48);
    }
    set_line(false);
    cancel(vcpu.id);
    assert_eq!(vcpu.run().reason, hv_exit_reason_t::CANCELED);
}

#[test]
fn the_counter_starts_where_it_is_told_and_its_timer_interrupts() {
    let vm = Vm::new(program! {
        "msr vbar_el1, x0"
        "isb"
        "mrs x5, cntvct_el0"
        "hvc #0"
        // GICD_CTLR.EnableGrp1; GICR_IGROUPR0, GICR_ISENABLER0.
        "mov x1, #0x08000000"
        "mov w2, #2"
        "str w2, [x1]"
        "mov x1, #0x10010000"
        "mov w2, #0x08000000"
        "str w2, [x1, #0x80]"
        "str w2, [x1, #0x100]"
        "mov x2, #0xff"
        "msr icc_pmr_el1, x2"
        "mov x2, #1"
        "msr icc_igrpen1_el1, x2"
        "add x6, x5, #1000"
        "msr cntv_cval_el0, x6"
        "msr cntv_ctl_el0, x2"
        "isb"
        "msr daifclr, #2"
        "10: wfi"
        "b 10b"
    });
    vm.vector(
        0x280,
        program! {
            "mrs x0, icc_iar1_el1"
            "mrs x7, cntvct_el0"
            "hvc #0"
        },
    );
    let vcpu = Vcpu::new(0);
    let offset = counter().wrapping_sub(1_000_000_000);
    // SAFETY: takes no pointers.
    done(unsafe { hv_vcpu_set_vtimer_offset(vcpu.id, offset) });
    vcpu.set(hv_reg_t::X0, VECTORS);
    vcpu.run_to_call();
    let seen = vcpu.get(hv_reg_t::X5);
    assert!(
        (1_000_000_000..=counter().wrapping_sub(offset)).contains(&seen),
        "{seen}"
    );
    vcpu.run_to_call();
    assert_eq!(vcpu.get(hv_reg_t::X0), 27);
    assert!(vcpu.get(hv_reg_t::X7) >= seen + 1000);
}

#[test]
fn a_cancelled_vcpu_comes_out_whenever_that_is() {
    let _vm = Vm::new(program! { "10: b 10b" });
    let vcpu = Vcpu::new(0);
    // Before it runs.
    cancel(vcpu.id);
    assert_eq!(vcpu.run().reason, hv_exit_reason_t::CANCELED);
    let id = vcpu.id;
    for _ in 0..100 {
        thread::scope(|scope| {
            scope.spawn(move || cancel(id));
            assert_eq!(vcpu.run().reason, hv_exit_reason_t::CANCELED);
        });
    }
    assert_eq!(vcpu.get(hv_reg_t::PC), RAM);
}

#[test]
fn vcpus_are_who_they_were_told_to_be() {
    const SECOND: usize = 0x1000;
    // Sends interrupt 1 to the vCPU of affinity 1.
    let vm = Vm::new(program! {
        "mov x1, #0x08000000"
        "mov w2, #2"
        "str w2, [x1]"
        "mov x2, #2"
        "movk x2, #0x100, lsl #16"
        "msr icc_sgi1r_el1, x2"
        "isb"
        "hvc #0"
    });
    // GICR_TYPER, GICR_IGROUPR0 and GICR_ISENABLER0 of the vCPU that was made first.
    vm.memory.put(
        SECOND,
        program! {
            "msr vbar_el1, x0"
            "ldr x3, [x1, #8]"
            "add x1, x1, #0x10000"
            "mov w2, #2"
            "str w2, [x1, #0x80]"
            "str w2, [x1, #0x100]"
            "mov x2, #0xff"
            "msr icc_pmr_el1, x2"
            "mov x2, #1"
            "msr icc_igrpen1_el1, x2"
            "isb"
            "mrs x4, mpidr_el1"
            "hvc #0"
            "msr daifclr, #2"
            "10: wfi"
            "b 10b"
        },
    );
    vm.vector(0x280, program! { "mrs x0, icc_iar1_el1" "hvc #0" });
    let (made, first) = mpsc::channel();
    let (go, all_made) = mpsc::channel();
    let (ready, is_ready) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            let vcpu = Vcpu::new(1);
            made.send(()).unwrap();
            all_made.recv().unwrap();
            vcpu.set(hv_reg_t::PC, RAM + SECOND as u64);
            vcpu.set(hv_reg_t::X0, VECTORS);
            vcpu.set(hv_reg_t::X1, REDISTRIBUTORS);
            vcpu.run_to_call();
            assert_eq!(vcpu.get(hv_reg_t::X3) >> 32, 1);
            assert_eq!(vcpu.get(hv_reg_t::X4) & 0xff_ffff, 1);
            ready.send(()).unwrap();
            vcpu.run_to_call();
            assert_eq!(vcpu.get(hv_reg_t::X0), 1);
        });
        first.recv().unwrap();
        let vcpu = Vcpu::new(0);
        go.send(()).unwrap();
        is_ready.recv().unwrap();
        vcpu.run_to_call();
    });
}

#[test]
fn the_frameworks_rules_hold() {
    let vm = Vm::new(program! { "hvc #0" });
    // SAFETY: no pointers beside null, objects that exist, and memory that outlives the VM.
    unsafe {
        assert_eq!(hv_vm_create(std::ptr::null_mut()), is(HV_BUSY));
        assert_eq!(
            hv_vm_map(vm.memory.at(), RAM, 0x4000, ALL),
            is(HV_BAD_ARGUMENT)
        );
        let odd = RAM + (1 << 30) + 0x1000;
        assert_eq!(
            hv_vm_map(vm.memory.at(), odd, 0x4000, ALL),
            is(HV_BAD_ARGUMENT)
        );
        assert_eq!(hv_vm_unmap(RAM, 0x4000), is(HV_BAD_ARGUMENT));
        assert_eq!(hv_gic_set_spi(31, true), is(HV_BAD_ARGUMENT));
        let vcpu = Vcpu::new(0);
        assert_eq!(hv_vm_destroy(), is(HV_BUSY));
        let gic = hv_gic_config_create();
        assert_eq!(hv_gic_create(gic), is(HV_BUSY));
        os_release(gic);
        let id = vcpu.id;
        let elsewhere = thread::spawn(move || {
            let mut value = 0;
            hv_vcpu_get_reg(id, hv_reg_t::X0, &raw mut value)
        });
        assert_eq!(elsewhere.join().unwrap(), is(HV_DENIED));
        let gone = id + 1;
        assert_eq!(hv_vcpus_exit(&raw const gone, 1), is(HV_BAD_ARGUMENT));
        drop(vcpu);
        drop(vm);
    }
    // And nothing is left of it.
    let _vm = Vm::new(program! { "hvc #0" });
    Vcpu::new(0).run_to_call();
}
