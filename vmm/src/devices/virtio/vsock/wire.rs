//! Packets of virtio 1.2, 5.10.6: bytes to types and back. Pure.

#![deny(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::unwrap_used,
    clippy::panic
)]

/// Bytes of `struct virtio_vsock_hdr`.
pub const HEADER_LEN: usize = 44;

/// The host's context id.
pub const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`
pub const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// There is no such connection, or it is over.
    Reset = 3,
    /// The sender will not send, or not receive, any more.
    Shutdown = 4,
    /// Bytes of the stream.
    Data = 5,
    /// Tells the sender's buffer space.
    CreditUpdate = 6,
    /// Asks for the receiver's buffer space.
    CreditRequest = 7,
}

impl Op {
    fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A packet's header as it is on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes behind the header.
    pub len: u32,
    /// Kind of socket.
    pub kind: u16,
    /// An [`Op`], perhaps.
    pub op: u16,
    /// Meaning depends on the operation.
    pub flags: u32,
    /// Bytes of buffer the sender has for the connection.
    pub buf_alloc: u32,
    /// Bytes its application has taken from it so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header; any bytes make one.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut fields = Fields(bytes);
        Self {
            src_cid: u64::from_le_bytes(fields.take()),
            dst_cid: u64::from_le_bytes(fields.take()),
            src_port: u32::from_le_bytes(fields.take()),
            dst_port: u32::from_le_bytes(fields.take()),
            len: u32::from_le_bytes(fields.take()),
            kind: u16::from_le_bytes(fields.take()),
            op: u16::from_le_bytes(fields.take()),
            flags: u32::from_le_bytes(fields.take()),
            buf_alloc: u32::from_le_bytes(fields.take()),
            fwd_cnt: u32::from_le_bytes(fields.take()),
        }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let fields = [
            &self.src_cid.to_le_bytes()[..],
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; HEADER_LEN];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    /// The reset that answers this packet where there is no connection for it (virtio 1.2,
    /// 5.10.6.4); none for a reset, or two sides could go on for ever.
    pub fn reset_reply(&self) -> Option<Self> {
        (self.op != Op::Reset as u16).then_some(Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        })
    }

    /// Checks a packet from the guest with context id `cid`, which has `payload` bytes behind its
    /// header, and tells its operation.
    ///
    /// # Errors
    /// What the device must not act on.
    pub fn check(&self, cid: u32, payload: u64) -> Result<Op, Refusal> {
        if self.src_cid != u64::from(cid) {
            return Err(Refusal::Forged);
        }
        if u64::from(self.len) > payload {
            return Err(Refusal::Short);
        }
        if self.dst_cid != HOST_CID {
            return Err(Refusal::NotForHost);
        }
        if self.kind != TYPE_STREAM {
            return Err(Refusal::Type);
        }
        Op::from_wire(self.op).ok_or(Refusal::Op)
    }
}

/// Takes fields off the front.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }
}

/// Why a packet is not acted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The sender is not the guest; there is nobody to answer.
    #[error("Packet's source is not the guest")]
    Forged,
    /// The chain has fewer bytes than the header says.
    #[error("Packet is shorter than its header says")]
    Short,
    /// The packet is for someone this device does not reach.
    #[error("Packet is not for the host")]
    NotForHost,
    /// Not a stream.
    #[error("Packet is of a type other than stream")]
    Type,
    /// An operation that does not exist.
    #[error("Packet's operation is unknown")]
    Op,
}
