//! Waiting for devices by the kernel's own announcements (netlink(7), NETLINK_KOBJECT_UEVENT).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::Interest;
use tokio::sync::watch;

use crate::sys;

/// How long a device that the host has configured may take to appear.
const PATIENCE: Duration = Duration::from_secs(5);

/// The kernel's announcements.
#[derive(Debug, Clone)]
pub(crate) struct Uevents {
    changes: watch::Receiver<u64>,
}

impl Uevents {
    /// Starts to listen, on the current runtime.
    pub(crate) fn listen() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        // Group 1 carries the kernel's messages.
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
        let socket = sys::readable(socket)?;
        let (changed, changes) = watch::channel(0);
        tokio::spawn(async move {
            loop {
                let drained = socket.async_io(Interest::READABLE, drain).await;
                match drained {
                    Ok(()) => changed.send_modify(|count| *count += 1),
                    Err(error) => {
                        tracing::error!(%error, "cannot receive device events");
                        return;
                    }
                }
            }
        });
        Ok(Self { changes })
    }

    /// Waits until `find` finds something, looking again after each announcement. `None` once it
    /// has taken too long.
    pub(crate) async fn find<T>(&self, find: impl Fn() -> Option<T>) -> Option<T> {
        if let Some(found) = find() {
            return Some(found);
        }
        let mut changes = self.changes.clone();
        let wait = async {
            loop {
                changes.mark_unchanged();
                if let Some(found) = find() {
                    return Some(found);
                }
                if changes.changed().await.is_err() {
                    return None;
                }
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.ok().flatten()
    }
}

/// Reads everything there is; the content doesn't matter, since whoever waits looks for itself.
fn drain(socket: &OwnedFd) -> io::Result<()> {
    let mut buffer = [0; 4096];
    let mut any = false;
    loop {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            // An overrun lost messages, which is a change as well.
            Ok(_) | Err(Errno::ENOBUFS) => any = true,
            Err(Errno::EINTR) => (),
            Err(Errno::EAGAIN) if any => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
