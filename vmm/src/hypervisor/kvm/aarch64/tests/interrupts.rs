//! Interrupts of lines and of the timer, through the GIC that this host has.

use super::*;

// Takes interrupts: shared 5 as edges, 6 as levels, the virtual timer's; tells each one's number.
// x9: distributor, x10: the redistributor's second frame, x11: device.
guest!(
    pub(super) interrupts,
    "adr x0, 9f",
    "msr vbar_el1, x0",
    "mov x9, #0x08000000",
    "mov x10, #0x10000000",
    "add x10, x10, #0x10000",
    "mov x11, #0x0a000000",
    // GICD_CTLR: affinity routing, group 1.
    "mov w0, #0x12",
    "str w0, [x9]",
    // Group 1, edge and level, enabled: shared 5 is bit 5 of the second word.
    "mov w0, #-1",
    "str w0, [x9, #0x84]",
    "str w0, [x10, #0x80]",
    "mov w0, #0x800",
    "str w0, [x9, #0xc08]",
    "mov w0, #0x60",
    "str w0, [x9, #0x104]",
    "mov w0, #0x08000000",
    "str w0, [x10, #0x100]",
    // ICC_SRE_EL1, ICC_PMR_EL1, ICC_IGRPEN1_EL1.
    "mov x0, #1",
    "msr S3_0_C12_C12_5, x0",
    "isb",
    "mov x0, #0xff",
    "msr S3_0_C4_C6_0, x0",
    "mov x0, #1",
    "msr S3_0_C12_C12_7, x0",
    "isb",
    // What to do: 0 waits, anything else is after how many ticks the timer goes off.
    "ldr x0, [x11]",
    "cbz x0, 2f",
    "msr cntv_tval_el0, x0",
    "mov x0, #1",
    "msr cntv_ctl_el0, x0",
    "2: str xzr, [x11, #16]",
    "msr daifclr, #2",
    "3: wfi",
    "b 3b",
    ".balign 2048",
    // The IRQ vector of the current level.
    "9: .space 0x280",
    "mrs x3, S3_0_C12_C12_0",
    "cmp w3, #27",
    "b.ne 4f",
    "msr cntv_ctl_el0, xzr",
    "4: str w3, [x11, #8]",
    "msr S3_0_C12_C12_1, x3",
    "eret",
);

// The same on a GICv2. x10: the CPU interface.
guest!(
    interrupts_v2,
    "adr x0, 9f",
    "msr vbar_el1, x0",
    "mov x9, #0x08000000",
    "mov x10, #0x08010000",
    "mov x11, #0x0a000000",
    // GICD_CTLR.
    "mov w0, #1",
    "str w0, [x9]",
    // Edge and level, for the first processor, enabled.
    "mov w0, #0x800",
    "str w0, [x9, #0xc08]",
    "mov w0, #0x01010101",
    "str w0, [x9, #0x824]",
    "mov w0, #0x60",
    "str w0, [x9, #0x104]",
    "mov w0, #0x08000000",
    "str w0, [x9, #0x100]",
    // GICC_PMR, GICC_CTLR.
    "mov w0, #0xff",
    "str w0, [x10, #4]",
    "mov w0, #1",
    "str w0, [x10]",
    "ldr x0, [x11]",
    "cbz x0, 2f",
    "msr cntv_tval_el0, x0",
    "mov x0, #1",
    "msr cntv_ctl_el0, x0",
    "2: str xzr, [x11, #16]",
    "msr daifclr, #2",
    "3: wfi",
    "b 3b",
    ".balign 2048",
    "9: .space 0x280",
    // GICC_IAR, GICC_EOIR.
    "ldr w3, [x10, #0xc]",
    "cmp w3, #27",
    "b.ne 4f",
    "msr cntv_ctl_el0, xzr",
    "4: str w3, [x11, #8]",
    "str w3, [x10, #0x10]",
    "eret",
);

/// Runs until it is ready, with the answer to its question.
pub(super) fn begun(vcpu: &mut KvmVcpu, ticks: u64) {
    answer(vcpu, 0, &ticks.to_le_bytes());
    assert_eq!(written(vcpu), (16, 0));
}

/// The guest above for the GIC of this host. None, and a word why, on one without KVM.
pub(super) fn fixture() -> Option<Fixture> {
    let fixture = Fixture::new(interrupts())?;
    match fixture.vm.platform.gic.version() {
        Gic::V2 => Fixture::new(interrupts_v2()),
        Gic::V3 => Some(fixture),
    }
}

#[test]
fn lines_of_one_pin_each_interrupt_the_guest() {
    let Some(fixture) = fixture() else { return };
    let mut vcpu = fixture.vcpu();
    let lines = [5, 5].map(|pin| fixture.vm.irq_line(pin).unwrap());
    begun(&mut vcpu, 0);
    for line in &lines {
        line.pulse();
        assert_eq!(written(&mut vcpu), (8, 32 + 5));
    }
}

#[test]
fn a_level_interrupts_as_long_as_it_is_high() {
    let Some(fixture) = fixture() else { return };
    let mut vcpu = fixture.vcpu();
    let [edge, level] = [5, 6].map(|pin| fixture.vm.irq_line(pin).unwrap());
    begun(&mut vcpu, 0);
    level.set(true);
    for _ in 0..3 {
        assert_eq!(written(&mut vcpu), (8, 32 + 6));
    }
    level.set(false);
    edge.pulse();
    assert_eq!(written(&mut vcpu), (8, 32 + 5));
}

#[test]
fn the_timer_goes_off() {
    let Some(fixture) = fixture() else { return };
    let mut vcpu = fixture.vcpu();
    begun(&mut vcpu, 1000);
    assert_eq!(written(&mut vcpu), (8, 27));
}
