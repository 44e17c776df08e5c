//! A VM with a guest of a few instructions in its memory, and its twin from saved states.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::super::arch::tests as arch;
use super::*;
use crate::arch::VcpuSetup;
use crate::arch::current::layout;
use crate::hypervisor::{State, Vcpu, VcpuSeed};
use crate::memory::GuestMemory;
use crate::snapshot::state;

pub(in super::super) struct Fixture {
    // Before the memory it maps.
    pub(in super::super) vm: KvmVm,
    memory: GuestMemory,
    caps: Caps<CpuCaps>,
}

impl Fixture {
    /// None, and a word why, on a host without KVM.
    pub(in super::super) fn new(code: &[u8]) -> Option<Self> {
        let kvm = match Kvm::open() {
            Ok(kvm) => kvm,
            Err(error) => {
                eprintln!("skipped: {error}");
                return None;
            }
        };
        let memory = GuestMemory::anonymous(&layout::ram_ranges(4 << 20)).unwrap();
        let vm = kvm.create_vm().unwrap();
        for (slot, (guest, host, len)) in (0..).zip(memory.host_ranges()) {
            // SAFETY: the memory is dropped after the VM.
            unsafe { vm.map(slot, guest.0, host, len) }.unwrap();
        }
        arch::prepare(&memory);
        memory.write_slice(code, GuestAddress(arch::CODE)).unwrap();
        Some(Self {
            vm,
            memory,
            caps: kvm.caps().clone(),
        })
    }

    pub(in super::super) fn seed(&self) -> KvmSeed {
        let seed = self.vm.create_vcpu(0).unwrap();
        self.vm.complete().unwrap();
        seed
    }

    pub(in super::super) fn vcpu(&self) -> KvmVcpu {
        let mut vcpu = self.seed().bind().unwrap();
        vcpu.boot(&self.setup()).unwrap();
        vcpu
    }

    pub(in super::super) fn setup(&self) -> VcpuSetup {
        arch::setup(&self.caps.cpu)
    }

    /// Another VM with the same memory, one vCPU and what was saved.
    pub(in super::super) fn restored(&self, vm: &VmState, vcpu: &VcpuState) -> (Self, KvmVcpu) {
        let other = Self::new(&[]).expect("there was a KVM a moment ago");
        for region in self.memory.iter() {
            let mut bytes = vec![0; region.len() as usize];
            let start = region.start_addr();
            self.memory.read_slice(&mut bytes, start).unwrap();
            other.memory.write_slice(&bytes, start).unwrap();
        }
        let mut fresh = other.seed().bind().unwrap();
        other.vm.restore(vm).unwrap();
        fresh.restore(vcpu).unwrap();
        (other, fresh)
    }
}

/// A state that has been through the bytes of a file.
pub(in super::super) fn travelled<T: State>(state: &T) -> T {
    state::decode(&state::encode(state).unwrap()).unwrap()
}
