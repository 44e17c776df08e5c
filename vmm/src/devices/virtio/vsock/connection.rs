//! A connection between a host's socket and a guest's, without either: states, credit, and what the
//! guest is to be told next (virtio 1.2, 5.10.6.3 to 5.10.6.5). Pure.

#![deny(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::unwrap_used,
    clippy::panic
)]

use super::wire::{
    HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};

/// Bytes the guest may send of one connection before the host's socket takes them.
pub(super) const BUFFER: u32 = 128 << 10;

/// What a packet from the guest means for its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Nothing beyond what the connection has noted.
    Noted,
    /// The guest accepts the connection.
    Accepted,
    /// This many bytes of payload are for the host.
    Data(u32),
    /// The guest has said that it will not send, or not receive, any more.
    Shutdown,
    /// The guest has ended or refused the connection.
    Reset,
    /// The packet breaks the rules: reset the connection.
    Violation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// To be requested.
    New,
    /// Requested.
    Requested,
    Open,
}

#[derive(Debug)]
pub(super) struct Connection {
    cid: u32,
    host_port: u32,
    guest_port: u32,
    phase: Phase,
    /// Space in the guest's buffer, and how much it has taken out of it, modulo 2^32.
    guest_alloc: u32,
    guest_taken: u32,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    /// Bytes the guest sent, and those the host's socket has taken, modulo 2^32.
    received: u32,
    forwarded: u32,
    /// The last value of `forwarded` the guest was told.
    told_forwarded: u32,
    /// What the guest will not do any more, and the host; as flags of a shutdown packet.
    guest_shutdown: u32,
    host_shutdown: u32,
    told_shutdown: u32,
    credit_update_due: bool,
    credit_request: Ask,
}

/// Whether the guest is to be asked for credit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ask {
    No,
    Due,
    Asked,
}

impl Connection {
    pub(super) fn new(cid: u32, host_port: u32, guest_port: u32) -> Self {
        Self {
            cid,
            host_port,
            guest_port,
            phase: Phase::New,
            guest_alloc: 0,
            guest_taken: 0,
            sent: 0,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            guest_shutdown: 0,
            host_shutdown: 0,
            told_shutdown: 0,
            credit_update_due: false,
            credit_request: Ask::No,
        }
    }

    pub(super) fn guest_port(&self) -> u32 {
        self.guest_port
    }

    pub(super) fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Whether the guest will receive (send) no more.
    pub(super) fn guest_is(&self, shutdown: u32) -> bool {
        self.guest_shutdown & shutdown == shutdown
    }

    /// Whether the guest knows that the host will neither send nor receive.
    pub(super) fn is_closed_by_host(&self) -> bool {
        self.told_shutdown == SHUTDOWN_BOTH
    }

    /// Bytes that may be sent to the guest now.
    pub(super) fn credit(&self) -> u32 {
        // A guest that claims to have taken more than it was sent only has less credit for it.
        self.guest_alloc
            .saturating_sub(self.sent.wrapping_sub(self.guest_taken))
    }

    /// Takes note of a packet.
    pub(super) fn hear(&mut self, op: Op, header: &Header) -> Heard {
        if op == Op::Reset {
            return Heard::Reset;
        }
        // Every packet carries it (virtio 1.2, 5.10.6.3).
        self.guest_alloc = header.buf_alloc;
        self.guest_taken = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_request = Ask::No;
        }
        match (self.phase, op) {
            (Phase::Requested, Op::Response) => {
                self.phase = Phase::Open;
                Heard::Accepted
            }
            (Phase::Open, Op::Data) => {
                let space = BUFFER.saturating_sub(self.received.wrapping_sub(self.forwarded));
                if self.guest_is(SHUTDOWN_SEND) || header.len > space {
                    return Heard::Violation;
                }
                self.received = self.received.wrapping_add(header.len);
                Heard::Data(header.len)
            }
            (Phase::Open, Op::Shutdown) => {
                self.guest_shutdown |= header.flags & SHUTDOWN_BOTH;
                Heard::Shutdown
            }
            (Phase::Open, Op::CreditRequest) => {
                self.credit_update_due = true;
                Heard::Noted
            }
            (Phase::Open, Op::CreditUpdate) => Heard::Noted,
            _ => Heard::Violation,
        }
    }

    /// The host's socket has taken `bytes` of what the guest sent.
    pub(super) fn forward(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
        // The guest stops when it believes the buffer to be full: tell it in good time, but not of
        // every few bytes.
        let believed = BUFFER.saturating_sub(self.received.wrapping_sub(self.told_forwarded));
        if believed < BUFFER / 2 && self.forwarded != self.told_forwarded {
            self.credit_update_due = true;
        }
    }

    /// There is something to send and no credit for it.
    pub(super) fn want_credit(&mut self) {
        if self.credit_request == Ask::No {
            self.credit_request = Ask::Due;
        }
    }

    /// The host will not send, or not receive, any more; flags of a shutdown packet.
    pub(super) fn host_shuts_down(&mut self, flags: u32) {
        self.host_shutdown |= flags;
    }

    pub(super) fn host_is(&self, shutdown: u32) -> bool {
        self.host_shutdown & shutdown == shutdown
    }

    /// Whether [`next_message`](Self::next_message) has something.
    pub(super) fn has_message(&self) -> bool {
        match self.phase {
            Phase::New => true,
            Phase::Requested => false,
            Phase::Open => {
                self.host_shutdown != self.told_shutdown
                    || self.credit_request == Ask::Due
                    || self.credit_update_due
            }
        }
    }

    /// The next packet without payload for the guest.
    pub(super) fn next_message(&mut self) -> Option<Header> {
        if !self.has_message() {
            return None;
        }
        let (op, flags) = if self.phase == Phase::New {
            self.phase = Phase::Requested;
            (Op::Request, 0)
        } else if self.host_shutdown != self.told_shutdown {
            self.told_shutdown = self.host_shutdown;
            (Op::Shutdown, self.host_shutdown)
        } else if self.credit_request == Ask::Due {
            self.credit_request = Ask::Asked;
            (Op::CreditRequest, 0)
        } else {
            (Op::CreditUpdate, 0)
        };
        Some(self.header(op, flags, 0))
    }

    /// The header for `len` bytes of payload, which are thereby sent.
    pub(super) fn data(&mut self, len: u32) -> Header {
        self.sent = self.sent.wrapping_add(len);
        self.header(Op::Data, 0, len)
    }

    /// The packet that ends the connection.
    pub(super) fn reset(&mut self) -> Header {
        self.header(Op::Reset, 0, 0)
    }

    fn header(&mut self, op: Op, flags: u32, len: u32) -> Header {
        // Every packet tells the credit.
        self.told_forwarded = self.forwarded;
        self.credit_update_due = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: u64::from(self.cid),
            src_port: self.host_port,
            dst_port: self.guest_port,
            len,
            kind: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc: BUFFER,
            fwd_cnt: self.forwarded,
        }
    }

    /// Whether the guest has declared the end of both directions.
    pub(super) fn is_closed_by_guest(&self) -> bool {
        self.guest_is(SHUTDOWN_SEND | SHUTDOWN_RECEIVE)
    }
}
