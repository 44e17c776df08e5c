//! The two data queues of a port, and the bytes on them.

use std::collections::VecDeque;
use std::io;

use super::PortEvent;
use super::control::ring;
use super::endpoint::{Given, Input, Output, Taken};
use super::metrics::Metrics;
use super::port::{Guest, Port};
use crate::devices::virtio::queue::{Chain, RingFault};
use crate::devices::virtio::{ActiveQueue, Interrupt, Positions};
use crate::sys::reactor::{Control, Interest};
use crate::sys::vectored::MAX_SLICES;

/// Bytes moved in one direction before others get their turn.
const TURN_BYTES: usize = 1 << 20;
/// Chains looked at in one direction before others get their turn.
const TURN_CHAINS: usize = 1024;
/// The most of one receive chain filled at once.
const READ_LIMIT: u64 = 64 << 10;
/// The most receive chains filled at once.
const READ_CHAINS: usize = 32;

/// What the reactor was told of an attachment's descriptors.
#[derive(Clone, Copy, Debug)]
struct Watched {
    generation: u64,
    /// Absent for what is not there, or can't be waited for and never blocks.
    input: Option<Interest>,
    output: Option<Interest>,
}

/// A port's queues while the device is active.
///
/// The queues come before the chains, so that they are dropped first.
#[derive(Debug)]
pub(super) struct Lane {
    number: u32,
    receive: Option<ActiveQueue>,
    transmit: Option<ActiveQueue>,
    /// Chains of the guest whose bytes the output has not taken; at most a queue full.
    pending: VecDeque<Chain>,
    /// Bytes of the first pending chain that it has taken.
    taken: u64,
    /// How many receive chains to offer to the next read.
    read_chains: usize,
    watched: Option<Watched>,
}

/// Tokens of the descriptors attached to a port.
pub(super) fn tokens_of(port: u32) -> (usize, usize) {
    // Above any queue number and the host's doorbell.
    let input = 0x1_0000 + 2 * port as usize;
    (input, input + 1)
}

impl Lane {
    pub(super) fn new(
        number: u32,
        receive: Option<ActiveQueue>,
        transmit: Option<ActiveQueue>,
    ) -> Self {
        Self {
            number,
            receive,
            transmit,
            pending: VecDeque::new(),
            taken: 0,
            read_chains: 1,
            watched: None,
        }
    }

    /// The queues, for their doorbells.
    pub(super) fn queues(&self) -> impl Iterator<Item = &ActiveQueue> {
        self.receive.iter().chain(&self.transmit)
    }

    /// How far the queues are, and how many bytes of the first chain taken anew are written already.
    pub(super) fn save(&self) -> (Positions, u64) {
        let receive = self.receive.iter().map(|queue| queue.position(0));
        let transmit = self.transmit.iter();
        let transmit = transmit.map(|queue| queue.position(self.pending.len()));
        (receive.chain(transmit).collect(), self.taken)
    }

    /// Goes on where another was.
    pub(super) fn restore(&mut self, taken: u64) {
        self.taken = taken;
    }

    /// The worker is put back after it was held still: the reactor knows no descriptor any more.
    pub(super) fn forget_watched(&mut self) {
        self.watched = None;
    }

    /// Moves what can be moved, both ways, and has the reactor report when there is more.
    pub(super) fn serve(
        &mut self,
        port: &mut Port,
        interrupt: &Interrupt,
        metrics: &Metrics,
        control: &mut Control<'_>,
        events: &mut Vec<PortEvent>,
    ) -> Result<(), RingFault> {
        self.watch(port, control);
        let drained = self.output(port, metrics)?;
        if let Some(transmit) = &mut self.transmit {
            interrupt.used(&mut transmit.queue)?;
        }
        if drained {
            events.extend(port.drained().map(|event| event.of(self.number)));
        }
        let starved = self.input(port, metrics)?;
        if let Some(receive) = &mut self.receive {
            interrupt.used(&mut receive.queue)?;
        }
        self.watch(port, control);
        self.set_interests(port, starved, control);
        Ok(())
    }

    /// Guest to host. Tells whether all that the guest made available has been taken.
    fn output(&mut self, port: &mut Port, metrics: &Metrics) -> Result<bool, RingFault> {
        let Some(transmit) = &mut self.transmit else {
            return Ok(true);
        };
        let (mut bytes, mut chains) = (0, 0);
        loop {
            while self.pending.len() < MAX_SLICES && chains < TURN_CHAINS {
                let Some(chain) = transmit.queue.pop()? else {
                    break;
                };
                chains += 1;
                if chain.readable_len() == 0 {
                    metrics.bad_buffers.add(1);
                    transmit.queue.complete(chain, 0)?;
                } else {
                    self.pending.push_back(chain);
                }
            }
            if self.pending.is_empty() {
                if chains < TURN_CHAINS {
                    if !transmit.queue.enable_notification()? {
                        return Ok(true);
                    }
                    continue;
                }
                ring(transmit);
                return Ok(false);
            }
            let attachment = port.attachment();
            let Some(output) = attachment.and_then(|attachment| attachment.output.as_mut()) else {
                // Nobody takes it: what one attachment left must not reach the next.
                while let Some(chain) = self.pending.pop_front() {
                    let taken = std::mem::take(&mut self.taken);
                    let left = chain.readable_len().saturating_sub(taken);
                    metrics.discarded_bytes.add(left);
                    transmit.queue.complete(chain, 0)?;
                }
                continue;
            };
            if output.blocked {
                transmit.queue.disable_notification()?;
                return Ok(false);
            }
            match write_pending(output, &self.pending, self.taken) {
                Given::Bytes(written) => {
                    metrics.output_bytes.add(written as u64);
                    bytes += written;
                    self.taken += written as u64;
                    while let Some(chain) = self
                        .pending
                        .pop_front_if(|chain| chain.readable_len() <= self.taken)
                    {
                        self.taken -= chain.readable_len();
                        transmit.queue.complete(chain, 0)?;
                    }
                }
                Given::Blocked => metrics.output_stalls.add(1),
                Given::Failed(error) => {
                    // Its reader went away, or its disk is full: the guest must not notice more of it
                    // than a process whose output is thrown away would.
                    tracing::debug!(%error, port = self.number, "Console output failed");
                    metrics.output_failures.add(1);
                    if let Some(attachment) = port.attachment() {
                        attachment.output = None;
                    }
                }
            }
            if bytes >= TURN_BYTES || chains >= TURN_CHAINS {
                ring(transmit);
                return Ok(false);
            }
        }
    }

    /// Host to guest. Tells whether the guest has left no buffer to read into.
    fn input(&mut self, port: &mut Port, metrics: &Metrics) -> Result<bool, RingFault> {
        let Some(receive) = &mut self.receive else {
            return Ok(true);
        };
        if port.guest() != Guest::Open {
            // It would throw it away.
            return Ok(false);
        }
        let (mut bytes, mut chains) = (0, 0);
        while let Some(input) = port
            .attachment()
            .and_then(|attachment| attachment.input.as_mut().filter(|i| i.ready))
        {
            if bytes >= TURN_BYTES || chains >= TURN_CHAINS {
                ring(receive);
                return Ok(false);
            }
            let mut offered = Vec::with_capacity(self.read_chains);
            while offered.len() < self.read_chains {
                let Some(chain) = receive.queue.pop()? else {
                    break;
                };
                chains += 1;
                if chain.writable_len() == 0 {
                    metrics.bad_buffers.add(1);
                    receive.queue.complete(chain, 0)?;
                    // Each costs a place, so that a queue full of them ends.
                    if chains >= TURN_CHAINS {
                        break;
                    }
                } else {
                    offered.push(chain);
                }
            }
            if offered.is_empty() {
                if chains >= TURN_CHAINS || receive.queue.enable_notification()? {
                    continue;
                }
                return Ok(true);
            }
            let read = read_offered(input, offered, receive, &mut bytes)?;
            match read {
                Read {
                    taken: Taken::Bytes(n),
                    filled,
                    ..
                } => {
                    metrics.input_bytes.add(n as u64);
                    self.read_chains = if filled {
                        (self.read_chains * 2).min(READ_CHAINS)
                    } else {
                        1
                    };
                }
                Read {
                    taken: Taken::Blocked,
                    ..
                } => {}
                Read {
                    taken: Taken::End, ..
                } => port.input_ended(),
            }
        }
        receive.queue.disable_notification()?;
        Ok(false)
    }

    /// Has the reactor watch the present attachment's descriptors and no others.
    fn watch(&mut self, port: &mut Port, control: &mut Control<'_>) {
        let (input_token, output_token) = tokens_of(self.number);
        let current = port.attachment();
        let generation = current.as_ref().map(|attachment| attachment.generation);
        if let Some(watched) = &mut self.watched {
            let other = generation != Some(watched.generation);
            let (input, output) = current.as_ref().map_or((false, false), |attachment| {
                (attachment.input.is_some(), attachment.output.is_some())
            });
            if other || !input {
                control.remove(input_token);
                watched.input = None;
            }
            if other || !output {
                control.remove(output_token);
                watched.output = None;
            }
            if other {
                self.watched = None;
            }
        }
        if self.watched.is_none()
            && let Some(attachment) = current
        {
            let input = attachment
                .input
                .as_mut()
                .and_then(|input| watch_input(input, control, input_token));
            let output = attachment.output.as_ref().and_then(|output| {
                control
                    .add(output, output_token, Interest::NONE)
                    .ok()
                    .map(|()| Interest::NONE)
            });
            self.watched = Some(Watched {
                generation: attachment.generation,
                input,
                output,
            });
        }
    }

    /// Has the reactor forget the attachment's descriptors.
    pub(super) fn unwatch(&mut self, control: &mut Control<'_>) {
        let (input_token, output_token) = tokens_of(self.number);
        control.remove(input_token);
        control.remove(output_token);
        self.watched = None;
    }

    fn set_interests(&mut self, port: &mut Port, starved: bool, control: &mut Control<'_>) {
        let (input_token, output_token) = tokens_of(self.number);
        let open = port.guest() == Guest::Open;
        let (Some(watched), Some(attachment)) = (&mut self.watched, port.attachment()) else {
            return;
        };
        if let (Some(now), Some(input)) = (&mut watched.input, &mut attachment.input) {
            let wanted = if open && !input.ready && !starved {
                Interest::READ
            } else {
                Interest::NONE
            };
            if *now != wanted {
                *now = wanted;
                if control.set_interest(input_token, wanted).is_err() {
                    // A file, or a device like /dev/null: it never blocks.
                    watched.input = None;
                    control.remove(input_token);
                    input.ready = true;
                }
            }
        }
        if let (Some(now), Some(output)) = (&mut watched.output, &mut attachment.output) {
            let wanted = if output.blocked {
                Interest::WRITE
            } else {
                Interest::NONE
            };
            if *now != wanted {
                *now = wanted;
                if let Err(error) = control.set_interest(output_token, wanted) {
                    tracing::error!(%error, port = self.number, "Console output can't be waited for");
                }
            }
        }
    }
}

/// Registers an input, unless it is one that never blocks.
fn watch_input(input: &mut Input, control: &mut Control<'_>, token: usize) -> Option<Interest> {
    // Only with an interest does the poller say whether it can wait for it at all.
    let added = control
        .add(input, token, Interest::READ)
        .and_then(|()| control.set_interest(token, Interest::NONE));
    match added {
        Ok(()) => Some(Interest::NONE),
        Err(error) => {
            if error.kind() != io::ErrorKind::PermissionDenied {
                tracing::error!(%error, "Console input can't be waited for");
            }
            control.remove(token);
            input.ready = true;
            None
        }
    }
}

fn write_pending(output: &mut Output, pending: &VecDeque<Chain>, taken: u64) -> Given {
    let mut slices = Vec::with_capacity(pending.len());
    let mut skip = taken;
    for chain in pending {
        let mut reader = chain.reader();
        let more = reader
            .skip(std::mem::take(&mut skip))
            .and_then(|()| reader.slices(u64::MAX));
        match more {
            Ok(more) => slices.extend(more),
            // The chain was checked to lie in guest RAM, which does not go away.
            Err(error) => return Given::Failed(io::Error::other(error)),
        }
        if slices.len() >= MAX_SLICES {
            break;
        }
    }
    output.write(&slices)
}

struct Read {
    taken: Taken,
    /// The offered chains were all filled: there may be more.
    filled: bool,
}

/// Reads into chains and completes those that got something.
fn read_offered(
    input: &mut Input,
    mut offered: Vec<Chain>,
    receive: &mut ActiveQueue,
    bytes: &mut usize,
) -> Result<Read, RingFault> {
    let mut slices = Vec::with_capacity(offered.len());
    let mut room = Vec::with_capacity(offered.len());
    let mut failed = false;
    for chain in &offered {
        match chain.writer().slices(READ_LIMIT) {
            Ok(mut more) => {
                more.truncate(MAX_SLICES - slices.len());
                room.push(
                    more.iter()
                        .map(vm_memory::VolatileSlice::len)
                        .sum::<usize>(),
                );
                slices.extend(more);
            }
            // The chain was checked to lie in guest RAM, which does not go away.
            Err(_) => failed = true,
        }
    }
    let taken = if failed {
        Taken::End
    } else {
        input.read(&slices)
    };
    drop(slices);
    let mut left = if let Taken::Bytes(n) = taken { n } else { 0 };
    *bytes += left;
    let total = room.iter().sum::<usize>();
    let filled = left == total;

    let used = room
        .iter()
        .scan(left, |left, room| {
            let here = (*left).min(*room);
            *left -= here;
            (here > 0).then_some(here)
        })
        .count();
    // Put back from the newest; a chain without a byte was not needed.
    for chain in offered.drain(used..).rev() {
        receive.queue.undo_pop(chain);
    }
    for (chain, room) in offered.into_iter().zip(room) {
        let here = left.min(room);
        left -= here;
        // At most READ_LIMIT.
        receive.queue.complete(chain, here as u32)?;
    }
    Ok(Read { taken, filled })
}
