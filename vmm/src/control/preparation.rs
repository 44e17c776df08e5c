//! What a VMM process needs that takes its time, made before there is one.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, Receiver};

use super::membership;
use crate::jail;
use crate::sys::threads;

/// What is begun before a VM is wanted, so that its process starts sooner: a network namespace for
/// it, and on Linux a wait that KVM would else begin when it makes the VM. For one process.
#[derive(Debug)]
pub struct Preparation {
    network: Receiver<OwnedFd>,
    end: Receiver<Infallible>,
}

impl Preparation {
    /// Begins, on a thread that ends by itself. What the host refuses is left to the process.
    pub fn begin() -> Self {
        let (sender, network) = mpsc::channel();
        let (ended, end) = mpsc::channel();
        let work = move || {
            match jail::new_network() {
                // Nobody waits for it any more.
                Ok(made) => drop(sender.send(made)),
                Err(error) => tracing::debug!(%error, "no network namespace beforehand"),
            }
            drop(sender);
            membership::begin_wait();
            drop(ended);
        };
        if let Err(error) = threads::builder("prepare").spawn(work) {
            tracing::debug!(%error, "nothing is prepared");
        }
        Self { network, end }
    }

    /// Waits until all is done.
    pub fn wait(&mut self) {
        // Nothing is sent: it ends when the other side is dropped.
        let _ = self.end.recv();
    }

    /// The network namespace, if there is one.
    pub(super) fn into_network(self) -> Option<OwnedFd> {
        self.network.recv().ok()
    }
}
