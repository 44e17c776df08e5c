//! Owns the queues while the device is active.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use super::control::ControlQueues;
use super::handle::{Shared, Table};
use super::lane::{Lane, tokens_of};
use super::state::{ConsoleState, ControlState};
use super::{CONTROL_RECEIVE, CONTROL_TRANSMIT, F_MULTIPORT, PortEvent, bell_of, queues_of};
use crate::devices::virtio::queue::RingFault;
use crate::devices::virtio::{
    ActivateError, Activation, ActiveQueue, Faults, Interrupt, Positions,
};
use crate::sys::reactor::{self, Control, Interest, ReactorHandle, Readiness};

/// Token of the handles' doorbell. That of a queue's is the number of the queue it belongs to.
const HANDLES: usize = 0xffff;

#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    /// Absent when the driver wants port 0 only.
    control: Option<ControlQueues>,
    lanes: Vec<Lane>,
    interrupt: Interrupt,
    faults: Faults,
    reactor: ReactorHandle,
    broken: bool,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        max_ports: u32,
        mut activation: Activation,
    ) -> Result<Self, ActivateError> {
        let multiport = activation.features & F_MULTIPORT != 0;
        let control = if multiport {
            let receive = activation.require_queue(CONTROL_RECEIVE)?;
            let transmit = activation.require_queue(CONTROL_TRANSMIT)?;
            Some(ControlQueues::new(receive, transmit))
        } else {
            None
        };
        let ports = if multiport { max_ports } else { 1 };
        let lanes = (0..ports)
            .map(|port| {
                let (receive, transmit) = queues_of(port);
                Lane::new(
                    port,
                    activation.take_queue(receive),
                    activation.take_queue(transmit),
                )
            })
            .collect();
        let Activation {
            interrupt,
            faults,
            reactor,
            ..
        } = activation;
        Ok(Self {
            shared,
            control,
            lanes,
            interrupt,
            faults,
            reactor,
            broken: false,
        })
    }

    /// How far the queues are, what the driver was told, and the bytes taken of each port's next
    /// buffer.
    pub(super) fn save(&self) -> (Positions, Option<ControlState>, Vec<u64>) {
        let mut positions = Vec::new();
        let mut control = None;
        if let Some(queues) = &self.control {
            let (state, both) = queues.save();
            control = Some(state);
            positions.extend(both);
        }
        let mut taken = Vec::new();
        for lane in &self.lanes {
            let (queues, bytes) = lane.save();
            positions.extend(queues);
            taken.push(bytes);
        }
        (positions, control, taken)
    }

    /// Goes on where another worker was. The ports' own states are in the table already.
    pub(super) fn restore(&mut self, state: &ConsoleState) {
        if let (Some(queues), Some(control)) = (&mut self.control, state.control) {
            queues.restore(control);
        }
        for (lane, port) in self.lanes.iter_mut().zip(&state.ports) {
            lane.restore(port.taken);
        }
    }

    fn queues(&self) -> impl Iterator<Item = &ActiveQueue> {
        let control = self.control.iter().flat_map(ControlQueues::queues);
        control.chain(self.lanes.iter().flat_map(Lane::queues))
    }

    /// The ports whose queues a doorbell rings for.
    fn ports_of(&self, bell: usize) -> impl Iterator<Item = u32> + use<> {
        (0..self.lanes.len() as u32).filter(move |port| {
            let (receive, transmit) = queues_of(*port);
            let bells = [receive, transmit].map(|queue| usize::from(bell_of(queue)));
            bells.contains(&bell)
        })
    }

    /// Silences a doorbell: what it rang for is about to be looked at.
    fn clear(&self, token: usize) {
        let cleared = if token == HANDLES {
            self.shared.doorbell.clear()
        } else {
            match self
                .queues()
                .find(|queue| usize::from(bell_of(queue.index)) == token)
            {
                Some(queue) => queue.doorbell.clear(),
                None => return,
            }
        };
        if let Err(error) = cleared {
            tracing::error!(%error, "Console's doorbell can't be silenced");
        }
    }

    /// Sees to the ports named, then to the messages that came of it.
    fn serve(
        &mut self,
        ports: impl IntoIterator<Item = u32>,
        table: &mut Table,
        control: &mut Control<'_>,
        events: &mut Vec<PortEvent>,
    ) -> Result<(), RingFault> {
        self.serve_lanes(ports, table, control, events)?;
        if let Some(queues) = &mut self.control {
            let metrics = &self.shared.metrics;
            let removed = queues.tell(&mut table.ports, &self.interrupt, metrics, events)?;
            self.serve_lanes(removed, table, control, events)?;
        }
        Ok(())
    }

    fn serve_lanes(
        &mut self,
        ports: impl IntoIterator<Item = u32>,
        table: &mut Table,
        control: &mut Control<'_>,
        events: &mut Vec<PortEvent>,
    ) -> Result<(), RingFault> {
        let metrics = &self.shared.metrics;
        for number in ports {
            if let (Some(lane), Some(port)) = (
                self.lanes.get_mut(number as usize),
                table.ports.get_mut(number as usize),
            ) {
                lane.serve(port, &self.interrupt, metrics, control, events)?;
            }
        }
        Ok(())
    }

    fn listen(
        &mut self,
        table: &mut Table,
        control: &mut Control<'_>,
        events: &mut Vec<PortEvent>,
    ) -> Result<(), RingFault> {
        let Some(queues) = &mut self.control else {
            return Ok(());
        };
        let changes = queues.listen(
            &mut table.ports,
            &self.interrupt,
            &self.shared.metrics,
            events,
        )?;
        if changes.device_ready {
            table.serving = Some(self.reactor.clone());
        }
        self.serve(changes.ports, table, control, events)
    }

    fn dispatch(
        &mut self,
        control: &mut Control<'_>,
        token: usize,
        readiness: Readiness,
        events: &mut Vec<PortEvent>,
    ) -> Result<(), RingFault> {
        self.clear(token);
        let shared = Arc::clone(&self.shared);
        let mut table = shared.lock();
        if token == HANDLES {
            let changed = std::mem::take(&mut table.changed);
            return self.serve(changed, &mut table, control, events);
        }
        if token == usize::from(CONTROL_TRANSMIT) {
            return self.listen(&mut table, control, events);
        }
        for (number, port) in (0..).zip(&mut table.ports) {
            let (input, output) = tokens_of(number);
            if token != input && token != output {
                continue;
            }
            if let Some(attachment) = port.attachment() {
                if let (true, Some(source)) = (token == input, &mut attachment.input) {
                    source.ready |= readiness.readable;
                }
                if let (true, Some(sink)) = (token == output, &mut attachment.output) {
                    sink.blocked &= !readiness.writable;
                }
            }
            return self.serve([number], &mut table, control, events);
        }
        // Of no port when the driver supplied buffers for control messages.
        self.serve(self.ports_of(token), &mut table, control, events)
    }

    /// Runs `f` unless the device is broken, and breaks it if `f` says so.
    fn guarded(
        &mut self,
        control: &mut Control<'_>,
        f: impl FnOnce(&mut Self, &mut Control<'_>, &mut Vec<PortEvent>) -> Result<(), RingFault>,
    ) {
        if self.broken {
            return;
        }
        let mut events = Vec::new();
        let outcome = f(self, control, &mut events);
        self.shared.report(events);
        if let Err(fault) = outcome {
            self.broken = true;
            self.faults.needs_reset(&fault);
            for queue in self.queues() {
                control.remove(usize::from(bell_of(queue.index)));
            }
            control.remove(HANDLES);
            for lane in &mut self.lanes {
                lane.unwatch(control);
            }
            // Nobody will take what the host waits for.
            self.shared.disconnect();
        }
    }
}

impl reactor::Worker for Worker {
    fn start(&mut self, control: &mut Control<'_>) -> io::Result<()> {
        let mut heard = BTreeSet::new();
        for queue in self.queues() {
            let bell = bell_of(queue.index);
            if heard.insert(bell) {
                control.listen(&queue.doorbell, usize::from(bell))?;
            }
        }
        control.add(&self.shared.doorbell, HANDLES, Interest::READ)?;
        for lane in &mut self.lanes {
            lane.forget_watched();
        }
        // Whatever the driver did before it set DRIVER_OK, and whatever was attached before.
        self.guarded(control, |worker, control, events| {
            let shared = Arc::clone(&worker.shared);
            let mut table = shared.lock();
            if worker
                .control
                .as_ref()
                .is_some_and(ControlQueues::has_driver)
            {
                table.serving = Some(worker.reactor.clone());
            }
            if worker.control.is_none()
                && let Some(port) = table.ports.first_mut()
            {
                events.extend(port.assume_open().map(|event| event.of(0)));
            }
            let ports = (0..).zip(&table.ports);
            let busy: Vec<_> = ports
                .filter(|(_, port)| !port.is_at_rest())
                .map(|(number, _)| number)
                .collect();
            worker.serve(busy, &mut table, control, events)?;
            worker.listen(&mut table, control, events)
        });
        Ok(())
    }

    fn ready(&mut self, control: &mut Control<'_>, token: usize, readiness: Readiness) {
        self.guarded(control, |worker, control, events| {
            worker.dispatch(control, token, readiness, events)
        });
    }
}
