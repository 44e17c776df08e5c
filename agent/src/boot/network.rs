//! The guest's loopback interface.

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::sys;

/// Sets it up. A kernel without networking has none, which is not an error here.
pub(super) fn loopback_up() {
    let up = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(std::io::Error::from)
    .and_then(|socket| sys::set_loopback_up(&socket));
    if let Err(error) = up {
        tracing::warn!(%error, "cannot set up the loopback interface");
    }
}
