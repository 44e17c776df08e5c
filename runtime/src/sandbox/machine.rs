//! What a sandbox needs of its virtual machine, so that it can be tested without one.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use supermachine_protocol as protocol;
use tokio::net::UnixStream;
use tokio::sync::mpsc::UnboundedReceiver;

use super::error::Error;
use crate::hooks::Hooks;
use crate::plan::MachineSize;
use crate::request;

/// Makes a running machine out of a request.
#[async_trait]
pub(super) trait Launcher: Send + Sync {
    /// Plans, acquires, boots. When it fails, or its future is dropped, nothing is left.
    async fn launch(&self, request: &request::Create) -> Result<Launched, Error>;
}

/// A machine whose processors run.
pub(super) struct Launched {
    pub(super) machine: Arc<dyn Machine>,
    /// Ends after `Event::Ended`.
    pub(super) events: UnboundedReceiver<Event>,
    /// The container as its agent is to make it.
    pub(super) guest: GuestContainer,
    /// What the host runs around the container's life.
    pub(super) hooks: Hooks,
}

/// What the agent is told of a container.
#[derive(Debug)]
pub(super) struct GuestContainer {
    pub(super) rootfs: protocol::Rootfs,
    pub(super) spec_json: Vec<u8>,
    pub(super) files: Vec<protocol::FileContent>,
    pub(super) hostname: String,
}

/// A running machine.
#[async_trait]
pub(super) trait Machine: Send + Sync {
    /// The host process that stands for it.
    fn pid(&self) -> u32;

    /// Opens a console port to the guest, between these files.
    async fn attach(
        &self,
        port: u32,
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
    ) -> Result<(), Error>;

    /// Closes the host's side of a console port.
    async fn detach(&self, port: u32);

    /// A connection to the agent, which listens already.
    async fn dial_agent(&self) -> Result<UnixStream, Error>;

    /// Has the guest tell what a container wrote, and puts it into the container's snapshot. Returns
    /// within the time that the configuration gives, whatever the guest does.
    async fn save_changes(&self, container_id: &str) -> Result<(), Error>;

    /// How large it is.
    fn size(&self) -> MachineSize;

    /// Stops its processors; returns when they have stopped.
    async fn pause(&self) -> Result<(), Error>;

    /// Lets its processors go on.
    async fn resume(&self) -> Result<(), Error>;

    /// Asks the guest to give back this much of its memory, in all.
    async fn set_balloon(&self, bytes: u64) -> Result<(), Error>;

    /// Lets it run on these of the host's processors alone.
    async fn set_cpuset(&self, cpuset: String) -> Result<(), Error>;

    /// Has a process of the host's end with the machine: by itself, or after a while by force.
    fn adopt(&self, pid: u32) -> Result<(), Error>;

    /// Ends it by force; `Event::Ended` follows.
    async fn kill(&self);

    /// Gives back everything that was acquired for it, after its end.
    async fn release(&self);

    /// The last lines it logged, for whoever has to find out why it failed; empty if there are none.
    fn last_words(&self) -> String;

    /// Resolves when it logs nothing more: after its end.
    async fn log_ended(&self);
}

/// What happens in a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The guest opened its side of a console port.
    PortOpened(u32),
    /// The guest closed its side, and what it wrote has been delivered.
    PortClosed(u32),
    /// It is gone; comes exactly once and last.
    Ended {
        /// Why, in words.
        reason: String,
        how: Ending,
    },
}

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Its guest switched off.
    Orderly,
    /// Its process was killed.
    Killed,
    /// By itself, and nobody wanted it to: its kernel panicked, or the VMM failed.
    Failed,
}

/// How long to wait for what.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timeouts {
    /// From a booted machine to a listening agent.
    pub(super) boot: Duration,
    /// Any call to the agent.
    pub(super) call: Duration,
    /// From the wish to stop a machine to its end; then force is used.
    pub(super) stop: Duration,
    /// From a process's end to the end of its output.
    pub(super) drain: Duration,
}
