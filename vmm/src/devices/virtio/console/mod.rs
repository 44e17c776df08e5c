//! virtio-console with multiple ports (virtio 1.2, 5.3): byte streams between descriptors of the
//! host and character devices of the guest (`/dev/vport0p<port>`), one for each stream.
//!
//! [`Handle::attach`] connects a port to descriptors. Bytes then pass between these and the guest's
//! buffers without a copy in between, as fast as the slower side takes them: an output that is full
//! stops the guest's writer, a guest that does not read leaves an input alone. What a [`PortEvent`]
//! promises and how Linux behaves at the other end stands in `port.rs`.

mod control;
mod device;
mod endpoint;
mod handle;
mod lane;
pub mod metrics;
mod port;
mod state;
#[cfg(test)]
mod tests;
pub mod wire;
mod worker;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

pub use device::Console;
pub use handle::{Attaching, Handle};
pub use state::{ConsoleState, ControlState, GuestState, PortState, ToldState};

/// Device ID (virtio 1.2, 5.3.1).
const DEVICE_ID: u32 = 3;
/// `VIRTIO_CONSOLE_F_SIZE`: configuration space has the size of port 0.
const F_SIZE: u64 = 1 << 0;
/// `VIRTIO_CONSOLE_F_MULTIPORT`: more ports than one, and control queues.
const F_MULTIPORT: u64 = 1 << 1;

/// Queue numbers of virtio 1.2, 5.3.2.
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

/// Linux fills a receive queue with a page for each descriptor, so this is guest memory.
const RECEIVE_SIZE: u16 = 32;
/// Linux puts up to 32 KiB in each.
const TRANSMIT_SIZE: u16 = 64;

/// The most ports a console may have.
pub const MAX_PORTS: u32 = 64;
/// The number of ports when nothing else is asked for.
pub const DEFAULT_PORTS: u32 = 16;

/// How long [`Handle::attach`] waits for the guest's driver. It answers within a millisecond, on a
/// host that emulates the guest's host within a few seconds.
pub const ATTACH_LIMIT: Duration = Duration::from_secs(30);

/// The receive and transmit queue of a port (virtio 1.2, 5.3.2).
fn queues_of(port: u32) -> (u16, u16) {
    // Ports are at most MAX_PORTS.
    let receive = if port == 0 { 0 } else { (port as u16 + 1) * 2 };
    (receive, receive + 1)
}

/// The first queue of the fifth port. From it on, queues share its doorbell, as most of the ports
/// there can be are idle.
const SHARED: u16 = 10;

/// The queue whose doorbell rings for `queue`.
fn bell_of(queue: u16) -> u16 {
    queue.min(SHARED)
}

/// What a console is made from.
pub struct ConsoleConfig {
    /// Ports announced to the guest at once, from port 0. Others, up to `max_ports`, are announced
    /// when they are first attached, and cost the guest nothing until then.
    pub ports: Vec<PortConfig>,
    /// How many ports there can be, fixed when the guest's driver starts; 1 to [`MAX_PORTS`].
    pub max_ports: u32,
    /// Called for each event, on the thread that serves the device or, for [`Handle::attach`] and a
    /// reset, on the caller's. It must not block.
    pub events: Box<dyn Fn(PortEvent) + Send + Sync>,
}

impl fmt::Debug for ConsoleConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsoleConfig")
            .field("ports", &self.ports)
            .field("max_ports", &self.max_ports)
            .finish_non_exhaustive()
    }
}

/// One port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortConfig {
    /// Shown in the guest as `/sys/class/virtio-ports/vport0p<port>/name`; empty for none.
    pub name: String,
}

/// What a port is connected to. Both are set to non-blocking.
#[derive(Debug, Default)]
pub struct PortEnds {
    /// Where the guest's input comes from; nothing is read before the guest opens the port.
    pub input: Option<OwnedFd>,
    /// Where the guest's output goes; without one it is discarded.
    pub output: Option<OwnedFd>,
}

/// What happened to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortEvent {
    /// The guest has opened an attached port.
    Opened(u32),
    /// The guest has closed the port; everything it wrote has been written to the output, or the
    /// output had failed; both ends are closed and the port can be attached again. Also reported,
    /// without the output's promise, after a [`Handle::detach`], when the driver resets and when the
    /// device fails.
    Closed(u32),
    /// The input has ended, all of it is in the guest's buffers, and the guest was told of the end.
    InputEnded(u32),
}

/// Why the console refused.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The configuration asks for too many ports, or none.
    #[error("Console of {max_ports} ports with {named} of them named, 1 to {MAX_PORTS} expected")]
    Ports {
        /// Ports asked for.
        max_ports: u32,
        /// Ports configured.
        named: usize,
    },
    /// There is no such port.
    #[error("Console has no port {port}, only {ports} ports from 0")]
    NoPort {
        /// The port asked for.
        port: u32,
        /// How many there are.
        ports: u32,
    },
    /// The port is attached, or the guest has not closed it since it was.
    #[error("Console port {port} is in use")]
    Busy {
        /// The port asked for.
        port: u32,
    },
    /// The guest's driver did not take note; the port is detached again.
    #[error("Guest did not answer the opening of console port {port} within {limit:?}")]
    Unanswered {
        /// The port asked for.
        port: u32,
        /// How long was waited.
        limit: Duration,
    },
    /// The host is out of descriptors.
    #[error("Cannot make the console's doorbell")]
    Doorbell(#[source] io::Error),
}
