//! A VM with memory and an interrupt controller, and vCPUs as the VMM's backend would use them.

use std::alloc::Layout;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::ptr::{null, null_mut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hvf_on_kvm::applevisor_sys::{
    HV_MEMORY_EXEC, HV_MEMORY_READ, HV_MEMORY_WRITE, hv_error_t, hv_exit_reason_t,
    hv_gic_config_create, hv_gic_config_set_distributor_base, hv_gic_config_set_redistributor_base,
    hv_gic_create, hv_reg_t, hv_return_t, hv_sys_reg_t, hv_vcpu_create, hv_vcpu_destroy,
    hv_vcpu_exit_t, hv_vcpu_get_reg, hv_vcpu_get_sys_reg, hv_vcpu_run, hv_vcpu_set_reg,
    hv_vcpu_set_sys_reg, hv_vm_config_create, hv_vm_config_get_max_ipa_size,
    hv_vm_config_set_ipa_size, hv_vm_create, hv_vm_destroy, hv_vm_map, hv_vm_unmap, os_release,
};

/// Where things are in the guest, as the VMM has them.
pub(crate) const DISTRIBUTOR: u64 = 0x0800_0000;
pub(crate) const REDISTRIBUTORS: u64 = 0x1000_0000;
pub(crate) const RAM: u64 = 0x4000_0000;
pub(crate) const RAM_SIZE: usize = 2 << 20;
/// Exception vectors, in RAM.
pub(crate) const VECTORS: u64 = RAM + 0x1_0000;

pub(crate) const ALL: u64 = HV_MEMORY_READ | HV_MEMORY_WRITE | HV_MEMORY_EXEC;

/// A guest's program, as machine code that runs anywhere.
#[macro_export]
macro_rules! program {
    ($($line:literal)+) => {{
        let (start, end): (*const u8, *const u8);
        // SAFETY: takes the addresses of code that is jumped over, and reads it.
        unsafe {
            std::arch::asm!(
                "adr {start}, 2f", "adr {end}, 3f", "b 3f", "2:", $($line,)+ "3:",
                start = out(reg) start, end = out(reg) end, options(nomem, nostack),
            );
            std::slice::from_raw_parts(start, end.offset_from_unsigned(start))
        }
    }};
}

#[track_caller]
pub(crate) fn done(code: hv_return_t) {
    assert_eq!(code, 0, "{:#x}", code.cast_unsigned());
}

/// Memory of the host's, zeroed.
pub(crate) struct Memory(*mut u8, Layout);

impl Memory {
    pub(crate) fn new(size: usize) -> Self {
        // Pages of the framework's are larger than Linux's.
        let layout = Layout::from_size_align(size, RAM_SIZE).expect("a size and a power of two");
        // SAFETY: it has a size.
        let at = unsafe { std::alloc::alloc_zeroed(layout) };
        assert!(!at.is_null());
        Self(at, layout)
    }

    pub(crate) fn put(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.1.size());
        // SAFETY: there is room, and no guest runs now.
        unsafe {
            let place = self.0.add(offset);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len());
        }
    }

    pub(crate) fn at(&self) -> *const c_void {
        self.0.cast()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, and no guest has it any more.
        unsafe { std::alloc::dealloc(self.0, self.1) };
    }
}

/// The process's VM. Tests take turns with it.
pub(crate) struct Vm {
    pub(crate) memory: Memory,
    _turn: MutexGuard<'static, ()>,
}

impl Vm {
    /// One whose program is at the start of RAM.
    pub(crate) fn new(program: &[u8]) -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = Memory::new(RAM_SIZE);
        memory.put(0, program);
        // SAFETY: pointers to what is there, objects that exist, and memory that outlives the VM.
        unsafe {
            let config = hv_vm_config_create();
            let mut bits = 0;
            done(hv_vm_config_get_max_ipa_size(&raw mut bits));
            done(hv_vm_config_set_ipa_size(config, bits));
            done(hv_vm_create(config));
            os_release(config);
            let gic = hv_gic_config_create();
            done(hv_gic_config_set_distributor_base(gic, DISTRIBUTOR));
            done(hv_gic_config_set_redistributor_base(gic, REDISTRIBUTORS));
            done(hv_gic_create(gic));
            os_release(gic);
            done(hv_vm_map(memory.at(), RAM, RAM_SIZE, ALL));
        }
        Self {
            memory,
            _turn: turn,
        }
    }

    /// Puts a program where an exception of EL1 goes: at this offset of its vectors.
    pub(crate) fn vector(&self, offset: u64, program: &[u8]) {
        self.memory.put((VECTORS - RAM + offset) as usize, program);
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // SAFETY: takes no pointers.
        let codes = unsafe { [hv_vm_unmap(RAM, RAM_SIZE), hv_vm_destroy()] };
        // While nobody else has one.
        // SAFETY: takes no pointers.
        let again = unsafe { hv_vm_destroy() };
        if !std::thread::panicking() {
            codes.into_iter().for_each(done);
            assert_eq!(again, (hv_error_t::HV_NO_DEVICE as u32).cast_signed());
        }
    }
}

/// A vCPU; it stays on its thread.
pub(crate) struct Vcpu {
    pub(crate) id: u64,
    exit: *const hv_vcpu_exit_t,
    _here: PhantomData<*const ()>,
}

impl Vcpu {
    /// One of this affinity, at the start of RAM.
    pub(crate) fn new(affinity: u64) -> Self {
        let (mut id, mut exit) = (0, null());
        // SAFETY: the pointers take values.
        done(unsafe { hv_vcpu_create(&raw mut id, &raw mut exit, null_mut()) });
        let vcpu = Self {
            id,
            exit,
            _here: PhantomData,
        };
        vcpu.set_sys(hv_sys_reg_t::MPIDR_EL1, 1 << 31 | affinity);
        vcpu.set(hv_reg_t::PC, RAM);
        vcpu
    }

    pub(crate) fn get(&self, register: hv_reg_t) -> u64 {
        let mut value = 0;
        // SAFETY: the pointer takes a value.
        done(unsafe { hv_vcpu_get_reg(self.id, register, &raw mut value) });
        value
    }

    pub(crate) fn set(&self, register: hv_reg_t, value: u64) {
        // SAFETY: takes no pointers.
        done(unsafe { hv_vcpu_set_reg(self.id, register, value) });
    }

    pub(crate) fn get_sys(&self, register: hv_sys_reg_t) -> u64 {
        let mut value = 0;
        // SAFETY: the pointer takes a value.
        done(unsafe { hv_vcpu_get_sys_reg(self.id, register, &raw mut value) });
        value
    }

    pub(crate) fn set_sys(&self, register: hv_sys_reg_t, value: u64) {
        // SAFETY: takes no pointers.
        done(unsafe { hv_vcpu_set_sys_reg(self.id, register, value) });
    }

    pub(crate) fn run(&self) -> hv_vcpu_exit_t {
        // SAFETY: the vCPU exists, and with it what its exits are told in.
        unsafe {
            done(hv_vcpu_run(self.id));
            self.exit.read()
        }
    }

    /// Runs to the guest's next HVC.
    pub(crate) fn run_to_call(&self) {
        let exit = self.run();
        assert_eq!(class(&exit), Some(0x16), "{exit:x?}");
    }

    /// Runs to the guest's next load or store in device memory.
    pub(crate) fn run_to_access(&self) -> Access {
        let exit = self.run();
        assert_eq!(class(&exit), Some(0x24), "{exit:x?}");
        let syndrome = exit.exception.syndrome;
        // What it does is told, and that nothing was mapped there.
        assert_eq!(syndrome >> 24 & 1, 1, "{exit:x?}");
        assert_eq!(syndrome & 0x3c, 0x04, "{exit:x?}");
        Access {
            address: exit.exception.physical_address,
            size: 1 << (syndrome >> 22 & 3),
            register: REGISTERS[(syndrome >> 16 & 31) as usize],
            write: syndrome >> 6 & 1 == 1,
        }
    }

    /// Goes on behind an instruction that was carried out for the guest.
    pub(crate) fn skip(&self) {
        self.set(hv_reg_t::PC, self.get(hv_reg_t::PC) + 4);
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // SAFETY: takes no pointers.
        let code = unsafe { hv_vcpu_destroy(self.id) };
        if !std::thread::panicking() {
            done(code);
        }
    }
}

/// The exception's class, if there was one.
fn class(exit: &hv_vcpu_exit_t) -> Option<u64> {
    (exit.reason == hv_exit_reason_t::EXCEPTION).then_some(exit.exception.syndrome >> 26)
}

/// A load or a store.
pub(crate) struct Access {
    pub(crate) address: u64,
    pub(crate) size: usize,
    pub(crate) register: hv_reg_t,
    pub(crate) write: bool,
}

/// The general registers by number.
pub(crate) const REGISTERS: [hv_reg_t; 31] = {
    use hv_reg_t::*;
    [
        X0, X1, X2, X3, X4, X5, X6, X7, X8, X9, X10, X11, X12, X13, X14, X15, X16, X17, X18, X19,
        X20, X21, X22, X23, X24, X25, X26, X27, X28, X29, X30,
    ]
};
