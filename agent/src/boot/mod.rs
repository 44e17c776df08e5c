//! From the kernel's first instruction in user space to a listening agent.

mod modules;
mod mounts;
mod network;

use std::process::ExitCode;

use nix::sys::reboot::{RebootMode, reboot};
use supermachine_protocol::AGENT_VSOCK_PORT;
use tokio::runtime::Builder;

use crate::error::Error;
use crate::identity::{self, About};
use crate::platform::{self, Guest};
use crate::uevent::Uevents;
use crate::{changes, log, start, workshop};

/// VMADDR_CID_ANY: whatever number the guest has.
const ANY_CID: u32 = u32::MAX;
/// Where the agent keeps its files.
const DIRECTORY: &str = "/run/supermachine";

/// Runs the guest. Returns only if this is not PID 1 or the guest cannot be set up.
pub fn main() -> ExitCode {
    let init = identity::uptime();
    log::start();
    if std::process::id() != 1 {
        tracing::error!("this is the init process of a supermachine guest, not a command");
        return ExitCode::from(2);
    }
    match run(init) {
        Ok(()) => tracing::error!("the agent has stopped serving"),
        Err(error) => tracing::error!(%error, "the guest cannot be set up"),
    }
    power_off();
    ExitCode::FAILURE
}

fn run(init: std::time::Duration) -> Result<(), Error> {
    mounts::mount_all()?;
    modules::load();
    network::loopback_up();
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::system("start the runtime"))?;
    runtime.block_on(async {
        let uevents = Uevents::listen().map_err(Error::system("listen for devices"))?;
        let (guest, port) = Guest::find(uevents).await?;
        let workshop = workshop(Box::new(guest), DIRECTORY.as_ref())?;
        let about = About {
            init,
            listening: identity::uptime(),
        };
        let address = format!("vsock://{ANY_CID}:{AGENT_VSOCK_PORT}");
        let changes = changes::listen_on_vsock()?;
        let _server = start(&address, changes, workshop, about, Some(power_off)).await?;
        // The host takes the opening itself for readiness: nothing may open the port before.
        log::use_port(platform::open(&port)?);
        tracing::info!(uptime = ?about.listening, "listening");
        std::future::pending::<()>().await;
        Ok(())
    })
}

/// Writes file systems out and ends the machine.
fn power_off() {
    nix::unistd::sync();
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    tracing::error!(%error, "cannot power off");
}
