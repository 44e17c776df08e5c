//! `hv_gic_*`: the interrupt controller, KVM's GICv3.

use std::ffi::c_void;
use std::iter::once;

use applevisor_sys::hv_error_t::{HV_BAD_ARGUMENT, HV_BUSY, HV_NO_DEVICE};
use applevisor_sys::{
    hv_gic_config_t, hv_gic_icc_reg_t, hv_gic_intid_t, hv_gic_state_t, hv_ipa_t, hv_return_t,
    hv_vcpu_t,
};
use kvm_bindings::{
    KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI, KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_DIST_REGS, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
    KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT, KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::{DeviceFd, VmFd};

use crate::vcpu::with;
use crate::world::{Answer, Machine, Object, code, refused, with_vm, write};

/// As the framework of macOS 15 has them.
const DISTRIBUTOR: usize = 0x1_0000;
const REDISTRIBUTOR: usize = 0x2_0000;
const REDISTRIBUTORS: usize = 0x200_0000;
const FIRST_SHARED: u32 = 32;
/// As many as KVM has: the framework has 28 more.
const INTERRUPTS: u32 = 992;
const SHARED: u32 = INTERRUPTS - FIRST_SHARED;

#[derive(Debug)]
pub(crate) struct Gic {
    device: DeviceFd,
    /// It is complete: all vCPUs are known.
    ready: bool,
    /// Levels that were set before.
    early: Vec<(u32, bool)>,
}

/// One of the device's attributes.
#[derive(Clone, Copy, Debug)]
struct Attribute {
    group: u32,
    number: u64,
}

impl Attribute {
    fn new(group: u32, number: u64) -> Self {
        Self { group, number }
    }

    /// Of one vCPU.
    fn of(group: u32, affinity: u64, number: u32) -> Self {
        let vcpu = affinity << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT;
        Self::new(group, vcpu | u64::from(number))
    }
}

impl Gic {
    fn new(vm: &VmFd, distributor: u64, redistributors: u64) -> Answer<Self> {
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
            ..Default::default()
        };
        let gic = Self {
            device: vm.create_device(&mut device).map_err(refused)?,
            ready: false,
            early: Vec::new(),
        };
        let address = |kind| Attribute::new(KVM_DEV_ARM_VGIC_GRP_ADDR, u64::from(kind));
        gic.set(address(KVM_VGIC_V3_ADDR_TYPE_DIST), &distributor)?;
        gic.set(address(KVM_VGIC_V3_ADDR_TYPE_REDIST), &redistributors)?;
        gic.set(Attribute::new(KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0), &INTERRUPTS)?;
        Ok(gic)
    }

    /// `T` is what the group's attributes are: `u32`, or `u64` for addresses and the CPU interface.
    fn set<T>(&self, attribute: Attribute, value: &T) -> Answer {
        let attribute = kvm_device_attr {
            group: attribute.group,
            attr: attribute.number,
            addr: std::ptr::from_ref(value).expose_provenance() as u64,
            ..Default::default()
        };
        self.device.set_device_attr(&attribute).map_err(refused)
    }

    fn get<T: Default>(&self, attribute: Attribute) -> Answer<T> {
        let mut value = T::default();
        let mut attribute = kvm_device_attr {
            group: attribute.group,
            attr: attribute.number,
            addr: (&raw mut value).expose_provenance() as u64,
            ..Default::default()
        };
        // SAFETY: there is room for the value.
        unsafe { self.device.get_device_attr(&mut attribute) }.map_err(refused)?;
        Ok(value)
    }
}

impl Machine {
    /// The interrupt controller, complete from now on.
    pub(crate) fn ready_gic(&mut self) -> Answer<&Gic> {
        let gic = self.gic.as_mut().ok_or(HV_NO_DEVICE)?;
        if !gic.ready {
            let init = u64::from(KVM_DEV_ARM_VGIC_CTRL_INIT);
            gic.set(Attribute::new(KVM_DEV_ARM_VGIC_GRP_CTRL, init), &0_u64)?;
            gic.ready = true;
            for (interrupt, level) in std::mem::take(&mut gic.early) {
                set_level(&self.fd, interrupt, level)?;
            }
        }
        Ok(gic)
    }

    pub(crate) fn gic_is_ready(&self) -> bool {
        self.gic.as_ref().is_some_and(|gic| gic.ready)
    }
}

fn set_level(vm: &VmFd, interrupt: u32, level: bool) -> Answer {
    let line = KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | interrupt;
    vm.set_irq_line(line, level).map_err(refused)
}

/// All that it holds beside the CPU interfaces, each of 32 bits, in the order it is written: what an
/// interrupt is before that it is pending (GICv3 Architecture Specification, "The Distributor
/// register map"; Documentation/virt/kvm/devices/arm-vgic-v3.rst).
fn state(affinities: &[u64]) -> Vec<Attribute> {
    const CTLR: u32 = 0;
    /// Where these begin, and bits for each interrupt. The same in a redistributor's second frame.
    const IGROUPR: (u32, u32) = (0x80, 1);
    const ISENABLER: (u32, u32) = (0x100, 1);
    const ISPENDR: (u32, u32) = (0x200, 1);
    const ISACTIVER: (u32, u32) = (0x300, 1);
    const IPRIORITYR: (u32, u32) = (0x400, 8);
    const ICFGR: (u32, u32) = (0xc00, 2);
    const IROUTER: (u32, u32) = (0x6000, 64);
    const FRAME: u32 = 0x1_0000;

    /// Offsets of the registers for interrupts from `first` to `end`.
    fn registers((base, bits): (u32, u32), first: u32, end: u32) -> impl Iterator<Item = u32> {
        (base + first * bits / 8..base + end * bits / 8).step_by(4)
    }

    let distributor = |number| {
        let group = KVM_DEV_ARM_VGIC_GRP_DIST_REGS;
        Attribute::new(group, u64::from(number))
    };
    let shared = |kind| registers(kind, FIRST_SHARED, INTERRUPTS).map(distributor);
    let routes = registers(IROUTER, FIRST_SHARED, FIRST_SHARED + SHARED).map(distributor);
    // A redistributor's, each for all vCPUs.
    let private = |kind| {
        registers(kind, 0, FIRST_SHARED).flat_map(move |number| {
            affinities.iter().map(move |affinity| {
                let group = KVM_DEV_ARM_VGIC_GRP_REDIST_REGS;
                Attribute::of(group, *affinity, FRAME + number)
            })
        })
    };
    // Levels by 32 interrupts; those of the shared ones are any vCPU's.
    let levels = affinities.iter().enumerate().flat_map(|(index, affinity)| {
        let end = if index == 0 { INTERRUPTS } else { FIRST_SHARED };
        (0..end)
            .step_by(32)
            .map(|first| Attribute::of(KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, *affinity, first))
    });

    let mut all: Vec<Attribute> = once(distributor(CTLR)).chain(routes).collect();
    for kind in [IGROUPR, ICFGR, IPRIORITYR, ISENABLER] {
        all.extend(private(kind).chain(shared(kind)));
    }
    all.extend(levels);
    for kind in [ISPENDR, ISACTIVER] {
        all.extend(private(kind).chain(shared(kind)));
    }
    all
}

impl Machine {
    fn gic_state(&mut self) -> Answer<Vec<u8>> {
        let affinities = self.affinities();
        let gic = self.ready_gic()?;
        let mut blob = Vec::new();
        for attribute in state(&affinities) {
            blob.extend(gic.get::<u32>(attribute)?.to_le_bytes());
        }
        Ok(blob)
    }

    fn set_gic_state(&mut self, blob: &[u8]) -> Answer {
        let affinities = self.affinities();
        let gic = self.ready_gic()?;
        let attributes = state(&affinities);
        let (values, rest) = blob.as_chunks();
        if values.len() != attributes.len() || !rest.is_empty() {
            return Err(HV_BAD_ARGUMENT);
        }
        for (attribute, value) in attributes.into_iter().zip(values) {
            gic.set(attribute, &u32::from_le_bytes(*value))?;
        }
        Ok(())
    }

    fn affinities(&self) -> Vec<u64> {
        let mut all: Vec<u64> = self.vcpus.values().map(|vcpu| vcpu.affinity).collect();
        all.sort_unstable();
        all
    }
}

#[unsafe(no_mangle)]
extern "C" fn hv_gic_config_create() -> hv_gic_config_t {
    Object::GicConfig(0, 0).give()
}

/// # Safety
/// `config` exists.
unsafe fn place(
    config: hv_gic_config_t,
    at: hv_ipa_t,
    alignment: usize,
    choose: impl FnOnce(&mut u64, &mut u64, u64),
) -> hv_return_t {
    // SAFETY: the caller's word.
    match unsafe { Object::at(config) } {
        Object::GicConfig(distributor, redistributors) if at.is_multiple_of(alignment as u64) => {
            choose(distributor, redistributors, at);
            code(Ok(()))
        }
        _ => code(Err(HV_BAD_ARGUMENT)),
    }
}

/// # Safety
/// `config` exists.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_config_set_distributor_base(
    config: hv_gic_config_t,
    at: hv_ipa_t,
) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe { place(config, at, DISTRIBUTOR, |place, _, at| *place = at) }
}

/// # Safety
/// `config` exists.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_config_set_redistributor_base(
    config: hv_gic_config_t,
    at: hv_ipa_t,
) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe { place(config, at, 0x1_0000, |_, place, at| *place = at) }
}

/// # Safety
/// `config` exists.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_create(config: hv_gic_config_t) -> hv_return_t {
    // SAFETY: the caller's word.
    let Object::GicConfig(distributor, redistributors) = *(unsafe { Object::at(config) }) else {
        return code(Err(HV_BAD_ARGUMENT));
    };
    code(with_vm(|vm| {
        // A vCPU that exists would have no redistributor.
        if vm.gic.is_some() || vm.made > 0 {
            return Err(HV_BUSY);
        }
        vm.gic = Some(Gic::new(&vm.fd, distributor, redistributors)?);
        Ok(())
    }))
}

#[unsafe(no_mangle)]
extern "C" fn hv_gic_set_spi(interrupt: u32, level: bool) -> hv_return_t {
    code(with_vm(|vm| {
        let gic = vm.gic.as_mut().ok_or(HV_NO_DEVICE)?;
        if !(FIRST_SHARED..FIRST_SHARED + SHARED).contains(&interrupt) {
            return Err(HV_BAD_ARGUMENT);
        }
        if gic.ready {
            return set_level(&vm.fd, interrupt, level);
        }
        gic.early.push((interrupt, level));
        Ok(())
    }))
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_distributor_size(size: *mut usize) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe { write(size, Ok(DISTRIBUTOR)) }
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_redistributor_size(size: *mut usize) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe { write(size, Ok(REDISTRIBUTOR)) }
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_redistributor_region_size(size: *mut usize) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe { write(size, Ok(REDISTRIBUTORS)) }
}

/// # Safety
/// The pointers take values.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_spi_interrupt_range(
    base: *mut u32,
    count: *mut u32,
) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe {
        write(base, Ok(FIRST_SHARED));
        write(count, Ok(SHARED))
    }
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_intid(which: hv_gic_intid_t, number: *mut u32) -> hv_return_t {
    // SAFETY: the caller's word.
    unsafe { write(number, Ok(which as u32)) }
}

/// Null while a vCPU runs: KVM says nothing then.
#[unsafe(no_mangle)]
extern "C" fn hv_gic_state_create() -> hv_gic_state_t {
    with_vm(Machine::gic_state).map_or(std::ptr::null_mut(), |blob| Object::GicState(blob).give())
}

/// # Safety
/// `state` exists, and the pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_state_get_size(state: hv_gic_state_t, size: *mut usize) -> hv_return_t {
    // SAFETY: the caller's word.
    let size_of = match unsafe { Object::at(state) } {
        Object::GicState(blob) => Ok(blob.len()),
        _ => Err(HV_BAD_ARGUMENT),
    };
    // SAFETY: the caller's word.
    unsafe { write(size, size_of) }
}

/// # Safety
/// `state` exists, and the pointer takes as many bytes as it has.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_state_get_data(
    state: hv_gic_state_t,
    data: *mut c_void,
) -> hv_return_t {
    // SAFETY: the caller's word.
    let Object::GicState(blob) = (unsafe { Object::at(state) }) else {
        return code(Err(HV_BAD_ARGUMENT));
    };
    // SAFETY: the caller has made room for what `hv_gic_state_get_size` told.
    unsafe { std::ptr::copy_nonoverlapping(blob.as_ptr(), data.cast(), blob.len()) };
    code(Ok(()))
}

/// # Safety
/// The pointer has `size` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_set_state(data: *const c_void, size: usize) -> hv_return_t {
    // SAFETY: the caller's word.
    let blob = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), size) };
    code(with_vm(|vm| vm.set_gic_state(blob)))
}

/// A CPU interface's register; KVM's number of it is its encoding too.
fn interface(affinity: u64, register: hv_gic_icc_reg_t) -> Attribute {
    let group = KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS;
    Attribute::of(group, affinity, register as u32)
}

/// # Safety
/// The pointer takes a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_icc_reg(
    id: hv_vcpu_t,
    register: hv_gic_icc_reg_t,
    value: *mut u64,
) -> hv_return_t {
    let found = with(id, |vm, _| {
        let affinity = vm.affinity(id)?;
        vm.ready_gic()?.get(interface(affinity, register))
    });
    // SAFETY: the caller's word.
    unsafe { write(value, found) }
}

#[unsafe(no_mangle)]
extern "C" fn hv_gic_set_icc_reg(
    id: hv_vcpu_t,
    register: hv_gic_icc_reg_t,
    value: u64,
) -> hv_return_t {
    code(with(id, |vm, _| {
        let affinity = vm.affinity(id)?;
        vm.ready_gic()?.set(interface(affinity, register), &value)
    }))
}
