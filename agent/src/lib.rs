//! The agent: PID 1 of a supermachine guest.
//!
//! It mounts what a Linux system needs, listens on vsock for its host, assembles root file systems
//! from disks, runs containers in them with libcontainer, and copies their streams to and from
//! console ports. Everything happens on one thread, between system calls that don't wait; only
//! unmounting gets a thread of its own, and each process is made by a re-executed helper.
//!
//! [`boot::main`] is the guest's `/init`. [`serve`] is the part below it, which runs on any Linux
//! with cgroup v2 and is how the agent is tested without a machine.

#![deny(unsafe_code)]

mod bundle;
mod cgroup;
mod changes;
mod container;
mod devices;
mod engine;
mod error;
mod events;
mod files;
mod identity;
mod limits;
mod log;
mod oom;
mod partition;
mod platform;
mod process;
mod pump;
mod reaper;
mod rootfs;
mod server;
mod stats;
mod stdio;
mod sys;
mod sysctl;
mod uevent;

pub mod boot;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use supermachine_protocol::{create_agent, ttrpc};

pub use engine::helper::main as helper_main;
pub use error::Error;
pub use platform::{Disk, Platform, Port};

use container::Workshop;
use identity::About;

/// Serves the agent's calls at `address` ("vsock://…" or "unix://…") until the server is dropped,
/// and changes of containers to whoever connects to `changes`.
///
/// `directory` holds everything the agent keeps: it must exist and be private to it.
///
/// # Errors
///
/// The directories cannot be made or the address cannot be listened at.
pub async fn serve(
    address: &str,
    platform: Box<dyn Platform>,
    directory: &Path,
    changes: UnixListener,
) -> Result<ttrpc::r#async::Server, Error> {
    changes
        .set_nonblocking(true)
        .map_err(Error::system("listen for who asks for changes"))?;
    let now = identity::uptime();
    let about = About {
        init: now,
        listening: now,
    };
    let workshop = workshop(platform, directory)?;
    start(address, changes.into(), workshop, about, None).await
}

fn workshop(platform: Box<dyn Platform>, directory: &Path) -> Result<Arc<Workshop>, Error> {
    let make = |name| {
        let path = directory.join(name);
        fs::create_dir_all(&path)
            .map(|()| path.clone())
            .map_err(Error::file("create", path))
    };
    Ok(Arc::new(Workshop {
        platform,
        reaper: reaper::Reaper::start().map_err(Error::system("watch children"))?,
        pump: pump::Pump::start().map_err(Error::system("start copying"))?,
        events: Arc::default(),
        layers: rootfs::Layers::new(make("layers")?),
        containers: make("containers")?,
        state: make("state")?,
        consoles: make("consoles")?,
        consoles_made: AtomicU64::default(),
    }))
}

async fn start(
    address: &str,
    changes: OwnedFd,
    workshop: Arc<Workshop>,
    about: About,
    power_off: Option<fn()>,
) -> Result<ttrpc::r#async::Server, Error> {
    let service = Arc::new(server::Service::new(workshop, about, power_off));
    changes::serve(changes, service.clone())?;
    let calls = server::Calls(service);
    let failed = |error: ttrpc::Error| Error::System {
        action: "listen for the host",
        source: std::io::Error::other(error),
    };
    let mut server = ttrpc::r#async::Server::new()
        .bind(address)
        .map_err(failed)?
        .register_service(create_agent(Arc::new(calls)));
    server.start().await.map_err(failed)?;
    Ok(server)
}
