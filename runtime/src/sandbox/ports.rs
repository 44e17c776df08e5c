//! Which console ports carry whose stdio.
//!
//! A port's number may be used again when both sides have closed it.

use std::collections::BTreeMap;

use super::error::Error;

/// The console ports of a machine from the first that carries stdio to its last.
#[derive(Debug)]
pub(super) struct Ports {
    first: u32,
    last: u32,
    /// Ports in use by at least one side.
    used: BTreeMap<u32, Use>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Use {
    host: bool,
    guest: bool,
}

impl Ports {
    /// `last` is the highest port number of the console device.
    pub(super) fn new(first: u32, last: u32) -> Self {
        Self {
            first,
            last,
            used: BTreeMap::new(),
        }
    }

    /// Takes the lowest free port for the host.
    pub(super) fn take(&mut self) -> Result<u32, Error> {
        let free = (self.first..=self.last).find(|port| !self.used.contains_key(port));
        let port = free.ok_or(Error::NoFreePort {
            total: (self.last + 1).saturating_sub(self.first),
        })?;
        self.used.insert(
            port,
            Use {
                host: true,
                guest: false,
            },
        );
        Ok(port)
    }

    /// The guest opened the port. Numbers that nobody was given are ignored: guests may say
    /// anything.
    pub(super) fn guest_opened(&mut self, port: u32) {
        if let Some(entry) = self.used.get_mut(&port) {
            entry.guest = true;
        }
    }

    pub(super) fn guest_closed(&mut self, port: u32) {
        self.change(port, |entry| entry.guest = false);
    }

    pub(super) fn host_closed(&mut self, port: u32) {
        self.change(port, |entry| entry.host = false);
    }

    fn change(&mut self, port: u32, change: impl FnOnce(&mut Use)) {
        if let Some(entry) = self.used.get_mut(&port) {
            change(entry);
            if !entry.host && !entry.guest {
                self.used.remove(&port);
            }
        }
    }
}
