//! Guest RAM in pieces, and the balloon that gives them back.

use hvf_double::MemoryCall::{Map, Unmap};

use super::*;
use crate::devices::virtio::balloon::{Balloon, BalloonConfig};
use crate::hypervisor::hvf::memory::CHUNK;
use crate::memory::{DiscardError, GuestMemory};
use crate::testing::{Buffer, Guest, Rig};

const PAGE: u64 = 4096;
/// A piece of the guest's that it gives away.
const PIECE: u64 = layout::RAM + 2 * CHUNK;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const REPORTING: u16 = 3;

#[test]
fn memory_is_mapped_in_pieces_that_go_alone() {
    let session = Session::begin();
    let vm = vm();
    let memory = GuestMemory::anonymous(&layout::ram_ranges(5 << 20)).unwrap();
    let (guest, host, len) = memory.host_ranges().next().unwrap();
    // SAFETY: the memory outlives the VM.
    unsafe { vm.map(0, guest.0, host, len) }.unwrap();
    let (two, one) = (2 << 20, 1 << 20);
    assert_eq!(
        session.mapped(),
        [
            (layout::RAM, two),
            (layout::RAM + (2 << 20), two),
            (layout::RAM + (4 << 20), one)
        ]
    );
    // What overlaps is refused, and what had been mapped of it goes.
    let before = layout::RAM - (2 << 20);
    // SAFETY: as above.
    let refused = unsafe { vm.map(1, before, host, len) };
    assert!(matches!(
        refused,
        Err(HypervisorError::Call {
            call: "hv_vm_map",
            ..
        })
    ));
    assert_eq!(session.mapped().len(), 3);
    vm.unmap(0).unwrap();
    vm.unmap(0).unwrap();
    assert!(session.mapped().is_empty());
    // A page of macOS is larger than the guest's.
    for (guest, len) in [(4096, 1 << 14), (1 << 14, PAGE_SIZE as u64 + 4096)] {
        // SAFETY: as above.
        assert!(unsafe { vm.map(0, guest, host, len) }.is_err());
    }
    // SAFETY: as above.
    unsafe { vm.map(0, guest.0, host, len) }.unwrap();
    drop(vm);
    assert!(session.mapped().is_empty());
}

/// A VM with this memory, which goes back to the host through it.
fn vm_with(memory: &GuestMemory) -> HvfVm {
    let vm = vm();
    for (slot, (guest, host, len)) in (0..).zip(memory.host_ranges()) {
        // SAFETY: tests keep the memory for longer than the VM.
        unsafe { vm.map(slot, guest.0, host, len) }.unwrap();
    }
    memory.set_stage_two(vm.stage_two().unwrap());
    vm
}

fn name(rig: &mut Rig<Balloon>, queue: u16, pages: std::ops::Range<u64>) {
    for some in pages.collect::<Vec<_>>().chunks(128) {
        let pfns = some.iter().map(|page| (PIECE / PAGE + page) as u32);
        let bytes: Vec<u8> = pfns.flat_map(u32::to_le_bytes).collect();
        let list = rig.guest.put(&bytes);
        rig.exchange(queue, &[list]);
    }
}

/// What the host has of the piece, and what the guest finds at both ends of it.
fn look(guest: &Guest) -> (u64, [u8; 2]) {
    let resident = guest.resident(PIECE, CHUNK) * guest.memory().host_page();
    let ends = [PIECE, PIECE + CHUNK - 1].map(|at| guest.read(at, 1)[0]);
    (resident, ends)
}

#[test]
fn a_balloon_has_whole_pieces_replaced() {
    let session = Session::begin();
    let guest = Guest::with_ranges(&[(layout::RAM, 4 * CHUNK)]);
    guest.write(layout::RAM, &vec![0x5a; 4 * CHUNK as usize]);
    let vm = vm_with(guest.memory());
    session.memory_calls();
    let config = BalloonConfig::default();
    let balloon = Balloon::new(config, 1 << 30).unwrap();
    let mut rig = Rig::with(balloon, guest, 128);
    rig.activate();

    // All but a page: the guest may be using that.
    let pages = CHUNK / PAGE;
    name(&mut rig, INFLATE, 1..pages);
    assert_eq!(session.memory_calls(), []);
    assert_eq!(look(&rig.guest), (CHUNK, [0x5a; 2]));
    name(&mut rig, INFLATE, 0..1);
    assert_eq!(session.memory_calls(), [Unmap(PIECE), Map(PIECE)]);
    assert_eq!(look(&rig.guest), (0, [0; 2]));
    let neighbours = [PIECE - 1, PIECE + CHUNK].map(|at| rig.guest.read(at, 1)[0]);
    assert_eq!(neighbours, [0x5a; 2]);
    // It comes back as what it is.
    name(&mut rig, DEFLATE, 0..pages);
    rig.guest.write(PIECE, &vec![0x77; CHUNK as usize]);
    assert_eq!(session.memory_calls(), []);

    // What the guest reports as free goes by whole pieces too.
    let report = |at: u64, len: u64| Buffer::writable(at, len as u32);
    rig.exchange(REPORTING, &[report(PIECE + PAGE, CHUNK)]);
    assert_eq!(session.memory_calls(), []);
    assert_eq!(look(&rig.guest), (CHUNK, [0x77; 2]));
    rig.exchange(REPORTING, &[report(PIECE - PAGE, CHUNK + 2 * PAGE)]);
    assert_eq!(session.memory_calls(), [Unmap(PIECE), Map(PIECE)]);
    assert_eq!(look(&rig.guest), (0, [0; 2]));

    let handle = rig.device.handle();
    assert_eq!(handle.metrics().discarded_bytes.get(), 2 * CHUNK);
    assert_eq!(handle.metrics().discard_failures.get(), 0);
    drop(vm);
    assert!(session.mapped().is_empty());
}

/// A load of 8 bytes that found nothing mapped.
fn translation_fault(address: u64) -> Step {
    let syndrome = class(0x24) | 1 << 24 | 3 << 22 | 1 << 16 | 1 << 15 | 6;
    Step::Exception { syndrome, address }
}

#[test]
fn what_cannot_be_taken_stays_and_what_cannot_come_back_is_told() {
    let session = Session::begin();
    let layout = [(vm_memory::GuestAddress(layout::RAM), 4 * CHUNK)];
    let memory = GuestMemory::anonymous(&layout).unwrap();
    let vm = vm_with(&memory);
    assert_eq!(memory.discard_unit(), CHUNK);
    let discard = |guest: u64, len: u64| memory.discard(vm_memory::GuestAddress(guest), len);
    let at = |address: u64| {
        session.script(0, [translation_fault(address), Step::Cancelled]);
    };
    discard(PIECE, 2 * CHUNK).unwrap();
    let mut vcpu = first(&vm);
    // A fault of a moment ago: the guest tries again, and is inside when it is kicked.
    at(PIECE + 8);
    assert!(matches!(vcpu.run(), VcpuExit::Kicked));
    assert_eq!(session.entries(0).pop().unwrap()[PC], ENTRY.pc);

    session.fill();
    assert!(matches!(
        discard(PIECE, CHUNK),
        Err(DiscardError::Host { .. })
    ));
    assert_eq!(session.mapped().len(), 3);
    // Nothing is there to be found; that has to end somewhere else than in trying again.
    at(PIECE + 8);
    match vcpu.run() {
        VcpuExit::MmioRead { address, .. } => assert_eq!(address, PIECE + 8),
        other => panic!("{other:?}"),
    }
    // The second piece of the two has gone already: so the first one stays where it is.
    session.memory_calls();
    assert!(discard(PIECE - CHUNK, 2 * CHUNK).is_err());
    drop(vcpu);
    drop(vm);
    assert!(session.mapped().is_empty());
    // There is no VM any more that could hold on to it, or be given it.
    assert!(discard(layout::RAM, CHUNK).is_err());
    assert!(session.mapped().is_empty());
}
