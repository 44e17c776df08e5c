//! `hv_vm_*`: the VM and its memory.

use std::collections::BTreeMap;
use std::ffi::c_void;

use applevisor_sys::hv_error_t::{HV_BAD_ARGUMENT, HV_BUSY, HV_NO_DEVICE, HV_UNSUPPORTED};
use applevisor_sys::{
    HV_MEMORY_EXEC, HV_MEMORY_READ, HV_MEMORY_WRITE, PAGE_SIZE, hv_ipa_t, hv_memory_flags_t,
    hv_return_t, hv_vm_config_t,
};
use kvm_bindings::{
    KVM_CAP_ARM_NISV_TO_USER, KVM_MEM_READONLY, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::Kvm;

use crate::world::{Answer, Machine, Object, code, refused, with_vm, world, write};

/// Bits of a guest-physical address by default, and what KVM has where it says nothing.
const DEFAULT_IPA: u32 = 36;
const KVM_IPA: u32 = 40;

/// Memory of the host's that the guest has: a memory slot of KVM's.
#[derive(Debug)]
pub(crate) struct Piece {
    slot: u32,
    pub(crate) host: usize,
    pub(crate) size: usize,
}

fn kvm() -> Answer<Kvm> {
    Kvm::new().map_err(|_| HV_UNSUPPORTED)
}

#[unsafe(no_mangle)]
extern "C" fn hv_vm_config_create() -> hv_vm_config_t {
    Object::VmConfig(DEFAULT_IPA).give()
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vm_config_get_max_ipa_size(bits: *mut u32) -> hv_return_t {
    let most = kvm().map(|kvm| match kvm.get_host_ipa_limit() {
        limit @ 1.. => limit.cast_unsigned(),
        _ => KVM_IPA,
    });
    // SAFETY: the caller's word.
    unsafe { write(bits, most) }
}

/// # Safety
/// `config` exists.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vm_config_set_ipa_size(config: hv_vm_config_t, bits: u32) -> hv_return_t {
    // SAFETY: an object of `hv_vm_config_create`.
    let config = unsafe { Object::at(config) };
    *config = Object::VmConfig(bits);
    code(Ok(()))
}

/// # Safety
/// `config` exists, or is null.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vm_create(config: hv_vm_config_t) -> hv_return_t {
    let mut world = world();
    if world.is_some() {
        return code(Err(HV_BUSY));
    }
    let bits = if config.is_null() {
        DEFAULT_IPA
    } else {
        // SAFETY: an object that the caller has.
        match unsafe { Object::at(config) } {
            Object::VmConfig(bits) => *bits,
            _ => return code(Err(HV_BAD_ARGUMENT)),
        }
    };
    code(Machine::new(bits).map(|machine| *world = Some(machine)))
}

#[unsafe(no_mangle)]
extern "C" fn hv_vm_destroy() -> hv_return_t {
    let mut world = world();
    match &*world {
        None => code(Err(HV_NO_DEVICE)),
        Some(machine) if !machine.vcpus.is_empty() => code(Err(HV_BUSY)),
        Some(_) => {
            *world = None;
            code(Ok(()))
        }
    }
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vm_get_max_vcpu_count(count: *mut u32) -> hv_return_t {
    let most = kvm().map(|kvm| u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX));
    // SAFETY: the caller's word.
    unsafe { write(count, most) }
}

#[unsafe(no_mangle)]
extern "C" fn hv_vm_map(
    address: *const c_void,
    guest: hv_ipa_t,
    size: usize,
    flags: hv_memory_flags_t,
) -> hv_return_t {
    code(with_vm(|vm| {
        vm.map(address.expose_provenance(), guest, size, flags)
    }))
}

#[unsafe(no_mangle)]
extern "C" fn hv_vm_unmap(guest: hv_ipa_t, size: usize) -> hv_return_t {
    code(with_vm(|vm| match vm.pieces.get(&guest) {
        Some(piece) if piece.size == size => {
            vm.set(piece.slot, 0, guest, 0, 0)?;
            vm.pieces.remove(&guest);
            Ok(())
        }
        _ => Err(HV_BAD_ARGUMENT),
    }))
}

impl Machine {
    fn new(ipa_bits: u32) -> Answer<Self> {
        let fd = kvm()?.create_vm_with_ipa_size(ipa_bits).map_err(refused)?;
        // An access that the processor says nothing about is then an exit, as in the framework.
        let opaque = kvm_enable_cap {
            cap: KVM_CAP_ARM_NISV_TO_USER,
            ..Default::default()
        };
        fd.enable_cap(&opaque).map_err(refused)?;
        Ok(Self {
            fd,
            ipa_bits,
            gic: None,
            pieces: BTreeMap::new(),
            made: 0,
            vcpus: BTreeMap::new(),
            has_run: false,
        })
    }

    fn map(&mut self, host: usize, guest: u64, size: usize, flags: hv_memory_flags_t) -> Answer {
        let aligned = host.is_multiple_of(PAGE_SIZE)
            && guest.is_multiple_of(PAGE_SIZE as u64)
            && size.is_multiple_of(PAGE_SIZE)
            && size > 0;
        let known = HV_MEMORY_READ | HV_MEMORY_WRITE | HV_MEMORY_EXEC;
        let end = guest.checked_add(size as u64).ok_or(HV_BAD_ARGUMENT)?;
        if !aligned || flags & !known != 0 || end > 1 << self.ipa_bits {
            return Err(HV_BAD_ARGUMENT);
        }
        let before = self.pieces.range(..end).next_back();
        if before.is_some_and(|(at, piece)| at + piece.size as u64 > guest) {
            return Err(HV_BAD_ARGUMENT);
        }
        let taken = |slot: &u32| self.pieces.values().any(|piece| piece.slot == *slot);
        // The lowest free number: mostly the number of pieces, or a little below it.
        let count = self.pieces.len() as u32;
        let slot = if taken(&count) {
            (0..count).find(|slot| !taken(slot)).unwrap_or(count + 1)
        } else {
            count
        };
        let rights = if flags & HV_MEMORY_WRITE == 0 {
            KVM_MEM_READONLY
        } else {
            0
        };
        self.set(slot, host as u64, guest, size as u64, rights)?;
        self.pieces.insert(guest, Piece { slot, host, size });
        Ok(())
    }

    /// Gives the guest a memory slot, or takes it with a size of 0.
    fn set(&self, slot: u32, host: u64, guest: u64, size: u64, flags: u32) -> Answer {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: guest,
            memory_size: size,
            userspace_addr: host,
        };
        // SAFETY: the caller of `hv_vm_map` keeps the memory until it is unmapped.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(refused)
    }
}
