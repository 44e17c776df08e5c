//! vCPUs: the run call, what its exits mean, kicks.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};

use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::VcpuFd;

use super::arch::{self, VcpuState};
use crate::arch::VcpuSetup;
use crate::hypervisor::{Fault, HypervisorError, KICK, Kicker, Vcpu, VcpuExit, VcpuSeed};

/// A vCPU that has not been bound.
#[derive(Debug)]
pub struct KvmSeed {
    // First, so that no kick can reach the run page once it goes.
    target: Registered,
    fd: VcpuFd,
    extent: Arc<arch::Extent>,
}

impl KvmSeed {
    pub(super) fn new(mut fd: VcpuFd, extent: Arc<arch::Extent>) -> Self {
        let run: *mut kvm_run = fd.get_kvm_run();
        let target = Target {
            run: Some(RunPage(run)),
            thread: None,
        };
        Self {
            target: Registered(KvmKicker {
                target: Arc::new(Mutex::new(target)),
            }),
            fd,
            extent,
        }
    }
}

impl VcpuSeed for KvmSeed {
    type Vcpu = KvmVcpu;
    type Kicker = KvmKicker;

    fn kicker(&self) -> KvmKicker {
        self.target.0.clone()
    }

    fn bind(self) -> Result<KvmVcpu, HypervisorError> {
        install_handler()?;
        // SAFETY: pthread_self has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        self.target.0.lock().thread = Some(thread);
        Ok(KvmVcpu {
            _target: self.target,
            fd: self.fd,
            extent: self.extent,
        })
    }
}

/// The kicker of a vCPU that exists; disarmed when dropped.
#[derive(Debug)]
struct Registered(KvmKicker);

impl Drop for Registered {
    fn drop(&mut self) {
        *self.0.lock() = Target {
            run: None,
            thread: None,
        };
    }
}

/// A vCPU on its thread.
#[derive(Debug)]
pub struct KvmVcpu {
    // First, as in the seed.
    _target: Registered,
    fd: VcpuFd,
    extent: Arc<arch::Extent>,
}

impl KvmVcpu {
    /// Has KVM finish the instruction of the last exit, and come out before the next.
    fn complete_exit(&mut self) -> Result<(), HypervisorError> {
        self.fd.set_kvm_immediate_exit(1);
        let result = self.fd.run().map(|_| ());
        self.fd.set_kvm_immediate_exit(0);
        match result {
            Err(error) if !matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                Err(super::call("KVM_RUN")(error))
            }
            _ => Ok(()),
        }
    }
}

impl Vcpu for KvmVcpu {
    type Setup = VcpuSetup;
    type State = VcpuState;

    fn boot(&mut self, setup: &VcpuSetup) -> Result<(), HypervisorError> {
        arch::boot(&self.fd, setup)
    }

    fn save(&mut self) -> Result<VcpuState, HypervisorError> {
        self.complete_exit()?;
        arch::save_vcpu(&self.fd, &self.extent)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), HypervisorError> {
        arch::restore_vcpu(&self.fd, state, &self.extent)
    }

    fn resumed(&mut self) {
        arch::resumed(&self.fd);
    }

    fn run(&mut self) -> VcpuExit<'_> {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        match self.fd.run() {
            Ok(exit) => translate(exit, run),
            Err(error) => match error.errno() {
                libc::EINTR => {
                    // The kick has arrived; one that comes now sets it again.
                    // SAFETY: the run page is mapped as long as the descriptor is open.
                    unsafe { immediate_exit(run) }.store(0, Ordering::SeqCst);
                    VcpuExit::Kicked
                }
                // A processor that waits to be started was woken for something else.
                libc::EAGAIN => VcpuExit::Kicked,
                _ => VcpuExit::Fault(Fault::Run {
                    error: error.to_string(),
                }),
            },
        }
    }
}

fn translate(exit: kvm_ioctls::VcpuExit<'_>, run: *const kvm_run) -> VcpuExit<'_> {
    use kvm_ioctls::VcpuExit as Kvm;
    let unexpected = |what: &str| VcpuExit::Fault(Fault::Unexpected { what: what.into() });
    match exit {
        Kvm::MmioRead(address, data) => VcpuExit::MmioRead { address, data },
        Kvm::MmioWrite(address, data) => VcpuExit::MmioWrite { address, data },
        Kvm::IoIn(port, data) => VcpuExit::PioRead {
            port,
            size: port_width(run),
            data,
        },
        Kvm::IoOut(port, data) => VcpuExit::PioWrite {
            port,
            size: port_width(run),
            data,
        },
        Kvm::Shutdown => VcpuExit::Shutdown,
        Kvm::Intr | Kvm::IrqWindowOpen => VcpuExit::Kicked,
        Kvm::SystemEvent(event, _) => match event {
            KVM_SYSTEM_EVENT_SHUTDOWN => VcpuExit::SystemOff,
            KVM_SYSTEM_EVENT_RESET => VcpuExit::SystemReset,
            KVM_SYSTEM_EVENT_CRASH => unexpected("SystemEvent(crash)"),
            other => VcpuExit::Fault(Fault::Unexpected {
                what: format!("SystemEvent({other})"),
            }),
        },
        Kvm::FailEntry(reason, _) => VcpuExit::Fault(Fault::EntryFailed { reason }),
        Kvm::InternalError => {
            // SAFETY: `run` points to this vCPU's run page, mapped as long as its descriptor is
            // open, and its exit reason says which field of the union is meant.
            let internal = unsafe { (*run).__bindgen_anon_1.internal };
            let details = internal
                .data
                .iter()
                .take(internal.ndata as usize)
                .copied()
                .collect();
            VcpuExit::Fault(Fault::Emulation {
                suberror: internal.suberror,
                details,
            })
        }
        Kvm::MemoryFault { gpa, size, .. } => VcpuExit::Fault(Fault::Memory { address: gpa, size }),
        Kvm::Unsupported(number) => VcpuExit::Fault(arch::other_exit(number, run)),
        other => VcpuExit::Fault(Fault::Unexpected {
            what: format!("{other:?}"),
        }),
    }
}

/// Bytes in one access of the port exit that `run` holds. A string instruction makes many at once.
fn port_width(run: *const kvm_run) -> usize {
    // SAFETY: as in `translate`: the run page is mapped, and the exit is a port access.
    let size = unsafe { (*run).__bindgen_anon_1.io.size };
    usize::from(size).max(1)
}

/// Forces a vCPU out of the guest: sets `immediate_exit`, which the next entry looks at, and sends a
/// signal, which ends the current one. Set before sent, neither order of events loses the kick.
#[derive(Clone, Debug)]
pub struct KvmKicker {
    target: Arc<Mutex<Target>>,
}

#[derive(Debug)]
struct Target {
    /// Gone once the vCPU is.
    run: Option<RunPage>,
    /// Known once it is bound.
    thread: Option<libc::pthread_t>,
}

#[derive(Debug)]
struct RunPage(*mut kvm_run);

// SAFETY: the pointer is only used for one atomic byte, under the lock that the vCPU takes to remove
// it before the page is unmapped.
unsafe impl Send for RunPage {}

impl KvmKicker {
    fn lock(&self) -> std::sync::MutexGuard<'_, Target> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kicker for KvmKicker {
    fn kick(&self) {
        let target = self.lock();
        let Some(RunPage(run)) = target.run else {
            return;
        };
        // SAFETY: the page is mapped: the vCPU removes it from the target, under this lock, before
        // it is closed.
        unsafe { immediate_exit(run) }.store(1, Ordering::SeqCst);
        if let Some(thread) = target.thread {
            // SAFETY: the thread lives: its vCPU is dropped on it, and that removes it from here.
            unsafe { libc::pthread_kill(thread, KICK) };
        }
    }
}

/// The flag that makes the next entry return at once. Two threads touch it, hence atomic.
///
/// # Safety
/// `run` is a mapped run page for as long as the answer is used.
unsafe fn immediate_exit<'a>(run: *mut kvm_run) -> &'a AtomicU8 {
    // SAFETY: the caller keeps the page mapped, and every access to the byte is atomic.
    unsafe { AtomicU8::from_ptr(&raw mut (*run).immediate_exit) }
}

extern "C" fn on_kick(_: libc::c_int) {}

/// Gives the kick signal a handler, once, and lets it through on this thread.
fn install_handler() -> Result<(), HypervisorError> {
    static ONCE: Once = Once::new();
    // SAFETY: the handler does nothing, and without SA_RESTART it only ends the system call it
    // meets; all structures are initialised.
    unsafe {
        ONCE.call_once(|| {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_kick as *const () as libc::sighandler_t;
            libc::sigemptyset(&raw mut action.sa_mask);
            // Cannot fail: the signal exists and may be caught.
            libc::sigaction(KICK, &raw const action, std::ptr::null_mut());
        });
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, KICK);
        let result = libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        if result != 0 {
            let source = std::io::Error::from_raw_os_error(result);
            return Err(HypervisorError::Call {
                call: "pthread_sigmask",
                source,
            });
        }
    }
    Ok(())
}
