//! virtio-vsock (virtio 1.2, 5.10): stream connections from programs of the host to sockets of the
//! guest.
//!
//! A host program connects to the device's unix socket, writes `CONNECT <port>\n` with a port in
//! decimal, and reads `OK <host port>\n` once a program in the guest has accepted, or the end of the
//! stream when there is none. From then on bytes pass both ways; to shut down one direction is
//! passed on. Programs that connect before the guest's driver is up wait in the socket's backlog.
//!
//! Nobody in the host listens for the guest: its requests are answered with a reset. Nothing but
//! streams is offered. When the driver resets the device, all connections end; and when the guest goes
//! on from a snapshot, which it is told on the event queue.

mod connection;
mod device;
mod listener;
pub mod metrics;
mod muxer;
mod state;
mod stream;
#[cfg(test)]
mod tests;
pub mod wire;
mod worker;

use std::io;
use std::os::unix::net::UnixListener;

pub use device::Vsock;
pub use state::VsockState;

/// Device ID (virtio 1.2, 5.10.1).
const DEVICE_ID: u32 = 19;
/// `VIRTIO_VSOCK_F_STREAM`
const F_STREAM: u64 = 1 << 0;

/// Queue numbers of virtio 1.2, 5.10.2. The event queue tells of a restore.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2, 5.10.6.7): all connections are gone, and the
/// context id may be another.
const TRANSPORT_RESET: u32 = 0;

/// Linux fills the receive queue with a page for each descriptor.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];

/// Connections at a time; more wait in the socket's backlog. With the buffer of each connection
/// this bounds what a guest can make the host keep: 16 MiB.
pub const MAX_CONNECTIONS: usize = 128;

/// The lowest context id a guest can have (virtio 1.2, 5.10.4).
pub const MIN_CID: u32 = 3;

/// What a vsock device is made from.
#[derive(Debug)]
pub struct VsockConfig {
    /// The guest's context id, from [`MIN_CID`] to 2^32 - 2.
    pub cid: u32,
    /// Where host programs connect; set to non-blocking.
    pub listener: UnixListener,
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// Ids below are reserved, and the highest means "any".
    #[error("Context id {cid} is reserved, {MIN_CID} to 4294967294 expected")]
    Cid {
        /// The id asked for.
        cid: u32,
    },
    /// The listener is not usable.
    #[error("Cannot use the vsock listener")]
    Listener(#[source] io::Error),
}
