//! The connections: which host socket belongs to which of the guest's, and whose turn it is.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::MAX_CONNECTIONS;
use super::connection::{Connection, Heard};
use super::listener::Listener;
use super::metrics::Metrics;
use super::stream::{Greeting, Stream};
use super::wire::{
    HEADER_LEN, Header, Op, Refusal, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};
use crate::devices::virtio::queue::{Chain, Reader};
use crate::sys::reactor::{Control, Interest, Readiness};

/// Token of the listener; a connection's token is its host port, which is below.
pub(super) const LISTENER: usize = 0x8000_0000;

/// Resets on their way beyond which nothing more is read from the guest (virtio 1.2, 5.10.6.1.2).
const MAX_RESETS: usize = 64;

/// Connections accepted before others get their turn.
const TURN_ACCEPTS: usize = 16;

/// The most payload of a packet.
const MAX_PAYLOAD: u64 = 64 << 10;

/// How long the guest may take to answer a request. Its kernel answers, not a program.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// How long the guest may take to agree that a connection the host has closed is over; Linux waits
/// as long.
const CLOSE_LIMIT: Duration = Duration::from_secs(8);

#[derive(Debug)]
enum Stage {
    /// The host program has yet to say what it wants.
    Greeting,
    /// Requested of the guest, or open.
    Connected(Connection),
    /// The guest has ended the connection; the host has yet to take what came before.
    Flushing,
}

#[derive(Debug)]
struct Peer {
    stream: Stream,
    stage: Stage,
    /// What the reactor was told to watch.
    interest: Interest,
    /// In the queue of those that have something to say.
    speaking: bool,
    /// The host's socket has something to read, or its end: in the queue of those, or parked.
    readable: bool,
    /// Taken out of that queue for want of credit, or because the guest has not accepted yet.
    parked: bool,
}

#[derive(Debug)]
pub(super) struct Muxer {
    cid: u32,
    listener: Listener,
    metrics: Arc<Metrics>,
    /// By host port.
    peers: HashMap<u32, Peer>,
    speaking: VecDeque<u32>,
    readable: VecDeque<u32>,
    resets: VecDeque<Header>,
    /// Whether the listener is watched.
    accepting: bool,
    /// Whether programs have to wait: the guest is not ready for them.
    held: bool,
}

/// What was done with a buffer of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// So many bytes were written.
    Bytes(u32),
    /// There was nothing to say after all.
    Nothing,
    /// It has no room for what there was to say.
    Unfit,
}

impl Muxer {
    pub(super) fn new(cid: u32, listener: UnixListener, metrics: Arc<Metrics>, held: bool) -> Self {
        Self {
            cid,
            listener: Listener::new(listener),
            metrics,
            peers: HashMap::new(),
            speaking: VecDeque::new(),
            readable: VecDeque::new(),
            resets: VecDeque::new(),
            accepting: false,
            held,
        }
    }

    /// Watches the listener, and the connections there are when the worker was held still.
    pub(super) fn start(&mut self, control: &mut Control<'_>) -> io::Result<()> {
        self.accepting = self.has_room();
        let interest = if self.accepting {
            Interest::READ
        } else {
            Interest::NONE
        };
        control.add(&self.listener, LISTENER, interest)?;
        for (port, peer) in &self.peers {
            control.add(&peer.stream, *port as usize, peer.interest)?;
            // Whatever time it had, it has again.
            match &peer.stage {
                Stage::Connected(connection) if !connection.is_open() => {
                    control.wake_at(*port as usize, Instant::now() + CONNECT_LIMIT);
                }
                Stage::Connected(connection) if connection.is_closed_by_host() => {
                    control.wake_at(*port as usize, Instant::now() + CLOSE_LIMIT);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Stops watching everything.
    pub(super) fn stop(&mut self, control: &mut Control<'_>) {
        control.remove(LISTENER);
        for port in std::mem::take(&mut self.peers).into_keys() {
            control.remove(port as usize);
            control.cancel_wake(port as usize);
        }
    }

    /// Whether there are so many answers waiting that the guest must take some first.
    pub(super) fn is_congested(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// Whether there may be something to say to the guest.
    pub(super) fn has_something(&self) -> bool {
        !(self.resets.is_empty() && self.speaking.is_empty() && self.readable.is_empty())
    }

    /// Takes in host programs.
    pub(super) fn accept(&mut self, control: &mut Control<'_>) {
        for _ in 0..TURN_ACCEPTS {
            if !self.has_room() {
                break;
            }
            let stream = match self.listener.accept() {
                Ok(Some(socket)) => Stream::new(socket),
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "A vsock connection was not accepted");
                    break;
                }
            };
            let port = self.free_port();
            let added = stream.and_then(|stream| {
                control
                    .add(&stream, port as usize, Interest::READ)
                    .map(|()| stream)
            });
            match added {
                Ok(stream) => {
                    self.metrics.accepted.add(1);
                    let peer = Peer {
                        stream,
                        stage: Stage::Greeting,
                        interest: Interest::READ,
                        speaking: false,
                        readable: false,
                        parked: false,
                    };
                    self.peers.insert(port, peer);
                }
                Err(error) => tracing::warn!(%error, "A vsock connection can't be watched"),
            }
        }
        self.watch_listener(control);
    }

    /// Keeps programs waiting, or takes them in.
    pub(super) fn hold(&mut self, held: bool, control: &mut Control<'_>) {
        self.held = held;
        self.watch_listener(control);
    }

    fn has_room(&self) -> bool {
        !self.held && self.peers.len() < MAX_CONNECTIONS
    }

    fn watch_listener(&mut self, control: &mut Control<'_>) {
        let room = self.has_room();
        if room != self.accepting {
            self.accepting = room;
            let interest = if room { Interest::READ } else { Interest::NONE };
            if let Err(error) = control.set_interest(LISTENER, interest) {
                tracing::error!(%error, "The vsock listener can't be watched");
            }
        }
    }

    /// A port no connection has; random, so that it is not one a restored guest remembers.
    fn free_port(&self) -> u32 {
        loop {
            // Keyed anew each time by the standard library.
            let random = RandomState::new().build_hasher().finish();
            // Above what programs of a guest would take for well known, below the listener's token.
            let port = 0x4000_0000 | (random as u32 & 0x3fff_ffff);
            if !self.peers.contains_key(&port) {
                return port;
            }
        }
    }

    /// Acts on what happened to a connection's socket or timer.
    pub(super) fn event(&mut self, port: u32, readiness: Readiness, control: &mut Control<'_>) {
        let Some(peer) = self.peers.get_mut(&port) else {
            return;
        };
        match &mut peer.stage {
            Stage::Greeting => match peer.stream.greet() {
                Greeting::Unfinished => {}
                Greeting::Connect(guest_port) => {
                    let connection = Connection::new(self.cid, port, guest_port);
                    peer.stage = Stage::Connected(connection);
                    control.wake_at(port as usize, Instant::now() + CONNECT_LIMIT);
                }
                Greeting::Bad => {
                    self.metrics.bad_greetings.add(1);
                    return self.remove(port, control);
                }
            },
            Stage::Connected(connection) => {
                let overdue = !connection.is_open() || connection.is_closed_by_host();
                let gave_up =
                    !connection.is_open() && readiness.readable && peer.stream.is_abandoned();
                if (readiness.timer && overdue) || gave_up {
                    return self.reset(port, control);
                }
                if readiness.readable && !peer.readable {
                    peer.readable = true;
                    peer.parked = !connection.is_open();
                    if !peer.parked {
                        self.readable.push_back(port);
                    }
                }
                if readiness.writable {
                    connection.forward(flush(&mut peer.stream, &self.metrics));
                }
            }
            Stage::Flushing => {
                flush(&mut peer.stream, &self.metrics);
            }
        }
        self.settle(port, control);
    }

    /// Acts on a packet of the guest; `payload` is what the chain has behind the header.
    pub(super) fn hear(&mut self, header: &Header, payload: Reader<'_>, control: &mut Control<'_>) {
        self.metrics.packets_received.add(1);
        let port = header.dst_port;
        let ours = self.peers.get(&port).is_some_and(|peer| match &peer.stage {
            Stage::Connected(connection) => connection.guest_port() == header.src_port,
            Stage::Greeting | Stage::Flushing => false,
        });
        let op = match header.check(self.cid, payload.remaining()) {
            Ok(op) if ours => op,
            Ok(op) => {
                if op != Op::Reset {
                    self.metrics.packets_refused.add(1);
                    self.resets.extend(header.reset_reply());
                }
                return;
            }
            Err(refusal) => {
                self.metrics.packets_refused.add(1);
                tracing::debug!(%refusal, ?header, "Vsock packet refused");
                match refusal {
                    Refusal::Short | Refusal::Op if ours => self.violation(port, control),
                    Refusal::Forged => {}
                    _ => self.resets.extend(header.reset_reply()),
                }
                return;
            }
        };
        let Some(Peer {
            stream,
            stage,
            readable,
            parked,
            ..
        }) = self.peers.get_mut(&port)
        else {
            return;
        };
        let Stage::Connected(connection) = stage else {
            return;
        };
        let was_open = connection.is_open();
        match connection.hear(op, header) {
            Heard::Noted => {}
            Heard::Accepted => {
                self.metrics.established.add(1);
                control.cancel_wake(port as usize);
                stream.accepted(port);
                flush(stream, &self.metrics);
                if *readable {
                    *parked = false;
                    self.readable.push_back(port);
                }
            }
            Heard::Data(len) => {
                let done = stream.write(payload, len);
                self.metrics.guest_bytes.add(u64::from(done));
                connection.forward(done);
            }
            Heard::Shutdown => {
                if connection.guest_is(SHUTDOWN_RECEIVE) {
                    stream.stop_reading();
                }
                if connection.guest_is(SHUTDOWN_SEND) {
                    stream.finish();
                    connection.forward(flush(stream, &self.metrics));
                }
            }
            Heard::Reset if was_open => {
                // What it sent before is the host's.
                *stage = Stage::Flushing;
                control.cancel_wake(port as usize);
                stream.finish();
                flush(stream, &self.metrics);
            }
            Heard::Reset => {
                self.metrics.refused.add(1);
                return self.remove(port, control);
            }
            Heard::Violation => return self.violation(port, control),
        }
        self.settle(port, control);
    }

    fn violation(&mut self, port: u32, control: &mut Control<'_>) {
        self.metrics.violations.add(1);
        self.reset(port, control);
    }

    /// Ends a connection and tells the guest.
    fn reset(&mut self, port: u32, control: &mut Control<'_>) {
        if let Some(Peer {
            stage: Stage::Connected(connection),
            ..
        }) = self.peers.get_mut(&port)
        {
            self.resets.push_back(connection.reset());
        }
        self.remove(port, control);
    }

    fn remove(&mut self, port: u32, control: &mut Control<'_>) {
        control.remove(port as usize);
        control.cancel_wake(port as usize);
        // Where it still stands in a queue, it is passed over.
        self.peers.remove(&port);
        self.watch_listener(control);
    }

    /// Draws the consequences of whatever was done to a connection.
    fn settle(&mut self, port: u32, control: &mut Control<'_>) {
        let Some(peer) = self.peers.get_mut(&port) else {
            return;
        };
        let blocked = !peer.stream.is_flushed() && !peer.stream.is_deaf();
        let wanted = match &mut peer.stage {
            Stage::Greeting => Interest::READ,
            Stage::Flushing if blocked => Interest::WRITE,
            Stage::Flushing => return self.remove(port, control),
            Stage::Connected(connection) => {
                if connection.is_closed_by_guest() && !blocked {
                    return self.reset(port, control);
                }
                if peer.stream.is_deaf() {
                    connection.host_shuts_down(SHUTDOWN_RECEIVE);
                }
                if peer.parked && connection.is_open() && connection.credit() > 0 {
                    peer.parked = false;
                    self.readable.push_back(port);
                }
                if connection.has_message() && !peer.speaking {
                    peer.speaking = true;
                    self.speaking.push_back(port);
                }
                let more = !connection.host_is(SHUTDOWN_SEND)
                    && !connection.guest_is(SHUTDOWN_RECEIVE)
                    && !peer.readable;
                Interest {
                    read: more,
                    write: blocked,
                }
            }
        };
        if wanted != peer.interest {
            peer.interest = wanted;
            if let Err(error) = control.set_interest(port as usize, wanted) {
                tracing::error!(%error, "A vsock connection can't be watched");
            }
        }
    }

    /// Fills a buffer of the guest, which has room for a header: resets first, then what else is
    /// said of connections, so that data can't keep these waiting, then data, in turn.
    pub(super) fn fill(&mut self, chain: &Chain, control: &mut Control<'_>) -> Filled {
        loop {
            if let Some(header) = self.next_message(control) {
                return self.send(&header, chain);
            }
            let Some(port) = self.readable.pop_front() else {
                return Filled::Nothing;
            };
            let Some(peer) = self.peers.get_mut(&port) else {
                continue;
            };
            let Stage::Connected(connection) = &mut peer.stage else {
                continue;
            };
            if connection.guest_is(SHUTDOWN_RECEIVE) {
                continue;
            }
            if connection.credit() == 0 {
                peer.parked = true;
                connection.want_credit();
                self.settle(port, control);
                continue;
            }
            let room = chain
                .writable_len()
                .saturating_sub(HEADER_LEN as u64)
                .min(MAX_PAYLOAD);
            let room = room.min(u64::from(connection.credit()));
            if room == 0 {
                self.readable.push_front(port);
                return Filled::Unfit;
            }
            let mut writer = chain.writer();
            let read = writer
                .skip(HEADER_LEN as u64)
                .and_then(|()| writer.slices(room))
                .map_err(io::Error::other)
                .and_then(|slices| peer.stream.read(&slices));
            match read {
                Ok(0) => self.host_ended(port, control),
                Ok(bytes) => {
                    self.metrics.host_bytes.add(bytes as u64);
                    let header = connection.data(bytes as u32);
                    if bytes as u64 == room {
                        self.readable.push_back(port);
                    } else {
                        peer.readable = false;
                    }
                    self.settle(port, control);
                    return self.send(&header, chain);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    peer.readable = false;
                    self.settle(port, control);
                }
                Err(_) => self.host_ended(port, control),
            }
        }
    }

    /// The host's socket has been read to its end.
    fn host_ended(&mut self, port: u32, control: &mut Control<'_>) {
        let Some(peer) = self.peers.get_mut(&port) else {
            return;
        };
        let Stage::Connected(connection) = &mut peer.stage else {
            return;
        };
        let abandoned = peer.stream.is_abandoned();
        connection.host_shuts_down(if abandoned {
            SHUTDOWN_BOTH
        } else {
            SHUTDOWN_SEND
        });
        self.settle(port, control);
    }

    fn next_message(&mut self, control: &mut Control<'_>) -> Option<Header> {
        if let Some(header) = self.resets.pop_front() {
            self.metrics.resets_sent.add(1);
            return Some(header);
        }
        while let Some(port) = self.speaking.pop_front() {
            let Some(peer) = self.peers.get_mut(&port) else {
                continue;
            };
            peer.speaking = false;
            let Stage::Connected(connection) = &mut peer.stage else {
                continue;
            };
            let Some(header) = connection.next_message() else {
                continue;
            };
            if connection.is_closed_by_host() && header.op == Op::Shutdown as u16 {
                control.wake_at(port as usize, Instant::now() + CLOSE_LIMIT);
            }
            self.settle(port, control);
            return Some(header);
        }
        None
    }

    fn send(&self, header: &Header, chain: &Chain) -> Filled {
        self.metrics.packets_sent.add(1);
        match chain.writer().write_all(&header.encode()) {
            // At most MAX_PAYLOAD and the header.
            Ok(()) => Filled::Bytes(HEADER_LEN as u32 + header.len),
            // The chain was checked to have the room and to lie in guest RAM.
            Err(_) => Filled::Unfit,
        }
    }
}

/// Writes out what the host takes, and counts it.
fn flush(stream: &mut Stream, metrics: &Metrics) -> u32 {
    let done = stream.flush();
    metrics.guest_bytes.add(u64::from(done));
    done
}
