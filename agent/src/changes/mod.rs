//! What a container wrote, given out to the host: see [`supermachine_protocol::changes`].
//!
//! The upper directory is walked as it is on its disk, not through the overlay, once nothing in the
//! container runs any more. The walk blocks, so each connection has a thread of its own.

mod attributes;
mod layers;
mod walk;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, listen, socket,
};
use rustix::net::{SocketFlags, accept_with};
use supermachine_protocol::CHANGES_VSOCK_PORT;
use supermachine_protocol::changes::{Attributes, DATA_MAX, Encoder, asked};

use crate::error::Error;
use crate::server::Service;
use crate::sys;

use layers::Layers;

/// VMADDR_CID_ANY: whatever number the guest has.
const ANY_CID: u32 = u32::MAX;

/// Where what a container wrote is, and what it is relative to.
#[derive(Clone, Debug)]
pub(crate) struct Changes {
    upper: PathBuf,
    /// What the snapshot's own directory held before, if it held anything.
    own: Option<PathBuf>,
    /// The layers below the snapshot, topmost first.
    below: Vec<PathBuf>,
    /// The upper directory's attributes before the container had it.
    root: Attributes,
}

impl Changes {
    /// Begins with `upper`, an empty directory that is not yet part of an overlay. The container's
    /// root looks as the snapshot's own directory did.
    pub(crate) fn begin(
        upper: PathBuf,
        own: Option<PathBuf>,
        below: Vec<PathBuf>,
    ) -> io::Result<Self> {
        if let Some(own) = &own {
            attributes::write(&upper, &attributes::of_directory(&File::open(own)?)?)?;
        }
        Ok(Self {
            root: attributes::of_directory(&File::open(&upper)?)?,
            upper,
            own,
            below,
        })
    }

    /// Whether there are any. What can't be told counts as one: the host then hears why.
    pub(crate) fn exist(&self) -> bool {
        let look = || -> io::Result<bool> {
            Ok(fs::read_dir(&self.upper)?.next().is_some() || self.root()?.1)
        };
        look().unwrap_or(true)
    }

    /// The root's attributes now, and whether they have changed, times aside.
    fn root(&self) -> io::Result<(Attributes, bool)> {
        let now = attributes::of_directory(&File::open(&self.upper)?)?;
        let timeless = Attributes {
            mtime: self.root.mtime,
            mtime_ns: self.root.mtime_ns,
            ..now.clone()
        };
        let changed = timeless != self.root;
        Ok((now, changed))
    }

    /// Writes them as a stream.
    fn send(&self, to: impl Write) -> io::Result<()> {
        let to = BufWriter::with_capacity(2 * DATA_MAX, to);
        let (root, changed) = self.root()?;
        let mut encoder = Encoder::new(to, &root, changed)?;
        let walked = Layers::open(self.own.as_deref(), &self.below)
            .and_then(|layers| walk::walk(File::open(&self.upper)?.into(), layers, &mut encoder));
        match walked {
            Ok(()) => encoder.finish().map(drop),
            Err(error) => encoder.fail(&error.to_string()),
        }
    }
}

/// Listens where the host asks for changes.
pub(crate) fn listen_on_vsock() -> Result<OwnedFd, Error> {
    let listen = || -> nix::Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
        bind(
            socket.as_raw_fd(),
            &VsockAddr::new(ANY_CID, CHANGES_VSOCK_PORT),
        )?;
        listen(&socket, Backlog::new(1)?)?;
        Ok(socket)
    };
    listen().map_err(Error::system("listen for who asks for changes"))
}

/// Answers whoever connects to `listener`, which doesn't block, for as long as there is a runtime.
pub(crate) fn serve(listener: OwnedFd, service: Arc<Service>) -> Result<(), Error> {
    let listener =
        sys::readable(listener).map_err(Error::system("listen for who asks for changes"))?;
    tokio::spawn(async move {
        loop {
            let Ok(mut ready) = listener.readable().await else {
                return;
            };
            let accepted =
                ready.try_io(|listener| Ok(accept_with(listener.get_ref(), SocketFlags::CLOEXEC)?));
            match accepted {
                Ok(Ok(stream)) => {
                    let service = service.clone();
                    tokio::task::spawn_blocking(move || answer(stream.into(), &service));
                }
                Ok(Err(error)) => tracing::warn!(%error, "cannot accept a connection"),
                Err(_would_block) => {}
            }
        }
    });
    Ok(())
}

fn answer(stream: File, service: &Service) {
    let answered = asked(&stream).and_then(|id| match service.changes(&id) {
        Ok(changes) => changes.send(&stream),
        Err(error) => {
            Encoder::new(&stream, &Attributes::default(), false)?.fail(&error.to_string())
        }
    });
    if let Err(error) = answered {
        tracing::warn!(%error, "cannot tell a container's changes");
    }
}
