//! What a VM holds, written into another.

use super::*;
use crate::snapshot::state;

#[test]
fn lines_that_are_set_before_there_are_vcpus_are_not_lost() {
    let session = Session::begin();
    let saved = vm();
    let vcpu = first(&saved);
    saved.irq_line(1).unwrap().set(true);
    let state = saved.save().unwrap();
    drop(vcpu);
    drop(saved);

    let restored = vm();
    restored.restore(&state).unwrap();
    let line = restored.irq_line(2).unwrap();
    line.set(true);
    let _vcpu = restored.create_vcpu(0).unwrap().bind().unwrap();
    restored.bound().unwrap();
    line.set(false);
    let expected = [(33, true), (34, true), (34, false)];
    assert_eq!(session.interrupts(), expected);
}

#[test]
fn a_restored_vm_is_what_the_saved_one_was() {
    let session = Session::begin();
    let saved = vm();
    let mut vcpu = first(&saved);
    session.script(0, [set(9, 77), data(2, 4, false, false, false)]);
    match vcpu.run() {
        VcpuExit::MmioRead { data, .. } => data.fill(1),
        other => panic!("{other:?}"),
    }
    saved.irq_line(1).unwrap().set(true);
    let processor = vcpu.save().unwrap();
    let machine = saved.save().unwrap();
    let bytes = state::encode(&(&machine, &processor)).unwrap();
    drop(vcpu);
    drop(saved);

    let restored = vm();
    let seed = restored.create_vcpu(0).unwrap();
    let (from_file, of_vcpu): (VmState, VcpuState) = state::decode(&bytes).unwrap();
    restored.restore(&from_file).unwrap();
    let mut vcpu = seed.bind().unwrap();
    restored.bound().unwrap();
    vcpu.restore(&of_vcpu).unwrap();
    assert_eq!(session.interrupts(), [(33, true)]);
    assert_eq!(vcpu.save().unwrap(), processor);
    // Time goes on where the host has such a counter.
    let [mut before, mut after] =
        [machine, restored.save().unwrap()].map(|state| serde_json::to_value(state).unwrap());
    let counter = |state: &mut serde_json::Value| state["counter"].take().as_u64().unwrap();
    assert!(counter(&mut before) <= counter(&mut after));
    assert_eq!(after, before);
    // The load was complete when it was saved.
    session.script(0, [Step::Cancelled]);
    assert!(matches!(vcpu.run(), VcpuExit::Kicked));
    let entry = session.entries(0).pop().unwrap();
    assert_eq!(
        (entry[9], entry[4], entry[PC]),
        (77, 0x0101_0101, ENTRY.pc + 4)
    );

    let cut: VcpuState = serde_json::from_str(
        &serde_json::to_string(&of_vcpu)
            .unwrap()
            .replacen("77,", "", 1),
    )
    .unwrap();
    assert!(matches!(
        vcpu.restore(&cut),
        Err(HypervisorError::Unsuitable {
            what: "general registers",
            found: 30,
            expected: 31
        })
    ));
}
