//! KVM.

#![allow(unsafe_code)]

#[cfg(test)]
#[macro_use]
mod tests;

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod irq;
mod vcpu;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use kvm_bindings::{KVM_API_VERSION, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, VmFd};

use super::{Binding, Caps, Fault, Hypervisor, HypervisorError, VmBackend};
use crate::arch::CpuCaps;
use crate::sys::doorbell::Doorbell;
#[cfg(target_arch = "aarch64")]
use aarch64 as arch;
use arch::{Extent, NEEDED, Platform};
#[cfg(target_arch = "x86_64")]
use x86_64 as arch;

pub(crate) use arch::{RUN_VCPU, SAVE_VCPU, SAVE_VM};
pub use arch::{VcpuState, VmState};
pub use irq::KvmIrqLine;
pub use vcpu::{KvmKicker, KvmSeed, KvmVcpu};

/// Where KVM is.
const DEVICE: &str = "/dev/kvm";

/// The host's KVM.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
    caps: Caps<CpuCaps>,
    extent: Arc<Extent>,
}

impl Kvm {
    /// Opens KVM at a path of the caller's.
    ///
    /// # Errors
    /// Says whether it is absent, forbidden, not KVM, or lacking.
    pub fn open_at(path: &Path) -> Result<Self, HypervisorError> {
        let name = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| HypervisorError::Absent { path: path.into() })?;
        let fd = kvm_ioctls::Kvm::new_with_path(&name)
            .map_err(|error| open_error(path, io::Error::from_raw_os_error(error.errno())))?;
        let found = fd.get_api_version();
        if i64::from(found) != i64::from(KVM_API_VERSION) {
            return Err(HypervisorError::ApiVersion {
                path: path.into(),
                found,
            });
        }
        check_capabilities(|capability| fd.check_extension(capability))?;
        let extent = Arc::new(Extent::read(&fd)?);
        let max_vcpus = u32::try_from(fd.get_max_vcpus()).unwrap_or(u32::MAX);
        let caps = Caps {
            max_vcpus: extent.max_vcpus().min(max_vcpus),
            cpu: arch::cpu_caps(&fd, &extent)?,
        };
        Ok(Self { fd, caps, extent })
    }
}

impl Hypervisor for Kvm {
    type Vm = KvmVm;
    type Cpu = CpuCaps;

    fn open() -> Result<Self, HypervisorError> {
        Self::open_at(Path::new(DEVICE))
    }

    fn caps(&self) -> &Caps<CpuCaps> {
        &self.caps
    }

    fn create_vm(&self) -> Result<KvmVm, HypervisorError> {
        let (fd, platform) = arch::create_vm(&self.fd, &self.extent)?;
        Ok(KvmVm {
            fd: Arc::new(fd),
            platform: Arc::new(platform),
            extent: Arc::clone(&self.extent),
        })
    }
}

/// What an error of opening the device means.
fn open_error(path: &Path, source: io::Error) -> HypervisorError {
    let path = path.into();
    match source.raw_os_error() {
        // ENXIO and ENODEV: the node is there, the module is not.
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV | libc::ENOTDIR) => {
            HypervisorError::Absent { path }
        }
        Some(libc::EACCES | libc::EPERM) => HypervisorError::Forbidden { path, source },
        _ => HypervisorError::Open { path, source },
    }
}

fn check_capabilities(offers: impl Fn(Cap) -> bool) -> Result<(), HypervisorError> {
    match NEEDED
        .into_iter()
        .find(|(capability, _)| !offers(*capability))
    {
        Some((_, name)) => Err(HypervisorError::Lacks { capability: name }),
        None => Ok(()),
    }
}

/// Asks for a VM, again where a signal ended that: KVM gives up what it makes for one that is about
/// something else (`mm_take_all_locks` of the kernel's mm/mmap.c).
fn new_vm(kvm: &kvm_ioctls::Kvm) -> Result<VmFd, HypervisorError> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            made => return made.map_err(call("KVM_CREATE_VM")),
        }
    }
}

/// Names the call that failed.
fn call(name: &'static str) -> impl Fn(kvm_ioctls::Error) -> HypervisorError {
    move |error| HypervisorError::Call {
        call: name,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

/// A VM of KVM.
#[derive(Debug)]
pub struct KvmVm {
    fd: Arc<VmFd>,
    platform: Arc<Platform>,
    extent: Arc<Extent>,
}

impl VmBackend for KvmVm {
    type Seed = KvmSeed;
    type Line = KvmIrqLine;
    type State = VmState;

    unsafe fn map(
        &self,
        slot: u32,
        guest: u64,
        host: *mut u8,
        len: u64,
    ) -> Result<(), HypervisorError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: guest,
            memory_size: len,
            userspace_addr: host as u64,
        };
        // SAFETY: the caller keeps the memory mapped for as long as the slot lives.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(call("KVM_SET_USER_MEMORY_REGION"))
    }

    fn unmap(&self, slot: u32) -> Result<(), HypervisorError> {
        let region = kvm_userspace_memory_region {
            slot,
            ..Default::default()
        };
        // SAFETY: size 0 deletes the slot and names no memory.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(call("KVM_SET_USER_MEMORY_REGION"))
    }

    fn create_vcpu(&self, index: u32) -> Result<KvmSeed, HypervisorError> {
        let fd = self
            .fd
            .create_vcpu(u64::from(index))
            .map_err(call("KVM_CREATE_VCPU"))?;
        self.platform.init_vcpu(&self.fd, &fd, index)?;
        Ok(KvmSeed::new(fd, Arc::clone(&self.extent)))
    }

    fn complete(&self) -> Result<(), HypervisorError> {
        self.platform.complete()
    }

    fn irq_line(&self, pin: u32) -> Result<KvmIrqLine, HypervisorError> {
        KvmIrqLine::new(Arc::clone(&self.fd), Arc::clone(&self.platform), pin)
    }

    fn save(&self) -> Result<VmState, HypervisorError> {
        self.platform.save(&self.fd)
    }

    fn restore(&self, state: &VmState) -> Result<(), HypervisorError> {
        self.platform.restore(&self.fd, state)
    }

    fn bind_doorbell(
        &self,
        address: u64,
        value: u32,
        doorbell: &Doorbell,
    ) -> Result<Binding, HypervisorError> {
        self.fd
            .register_ioevent(doorbell.event(), &IoEventAddress::Mmio(address), value)
            .map_err(call("KVM_IOEVENTFD"))?;
        Ok(Binding::Bound)
    }
}
