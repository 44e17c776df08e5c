//! A VM that is made before it is asked for.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Caps, Hypervisor, HypervisorError};
use crate::sys::threads;

/// A hypervisor whose first VM is under way. KVM makes one in a grace period of its host's kernel
/// (RCU), some 10 ms of waiting: a thread waits, while its owner learns what VM it is to be, and
/// reads the kernel or the snapshot it is made from.
pub(crate) struct Ahead<H: Hypervisor> {
    hypervisor: Arc<H>,
    first: Mutex<Option<Making<H>>>,
}

/// How long the starter waits at most before it goes on. A kernel thread of the VM's own waits for
/// the grace period, from when it first runs. On a host with one processor it would else run after
/// all that the starter does and starts, and miss a tick.
const HEAD_START: Duration = Duration::from_micros(500);

type Making<H> = JoinHandle<Result<<H as Hypervisor>::Vm, HypervisorError>>;

impl<H> Ahead<H>
where
    H: Hypervisor<Vm: Send> + Send + Sync + 'static,
{
    /// One whose first VM is made when it is asked for, unless that has begun.
    pub(crate) fn new(hypervisor: H) -> Self {
        Self {
            hypervisor: Arc::new(hypervisor),
            first: Mutex::default(),
        }
    }

    /// Begins to make the first VM, and goes on when it is made or has had its [`HEAD_START`].
    pub(crate) fn begin(&mut self) {
        let maker = Arc::clone(&self.hypervisor);
        let (ended, end) = mpsc::channel::<Infallible>();
        let making = threads::builder("make-vm").spawn(move || {
            let made = maker.create_vm();
            drop(ended);
            made
        });
        // Nothing is sent: it ends when the other side is dropped, as it is where there is no thread.
        let _ = end.recv_timeout(HEAD_START);
        // Without a thread it is made when it is asked for.
        self.first = Mutex::new(making.ok());
    }
}

impl<H> Hypervisor for Ahead<H>
where
    H: Hypervisor<Vm: Send> + Send + Sync + 'static,
{
    type Vm = H::Vm;
    type Cpu = H::Cpu;

    fn open() -> Result<Self, HypervisorError> {
        H::open().map(Self::new)
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

impl<H: Hypervisor> Drop for Ahead<H> {
    /// Waits for a VM that nobody has asked for, and gives it up: some hosts give a process one.
    fn drop(&mut self) {
        let first = self.first.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(making) = first.take() {
            // A panic was reported by the panic hook.
            let _ = making.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread::{self, ThreadId};

    use super::*;
    use crate::hypervisor::fake::{Fake, FakeVm};

    /// Remembers the threads that asked for VMs; refuses the first where it is to.
    struct Host {
        fake: Fake,
        refuses: bool,
        askers: Mutex<Vec<ThreadId>>,
    }

    impl Host {
        fn new(refuses: bool) -> Self {
            Self {
                fake: Fake::new(Vec::new()),
                refuses,
                askers: Mutex::default(),
            }
        }
    }

    impl Hypervisor for Host {
        type Vm = FakeVm;
        type Cpu = <Fake as Hypervisor>::Cpu;

        fn open() -> Result<Self, HypervisorError> {
            Ok(Self::new(false))
        }

        fn caps(&self) -> &Caps<Self::Cpu> {
            self.fake.caps()
        }

        fn create_vm(&self) -> Result<FakeVm, HypervisorError> {
            let mut askers = self.askers.lock().unwrap();
            askers.push(thread::current().id());
            if self.refuses && askers.len() == 1 {
                return Err(HypervisorError::Lacks { capability: "room" });
            }
            self.fake.create_vm()
        }
    }

    #[test]
    fn the_first_vm_is_made_by_another_thread_and_more_by_whoever_asks() {
        let mut host = Ahead::<Host>::open().unwrap();
        host.begin();
        for _ in 0..3 {
            host.create_vm().unwrap();
        }
        let askers = host.hypervisor.askers.lock().unwrap();
        let here: Vec<_> = askers
            .iter()
            .map(|asker| *asker == thread::current().id())
            .collect();
        assert_eq!(here, [false, true, true]);
    }

    #[test]
    fn a_vm_that_nobody_asks_for_is_given_up() {
        let mut host = Ahead::new(Host::new(false));
        host.begin();
        let hypervisor = Arc::clone(&host.hypervisor);
        drop(host);
        assert_eq!(Arc::strong_count(&hypervisor), 1, "its thread has ended");
        assert_eq!(hypervisor.askers.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_refusal_is_told_to_whoever_asks() {
        let mut host = Ahead::new(Host::new(true));
        host.begin();
        let error = host.create_vm().err().map(|error| error.to_string());
        assert!(error.is_some_and(|error| error.contains("room")));
        host.create_vm().unwrap();
    }
}
