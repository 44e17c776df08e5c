//! The control queues: what the driver says of ports, and what it is told (virtio 1.2, 5.3.6.2).

use std::collections::VecDeque;
use std::sync::mpsc::SyncSender;

use super::PortEvent;
use super::metrics::Metrics;
use super::port::Port;
use super::state::ControlState;
use super::wire::{CONTROL_LEN, FromDriver, ToDriver};
use crate::devices::virtio::queue::{Chain, RingFault};
use crate::devices::virtio::{ActiveQueue, Interrupt, Position};

/// What a round of control messages changed.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Ports whose streams may go on.
    pub(super) ports: Vec<u32>,
    /// The driver has announced itself.
    pub(super) device_ready: bool,
}

/// Both control queues.
///
/// Nothing is queued for the driver: the ports know what it should hear next, so a driver that never
/// supplies buffers makes nothing grow.
#[derive(Debug)]
pub(super) struct ControlQueues {
    receive: ActiveQueue,
    transmit: ActiveQueue,
    /// Buffers of the driver for messages to come; at most a queue full.
    buffers: VecDeque<Chain>,
    /// Buffers the driver has supplied so far.
    supplied: u64,
    /// How many it had supplied when it announced itself, which is as many as it ever leaves here.
    /// From then on each further one is one that it has dealt with and given back.
    capacity: Option<u64>,
    sent: u64,
    /// Who waits until the message with that number has been dealt with.
    awaiting: VecDeque<(u64, SyncSender<()>)>,
}

impl ControlQueues {
    pub(super) fn new(receive: ActiveQueue, transmit: ActiveQueue) -> Self {
        Self {
            receive,
            transmit,
            buffers: VecDeque::new(),
            supplied: 0,
            capacity: None,
            sent: 0,
            awaiting: VecDeque::new(),
        }
    }

    /// The queues, for their doorbells.
    pub(super) fn queues(&self) -> [&ActiveQueue; 2] {
        [&self.receive, &self.transmit]
    }

    /// What a snapshot has of them: the buffers held here are taken anew.
    pub(super) fn save(&self) -> (ControlState, [(u16, Position); 2]) {
        let held = self.buffers.len();
        let state = ControlState {
            supplied: self.supplied - held as u64,
            capacity: self.capacity,
            sent: self.sent,
        };
        (
            state,
            [self.receive.position(held), self.transmit.position(0)],
        )
    }

    /// Goes on where another's were; answers whether their driver had announced itself.
    pub(super) fn restore(&mut self, state: ControlState) -> bool {
        (self.supplied, self.capacity, self.sent) = (state.supplied, state.capacity, state.sent);
        self.has_driver()
    }

    /// Whether the driver has announced itself.
    pub(super) fn has_driver(&self) -> bool {
        self.capacity.is_some()
    }

    /// Hears what the driver has to say; bounded by the size of the queue, twice.
    pub(super) fn listen(
        &mut self,
        ports: &mut [Port],
        interrupt: &Interrupt,
        metrics: &Metrics,
        events: &mut Vec<PortEvent>,
    ) -> Result<Changes, RingFault> {
        let mut changes = Changes::default();
        let mut left = 2 * self.transmit.queue.size();
        loop {
            let Some(chain) = self.transmit.queue.pop_or_notify()? else {
                break;
            };
            let message = read_message(&chain);
            self.transmit.queue.complete(chain, 0)?;
            metrics.control_received.add(1);
            let understood = match message {
                Some(FromDriver::DeviceReady(ready)) => {
                    self.device_ready(ready, ports, &mut changes)?;
                    true
                }
                Some(message) => apply(message, ports, &mut changes, events),
                None => false,
            };
            if !understood {
                metrics.control_refused.add(1);
            }
            left -= 1;
            if left == 0 {
                // The driver goes on and on; others get their turn.
                ring(&self.transmit);
                break;
            }
        }
        interrupt.used(&mut self.transmit.queue)?;
        Ok(changes)
    }

    fn device_ready(
        &mut self,
        ready: bool,
        ports: &mut [Port],
        changes: &mut Changes,
    ) -> Result<(), RingFault> {
        if !ready {
            tracing::warn!("The guest's console driver failed to start");
            return Ok(());
        }
        self.collect(None)?;
        self.capacity.get_or_insert(self.supplied);
        for port in ports {
            port.device_ready();
        }
        changes.device_ready = true;
        Ok(())
    }

    /// Tells the driver all it should hear, as far as it has supplied buffers. Returns the ports
    /// that were taken away, and thereby closed.
    pub(super) fn tell(
        &mut self,
        ports: &mut [Port],
        interrupt: &Interrupt,
        metrics: &Metrics,
        events: &mut Vec<PortEvent>,
    ) -> Result<Vec<u32>, RingFault> {
        self.collect(Some(metrics))?;
        // Before it has announced itself, the driver expects nothing.
        let mut removed = Vec::new();
        if self.capacity.is_none() {
            return Ok(removed);
        }
        for (number, port) in (0..).zip(ports) {
            while let Some(message) = port.next_message() {
                let Some(chain) = self.buffers.pop_front() else {
                    interrupt.used(&mut self.receive.queue)?;
                    return Ok(removed);
                };
                let bytes = message.encode(number);
                if bytes.len() as u64 > chain.writable_len() {
                    // A name or size for which the driver leaves no room is not told.
                    metrics.bad_buffers.add(1);
                    self.buffers.push_front(chain);
                } else {
                    let written = chain.writer().write_all(&bytes).is_ok();
                    // Control messages are a few bytes long.
                    let len = if written { bytes.len() as u32 } else { 0 };
                    self.receive.queue.complete(chain, len)?;
                    self.sent += 1;
                    metrics.control_sent.add(1);
                    tracing::trace!(port = number, ?message, "Console control message sent");
                }
                events.extend(port.sent(&message).map(|event| event.of(number)));
                if message == ToDriver::Remove {
                    removed.push(number);
                }
                if message == ToDriver::Open(true)
                    && let Some(waiter) = port
                        .attachment()
                        .and_then(|attachment| attachment.acknowledge.take())
                {
                    self.awaiting.push_back((self.sent, waiter));
                }
            }
        }
        interrupt.used(&mut self.receive.queue)?;
        Ok(removed)
    }

    /// Takes over buffers the driver has supplied; it gives one back for each message dealt with.
    fn collect(&mut self, metrics: Option<&Metrics>) -> Result<(), RingFault> {
        let mut left = 2 * self.receive.queue.size();
        while left > 0 {
            left -= 1;
            match self.receive.queue.pop()? {
                Some(chain) if chain.writable_len() < CONTROL_LEN as u64 => {
                    self.receive.queue.complete(chain, 0)?;
                    if let Some(metrics) = metrics {
                        metrics.bad_buffers.add(1);
                    }
                }
                Some(chain) => {
                    self.buffers.push_back(chain);
                    self.supplied += 1;
                }
                None => {
                    if !self.receive.queue.enable_notification()? {
                        break;
                    }
                }
            }
        }
        if left == 0 {
            ring(&self.receive);
        }
        let dealt_with = self
            .capacity
            .map_or(0, |capacity| self.supplied.saturating_sub(capacity));
        while let Some((_, waiter)) = self
            .awaiting
            .pop_front_if(|(message, _)| *message <= dealt_with)
        {
            // A waiter that has given up is no loss.
            let _ = waiter.try_send(());
        }
        Ok(())
    }
}

fn read_message(chain: &Chain) -> Option<FromDriver> {
    let mut bytes = [0; CONTROL_LEN];
    chain.reader().read_exact(&mut bytes).ok()?;
    FromDriver::parse(&bytes).ok()
}

/// Applies what concerns one port; tells whether it made sense.
fn apply(
    message: FromDriver,
    ports: &mut [Port],
    changes: &mut Changes,
    events: &mut Vec<PortEvent>,
) -> bool {
    let number = match message {
        FromDriver::PortReady { port, .. } | FromDriver::PortOpen { port, .. } => port,
        FromDriver::DeviceReady(_) => return false,
    };
    let Some(port) = ports.get_mut(number as usize) else {
        return false;
    };
    match message {
        FromDriver::PortReady { ready, .. } => {
            if !ready {
                tracing::warn!(port = number, "The guest could not set up a console port");
            }
            if !port.port_ready(ready) {
                return false;
            }
        }
        FromDriver::PortOpen { open, .. } => {
            if !port.is_known() {
                return false;
            }
            if open {
                events.extend(port.guest_open().map(|event| event.of(number)));
            } else {
                port.guest_close();
            }
        }
        FromDriver::DeviceReady(_) => {}
    }
    if !changes.ports.contains(&number) {
        changes.ports.push(number);
    }
    true
}

/// Has the reactor come back to this queue after others had their turn.
pub(super) fn ring(queue: &ActiveQueue) {
    if let Err(error) = queue.doorbell.ring() {
        tracing::error!(%error, queue = queue.index, "Queue's doorbell can't be rung");
    }
}
