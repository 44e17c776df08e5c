//! The host's way to the ports, while the device is active and while it is not.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::metrics::Metrics;
use super::port::Port;
use super::{ATTACH_LIMIT, ConsoleError, PortEnds, PortEvent};
use crate::sys::doorbell::Doorbell;
use crate::sys::reactor::ReactorHandle;

/// What device, worker and handles have in common.
pub(super) struct Shared {
    table: Mutex<Table>,
    /// Rung when `Table::changed` is no longer empty.
    pub(super) doorbell: Doorbell,
    pub(super) metrics: Arc<Metrics>,
    events: Box<dyn Fn(PortEvent) + Send + Sync>,
}

/// The ports, and who waits for what.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) ports: Vec<Port>,
    /// Ports changed by a handle that the worker has not seen to.
    pub(super) changed: BTreeSet<u32>,
    /// Where a worker talks to a driver that has announced itself.
    pub(super) serving: Option<ReactorHandle>,
}

impl Shared {
    pub(super) fn new(
        ports: Vec<Port>,
        doorbell: Doorbell,
        events: Box<dyn Fn(PortEvent) + Send + Sync>,
    ) -> Self {
        let table = Table {
            ports,
            changed: BTreeSet::new(),
            serving: None,
        };
        Self {
            table: Mutex::new(table),
            doorbell,
            metrics: Arc::default(),
            events,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Table> {
        // A panic ends the VM; until then the state is as good as it gets.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver is gone or its queues can't be used: closes what the guest had open.
    pub(super) fn disconnect(&self) {
        let mut table = self.lock();
        table.serving = None;
        let events: Vec<_> = (0..)
            .zip(&mut table.ports)
            .filter_map(|(number, port)| Some(port.reset()?.of(number)))
            .collect();
        drop(table);
        self.report(events);
    }

    /// Reports events; the table must not be locked.
    pub(super) fn report(&self, events: impl IntoIterator<Item = PortEvent>) {
        for event in events {
            tracing::debug!(?event, "Console port");
            (self.events)(event);
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("table", &self.table)
            .finish_non_exhaustive()
    }
}

/// Controls the ports of a console from any thread; clones are the same.
#[derive(Clone, Debug)]
pub struct Handle {
    shared: Arc<Shared>,
}

/// An attachment the driver has not been seen to take note of.
#[derive(Debug)]
#[must_use = "the guest may not know yet that the port is open"]
pub struct Attaching {
    handle: Handle,
    port: u32,
    /// Absent when there is nobody to wait for.
    answer: Option<Receiver<()>>,
}

impl Handle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Connects a port to `ends` and opens it to the guest.
    ///
    /// When it returns, a driver that is up has dealt with the opening: a process in the guest that
    /// opens the port afterwards and reads 0 bytes has met the end of the input, not a host that is
    /// not there yet. With no driver up, or on the device's own thread, it returns at once.
    ///
    /// # Errors
    /// No such port, a port in use, or a driver that does not answer for [`ATTACH_LIMIT`].
    pub fn attach(&self, port: u32, ends: PortEnds) -> Result<(), ConsoleError> {
        self.begin_attach(port, ends)?.wait(ATTACH_LIMIT)
    }

    /// The first half of [`attach`](Self::attach): several ports can be attached and then waited for.
    ///
    /// # Errors
    /// No such port, or a port in use.
    pub fn begin_attach(&self, port: u32, ends: PortEnds) -> Result<Attaching, ConsoleError> {
        let (acknowledge, answer) = sync_channel(1);
        let mut opened = None;
        let serving = self.change(port, |entry| {
            if !entry.is_free() {
                return Err(ConsoleError::Busy { port });
            }
            opened = entry.attach(ends, acknowledge);
            Ok(())
        })?;
        self.shared.report(opened.map(|event| event.of(port)));
        // On the thread that is to bring the answer there is no waiting for it.
        let answer = serving.filter(ReactorHandle::is_elsewhere).map(|_| answer);
        Ok(Attaching {
            handle: self.clone(),
            port,
            answer,
        })
    }

    /// Disconnects a port at once and closes both ends; what was on its way is lost. The port can be
    /// attached again when the guest has closed it, which is reported.
    ///
    /// # Errors
    /// No such port. To detach what is not attached is no error.
    pub fn detach(&self, port: u32) -> Result<(), ConsoleError> {
        self.change(port, |entry| {
            entry.detach();
            Ok(())
        })
        .map(drop)
    }

    /// Makes what the input holds now its last: it ends where a read would block.
    ///
    /// # Errors
    /// No such port. Without an open input this does nothing.
    pub fn close_input(&self, port: u32) -> Result<(), ConsoleError> {
        self.change(port, |entry| {
            entry.close_input();
            Ok(())
        })
        .map(drop)
    }

    /// Tells the guest the size of the terminal behind the port, in characters.
    ///
    /// # Errors
    /// No such port.
    pub fn resize(&self, port: u32, cols: u16, rows: u16) -> Result<(), ConsoleError> {
        self.change(port, |entry| {
            entry.resize(cols, rows);
            Ok(())
        })
        .map(drop)
    }

    /// Detaches a port and takes its device away from the guest, until it is attached again.
    ///
    /// # Errors
    /// No such port.
    pub fn remove(&self, port: u32) -> Result<(), ConsoleError> {
        self.change(port, |entry| {
            entry.remove();
            Ok(())
        })
        .map(drop)
    }

    /// What the console counted.
    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.shared.metrics)
    }

    /// Changes a port, has the worker look at it, and tells where that is if a driver is up.
    fn change(
        &self,
        port: u32,
        f: impl FnOnce(&mut Port) -> Result<(), ConsoleError>,
    ) -> Result<Option<ReactorHandle>, ConsoleError> {
        let mut table = self.shared.lock();
        // MAX_PORTS at most.
        let ports = table.ports.len() as u32;
        let entry = table
            .ports
            .get_mut(port as usize)
            .ok_or(ConsoleError::NoPort { port, ports })?;
        f(entry)?;
        table.changed.insert(port);
        let serving = table.serving.clone();
        drop(table);
        if let Err(error) = self.shared.doorbell.ring() {
            tracing::error!(%error, "Console's doorbell can't be rung");
        }
        Ok(serving)
    }
}

impl Attaching {
    /// Waits until the driver has dealt with the opening; see [`Handle::attach`].
    ///
    /// # Errors
    /// [`ConsoleError::Unanswered`] after `limit`; the port is then detached.
    pub fn wait(self, limit: Duration) -> Result<(), ConsoleError> {
        let Some(answer) = self.answer else {
            return Ok(());
        };
        match answer.recv_timeout(limit) {
            // Nobody left to answer: detached meanwhile, or the driver is gone and with it the wait.
            Ok(()) | Err(RecvTimeoutError::Disconnected) => Ok(()),
            Err(RecvTimeoutError::Timeout) => {
                self.handle.detach(self.port)?;
                Err(ConsoleError::Unanswered {
                    port: self.port,
                    limit,
                })
            }
        }
    }
}
