//! The versioned protocol between a supermachine host and the agent in its guest.
//!
//! `agent.proto` holds the calls and messages; this crate adds the numbers and names that both
//! sides must agree on:
//!
//! * The agent listens for ttrpc on vsock port [`AGENT_VSOCK_PORT`].
//! * It opens console port [`AGENT_CONSOLE_PORT`] once it listens, which tells the host that it is
//!   ready, and writes its log there.
//! * Console ports from [`FIRST_STDIO_PORT`] on carry the stdio of processes, one stream each. The
//!   agent opens a port when a process that uses it is created and closes it after everything was
//!   copied; then the host may use the number again.
//! * What a container wrote is read from vsock port [`CHANGES_VSOCK_PORT`]: see [`changes`].
//! * Disks are virtio-blk devices named by their serial: see [`lower_disk_serial`].
//!
//! # Examples
//!
//! ```no_run
//! use supermachine_protocol::{ttrpc, AgentClient, ConnectRequest, VERSION};
//!
//! # async fn run() -> Result<(), ttrpc::Error> {
//! let connection = ttrpc::r#async::Client::connect("unix:///run/agent.sock").await?;
//! let agent = AgentClient::new(connection);
//! let mut request = ConnectRequest::new();
//! request.protocol_version = VERSION;
//! let mut events = agent.connect(ttrpc::context::with_timeout(0), &request).await?;
//! let first = events.recv().await?;
//! assert!(first.is_some_and(|event| event.has_ready()));
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

#[allow(
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::unwrap_used
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/generated.rs"));
}

pub mod changes;

pub use generated::agent::*;
pub use generated::agent_ttrpc::{Agent, AgentClient, create_agent};
pub use {protobuf, ttrpc};

/// Version of this protocol. [`Connect`](Agent::connect) refuses any other.
pub const VERSION: u32 = 1;

/// Vsock port on which the agent listens.
pub const AGENT_VSOCK_PORT: u32 = 1024;

/// Vsock port on which the agent gives out what a container wrote ([`changes`]).
pub const CHANGES_VSOCK_PORT: u32 = 1025;

/// Console port of the agent's log; opened by the guest once the agent listens.
pub const AGENT_CONSOLE_PORT: u32 = 0;

/// Name of [`AGENT_CONSOLE_PORT`], by which the agent finds the console device.
pub const AGENT_CONSOLE_NAME: &str = "supermachine.agent";

/// First console port that carries stdio; those up to the device's last do.
pub const FIRST_STDIO_PORT: u32 = 1;

/// What the names of a container's files begin with, and the sources of their mounts.
pub const FILE_PREFIX: &str = "file-";

/// Longest serial of a virtio-blk device, in bytes (virtio 1.2, 5.2.6.1).
pub const DISK_SERIAL_MAX: usize = 20;

/// Name of a console port, as the guest sees it in sysfs.
pub fn console_port_name(port: u32) -> String {
    if port == AGENT_CONSOLE_PORT {
        AGENT_CONSOLE_NAME.to_owned()
    } else {
        format!("supermachine.stdio.{port}")
    }
}

/// Serial of a sandbox's `index`th read-only layer.
///
/// Any serial of printable ASCII will do ([`is_disk_serial`]); these are what the runtime uses.
pub fn lower_disk_serial(index: u32) -> String {
    format!("lower-{index}")
}

/// Serial of a sandbox's `index`th writable layer.
pub fn writable_disk_serial(index: u32) -> String {
    format!("writable-{index}")
}

/// Whether `serial` can name a disk: 1 to [`DISK_SERIAL_MAX`] bytes of `[A-Za-z0-9._-]`.
pub fn is_disk_serial(serial: &str) -> bool {
    (1..=DISK_SERIAL_MAX).contains(&serial.len())
        && serial
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// Why a peer's protocol cannot be spoken, or `None` if it can.
///
/// `whose` names the peer in the message ("host", "agent").
pub fn version_mismatch(whose: &str, version: u32) -> Option<String> {
    (version != VERSION).then(|| {
        format!(
            "The {whose} speaks agent protocol version {version}, this side speaks {VERSION}; \
             install a runtime and a guest image of the same release"
        )
    })
}

#[cfg(test)]
mod tests;
