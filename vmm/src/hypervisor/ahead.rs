//! A VM that is made before it is asked for.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use super::{Caps, Hypervisor, HypervisorError};
use crate::sys::threads;

/// A hypervisor whose first VM is under way. KVM makes one in a grace period of its host's kernel
/// (RCU), some 10 ms of waiting: a thread waits, while its owner learns what VM it is to be, and
/// reads the kernel or the snapshot it is made from.
pub(crate) struct Ahead<H: Hypervisor> {
    hypervisor: Arc<H>,
    first: Mutex<Option<Making<H>>>,
}

type Making<H> = JoinHandle<Result<<H as Hypervisor>::Vm, HypervisorError>>;

impl<H> Ahead<H>
where
    H: Hypervisor<Vm: Send> + Send + Sync + 'static,
{
    /// Begins to make the first VM; the thread that does it runs when this returns. On a busy host
    /// it might else be kept waiting by its starter, which has more to do, and then wait anew.
    pub(crate) fn begin(hypervisor: H) -> Self {
        let hypervisor = Arc::new(hypervisor);
        let maker = Arc::clone(&hypervisor);
        let (begun, runs) = mpsc::channel::<Infallible>();
        let making = threads::builder("make-vm").spawn(move || {
            drop(begun);
            maker.create_vm()
        });
        // Nothing is sent: it ends when the other side is dropped, as it is where there is no thread.
        let _ = runs.recv();
        Self {
            hypervisor,
            // Without a thread it is made when it is asked for.
            first: Mutex::new(making.ok()),
        }
    }
}

impl<H> Hypervisor for Ahead<H>
where
    H: Hypervisor<Vm: Send> + Send + Sync + 'static,
{
    type Vm = H::Vm;
    type Cpu = H::Cpu;

    fn open() -> Result<Self, HypervisorError> {
        H::open().map(Self::begin)
    }

    fn caps(&self) -> &Caps<H::Cpu> {
        self.hypervisor.caps()
    }

    fn create_vm(&self) -> Result<H::Vm, HypervisorError> {
        let first = self
            .first
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match first.map(JoinHandle::join) {
            Some(Ok(made)) => made,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => self.hypervisor.create_vm(),
        }
    }
}
