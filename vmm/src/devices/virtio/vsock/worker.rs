//! Owns the queues while the device is active.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use super::metrics::Metrics;
use super::muxer::{Filled, LISTENER, Muxer};
use super::wire::{HEADER_LEN, Header};
use super::{EVENT, RECEIVE, TRANSMIT, TRANSPORT_RESET};
use crate::devices::virtio::queue::{RingFault, Virtqueue};
use crate::devices::virtio::{
    ActivateError, Activation, ActiveQueue, Faults, Interrupt, Positions,
};
use crate::sys::reactor::{self, Control, Interest, Readiness};

/// Packets moved in one direction before others get their turn.
const TURN_PACKETS: usize = 256;

/// Whether the driver knows that it goes on from a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moved {
    /// It does, or it doesn't go on from one.
    Settled,
    /// It has to hear that its connections are gone.
    Due,
    /// It has been told, and has so many more buffers there.
    Told { left: usize },
}

#[derive(Debug)]
pub(super) struct Worker {
    receive: ActiveQueue,
    transmit: ActiveQueue,
    /// Absent when the driver did without.
    event: Option<ActiveQueue>,
    moved: Moved,
    muxer: Muxer,
    metrics: Arc<Metrics>,
    interrupt: Interrupt,
    faults: Faults,
    broken: bool,
}

impl Worker {
    pub(super) fn new(
        cid: u32,
        listener: UnixListener,
        metrics: Arc<Metrics>,
        mut activation: Activation,
        moved: bool,
    ) -> Result<Self, ActivateError> {
        Ok(Self {
            receive: activation.require_queue(RECEIVE)?,
            transmit: activation.require_queue(TRANSMIT)?,
            event: activation.take_queue(EVENT),
            moved: if moved { Moved::Due } else { Moved::Settled },
            muxer: Muxer::new(cid, listener, Arc::clone(&metrics), moved),
            metrics,
            interrupt: activation.interrupt,
            faults: activation.faults,
            broken: false,
        })
    }

    /// How far the queues are: it holds nothing of them between two events.
    pub(super) fn positions(&self) -> Positions {
        let queues = [
            Some(&self.receive),
            Some(&self.transmit),
            self.event.as_ref(),
        ];
        let queues = queues.into_iter().flatten();
        queues.map(|queue| queue.position(0)).collect()
    }

    /// Tells a driver that goes on from a snapshot, in one of the buffers it left for that. It supplies
    /// it again once it has closed its connections: only then are new ones taken in, or it would
    /// close these too.
    fn announce(&mut self, control: &mut Control<'_>) -> Result<(), RingFault> {
        let supplied = match (self.moved, &mut self.event) {
            (Moved::Settled, _) => return Ok(()),
            (_, None) => true,
            (Moved::Due, Some(event)) => {
                let Some(chain) = event.queue.pop_or_notify()? else {
                    return Ok(());
                };
                let left = waiting(&mut event.queue)?;
                let told = chain.writer().write_all(&TRANSPORT_RESET.to_le_bytes());
                event
                    .queue
                    .complete(chain, if told.is_ok() { 4 } else { 0 })?;
                self.moved = Moved::Told { left };
                self.interrupt.used(&mut event.queue)?;
                waiting(&mut event.queue)? > left
            }
            (Moved::Told { left }, Some(event)) => waiting(&mut event.queue)? > left,
        };
        if supplied {
            self.moved = Moved::Settled;
            self.muxer.hold(false, control);
        }
        Ok(())
    }

    /// Hears the guest, then speaks to it, and hears again what had to wait for that.
    fn serve(&mut self, control: &mut Control<'_>) -> Result<(), RingFault> {
        self.hear(control)?;
        let was_congested = self.muxer.is_congested();
        self.speak(control)?;
        if was_congested && !self.muxer.is_congested() {
            ring(&self.transmit);
        }
        Ok(())
    }

    /// Guest to host.
    fn hear(&mut self, control: &mut Control<'_>) -> Result<(), RingFault> {
        for _ in 0..TURN_PACKETS {
            if self.muxer.is_congested() {
                // Until it takes our answers there is no asking for more of them.
                self.interrupt.used(&mut self.transmit.queue)?;
                return Ok(());
            }
            let Some(chain) = self.transmit.queue.pop_or_notify()? else {
                self.interrupt.used(&mut self.transmit.queue)?;
                return Ok(());
            };
            let mut bytes = [0; HEADER_LEN];
            let mut reader = chain.reader();
            match reader.read_exact(&mut bytes) {
                Ok(()) => self.muxer.hear(&Header::parse(&bytes), reader, control),
                Err(_) => self.metrics.packets_refused.add(1),
            }
            self.transmit.queue.complete(chain, 0)?;
        }
        // A sender waits for room in this queue: it is interrupted for completions alone.
        self.interrupt.used(&mut self.transmit.queue)?;
        ring(&self.transmit);
        Ok(())
    }

    /// Host to guest.
    fn speak(&mut self, control: &mut Control<'_>) -> Result<(), RingFault> {
        let mut left = TURN_PACKETS;
        while self.muxer.has_something() {
            if left == 0 {
                ring(&self.receive);
                break;
            }
            left -= 1;
            let Some(chain) = self.receive.queue.pop_or_notify()? else {
                break;
            };
            if chain.writable_len() < HEADER_LEN as u64 {
                self.metrics.bad_buffers.add(1);
                self.receive.queue.complete(chain, 0)?;
                continue;
            }
            match self.muxer.fill(&chain, control) {
                Filled::Bytes(len) => self.receive.queue.complete(chain, len)?,
                Filled::Nothing => self.receive.queue.undo_pop(chain),
                Filled::Unfit => {
                    self.metrics.bad_buffers.add(1);
                    self.receive.queue.complete(chain, 0)?;
                }
            }
        }
        self.interrupt.used(&mut self.receive.queue)?;
        Ok(())
    }

    /// Runs `f` unless the device is broken, and breaks it if `f` says so.
    fn guarded(
        &mut self,
        control: &mut Control<'_>,
        f: impl FnOnce(&mut Self, &mut Control<'_>) -> Result<(), RingFault>,
    ) {
        if self.broken {
            return;
        }
        if let Err(fault) = f(self, control) {
            self.broken = true;
            self.faults.needs_reset(&fault);
            for queue in [RECEIVE, TRANSMIT, EVENT] {
                control.remove(usize::from(queue));
            }
            self.muxer.stop(control);
        }
    }
}

impl reactor::Worker for Worker {
    fn start(&mut self, control: &mut Control<'_>) -> io::Result<()> {
        for queue in [
            Some(&self.receive),
            Some(&self.transmit),
            self.event.as_ref(),
        ]
        .into_iter()
        .flatten()
        {
            control.add(&queue.doorbell, usize::from(queue.index), Interest::READ)?;
        }
        self.muxer.start(control)?;
        self.guarded(control, |worker, control| {
            worker.announce(control)?;
            worker.serve(control)
        });
        Ok(())
    }

    fn ready(&mut self, control: &mut Control<'_>, token: usize, readiness: Readiness) {
        self.guarded(control, |worker, control| {
            match token {
                LISTENER => worker.muxer.accept(control),
                _ => match [
                    Some(&worker.receive),
                    Some(&worker.transmit),
                    worker.event.as_ref(),
                ]
                .into_iter()
                .flatten()
                .find(|queue| usize::from(queue.index) == token)
                {
                    Some(queue) => {
                        if let Err(error) = queue.doorbell.clear() {
                            tracing::error!(%error, "Vsock's doorbell can't be silenced");
                        }
                    }
                    // Tokens of connections are ports.
                    None => worker.muxer.event(token as u32, readiness, control),
                },
            }
            worker.announce(control)?;
            worker.serve(control)
        });
    }
}

/// How many buffers there are. The driver notifies of the next one.
fn waiting(queue: &mut Virtqueue) -> Result<usize, RingFault> {
    let mut chains = Vec::new();
    while let Some(chain) = queue.pop_or_notify()? {
        chains.push(chain);
    }
    let count = chains.len();
    for chain in chains.into_iter().rev() {
        queue.undo_pop(chain);
    }
    Ok(count)
}

/// Has the reactor come back to this queue after others had their turn.
fn ring(queue: &ActiveQueue) {
    if let Err(error) = queue.doorbell.ring() {
        tracing::error!(%error, queue = queue.index, "Queue's doorbell can't be rung");
    }
}
