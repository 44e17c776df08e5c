//! What a VM's devices work on: one thread for those that never block, and one for each of the others.

use crate::devices::virtio::DEVICES;
use crate::devices::virtio::block::DISK;
use crate::error::Error;
use crate::jail::Filter;
use crate::sys::reactor::{Reactor, ReactorHandle};

/// Reactors of a VM. They begin when it does: until then each device that goes on from a snapshot is
/// seated without asking another thread.
#[derive(Debug)]
pub(super) struct Reactors {
    shared: Reactor,
    own: Vec<Reactor>,
}

impl Reactors {
    pub(super) fn new() -> Result<Self, Error> {
        Ok(Self {
            shared: reactor("devices", &DEVICES)?,
            own: Vec::new(),
        })
    }

    /// Where devices work that never block.
    pub(super) fn shared(&self) -> ReactorHandle {
        self.shared.handle()
    }

    /// A reactor for a device whose backend may block.
    pub(super) fn own(&mut self, device: &str) -> Result<ReactorHandle, Error> {
        let own = reactor(device, &DISK)?;
        let handle = own.handle();
        self.own.push(own);
        Ok(handle)
    }

    pub(super) fn begin(&self) {
        self.shared.begin();
        self.own.iter().for_each(Reactor::begin);
    }
}

fn reactor(name: &str, filter: &'static Filter) -> Result<Reactor, Error> {
    Reactor::new(name, filter).map_err(|source| Error::Thread {
        name: name.into(),
        source,
    })
}
