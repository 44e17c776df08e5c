//! The control messages of virtio 1.2, 5.3.6.2: bytes to types and back. Pure.

#![deny(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::unwrap_used,
    clippy::panic
)]

/// Bytes of `struct virtio_console_control`: port id, event, value.
pub const CONTROL_LEN: usize = 8;

/// The longest port name sent; Linux takes what fits a control buffer of one page.
pub const MAX_NAME: usize = 128;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_REMOVE: u16 = 2;
const PORT_READY: u16 = 3;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What the driver says on the control transmit queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromDriver {
    /// The driver can take control messages, or has failed to set itself up.
    DeviceReady(bool),
    /// The driver has set up a port it was told of, or could not.
    PortReady {
        /// The port, as the driver names it.
        port: u32,
        /// Whether it worked.
        ready: bool,
    },
    /// Something in the guest opened or closed the port.
    PortOpen {
        /// The port, as the driver names it.
        port: u32,
        /// Opened, or closed.
        open: bool,
    },
}

/// A control message that means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Shorter than its fixed part.
    #[error("Control message of {len} bytes, at least {CONTROL_LEN} expected")]
    Short {
        /// Bytes the driver supplied.
        len: usize,
    },
    /// Not an event a driver sends.
    #[error("Control event {event} is none a driver sends")]
    Event {
        /// The event's number.
        event: u16,
    },
}

impl FromDriver {
    /// Reads a message from the first [`CONTROL_LEN`] bytes; more are allowed and mean nothing.
    ///
    /// # Errors
    /// [`Malformed`], naming what was found.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let &[p0, p1, p2, p3, e0, e1, v0, v1, ..] = bytes else {
            return Err(Malformed::Short { len: bytes.len() });
        };
        let port = u32::from_le_bytes([p0, p1, p2, p3]);
        let event = u16::from_le_bytes([e0, e1]);
        let value = u16::from_le_bytes([v0, v1]) != 0;
        match event {
            DEVICE_READY => Ok(Self::DeviceReady(value)),
            PORT_READY => Ok(Self::PortReady { port, ready: value }),
            PORT_OPEN => Ok(Self::PortOpen { port, open: value }),
            _ => Err(Malformed::Event { event }),
        }
    }
}

/// What the device says on the control receive queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToDriver {
    /// There is a port.
    Add,
    /// The port is gone.
    Remove,
    /// The port's name, for sysfs; at most [`MAX_NAME`] bytes of it are sent.
    Name(String),
    /// The host side of the port was opened or closed.
    Open(bool),
    /// The size of the terminal behind the port.
    Resize {
        /// Characters in a line.
        cols: u16,
        /// Lines.
        rows: u16,
    },
}

impl ToDriver {
    /// The message's bytes, for `port`.
    pub fn encode(&self, port: u32) -> Vec<u8> {
        let (event, value) = match self {
            Self::Add => (PORT_ADD, 1),
            Self::Remove => (PORT_REMOVE, 1),
            Self::Name(_) => (PORT_NAME, 1),
            Self::Open(open) => (PORT_OPEN, u16::from(*open)),
            Self::Resize { .. } => (RESIZE, 0),
        };
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&port.to_le_bytes());
        bytes.extend_from_slice(&event.to_le_bytes());
        bytes.extend_from_slice(&u16::to_le_bytes(value));
        match self {
            Self::Name(name) => {
                let name = name.as_bytes();
                bytes.extend_from_slice(name.get(..MAX_NAME).unwrap_or(name));
                // The specification leaves the end open; drivers differ on whether they add one.
                bytes.push(0);
            }
            // The text of virtio 1.2, 5.3.6.2 puts columns first. Linux always read rows first, and the
            // other devices follow it: what drivers do counts.
            Self::Resize { cols, rows } => {
                bytes.extend_from_slice(&rows.to_le_bytes());
                bytes.extend_from_slice(&cols.to_le_bytes());
            }
            Self::Add | Self::Remove | Self::Open(_) => {}
        }
        bytes
    }
}
