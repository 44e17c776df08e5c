//! The child's way out: every thread puts messages in, one thread writes them.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::time::Duration;

use super::CONTROL;
use super::frame::{self, FROM_CHILD, FrameError};
use super::log;
use super::message::{Event, Exit, ToParent};
use crate::sys::threads;

/// Messages that may wait for the parent. Past them whoever has one waits as well, so that a
/// parent that falls behind slows its guest down instead of filling memory.
const WAITING: usize = 256;

/// How long a dying VMM tries to say why.
const LAST_WORDS: Duration = Duration::from_secs(2);

enum Parcel {
    Message(ToParent),
    /// The last one; the sender learns that it was written.
    Last(ToParent, SyncSender<()>),
}

/// Where messages to the parent go. Clones lead to the same socket.
#[derive(Debug, Clone)]
pub(super) struct Outbox(SyncSender<Box<Parcel>>);

impl Outbox {
    pub(super) fn start(socket: UnixStream) -> io::Result<Self> {
        // Boxed, as the channel has room for all that may wait from the beginning.
        let (sender, parcels) = mpsc::sync_channel(WAITING);
        threads::spawn("control-write", &CONTROL, move || write(&socket, &parcels))?;
        Ok(Self(sender))
    }

    /// Sends; waits while too many messages wait already.
    pub(super) fn send(&self, message: ToParent) {
        // Nobody takes it only when the parent is gone, and then so is this process.
        let _ = self.0.send(Box::new(Parcel::Message(message)));
    }

    /// Sends, or drops the message when there is no room. For the log: logging must not block.
    pub(super) fn offer(&self, message: ToParent) {
        match self.0.try_send(Box::new(Parcel::Message(message))) {
            Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
        }
    }

    /// Says how the VM ended and returns when that is written, or can't be in time. Nothing that
    /// is sent later arrives.
    pub(super) fn last(&self, exit: Exit) {
        let (written, done) = mpsc::sync_channel(1);
        let parcel = Parcel::Last(ToParent::Event(Event::Ended(exit)), written);
        if self.0.send(Box::new(parcel)).is_ok() {
            // In vain when the parent doesn't read: it finds the process ended.
            let _ = done.recv_timeout(LAST_WORDS);
        }
    }
}

fn write(socket: &UnixStream, parcels: &Receiver<Box<Parcel>>) {
    for parcel in parcels {
        let (message, written) = match *parcel {
            Parcel::Message(message) => (message, None),
            Parcel::Last(message, written) => (message, Some(written)),
        };
        match frame::send(socket, &fit(message), &[], FROM_CHILD) {
            Ok(()) => {}
            // Too long to send is a defect here; the parent's deadline finds it.
            Err(FrameError::Length { .. } | FrameError::Body(_)) => {}
            // The reading thread meets the parent's end too and ends the process.
            Err(_) => return,
        }
        if let Some(written) = written {
            // It may have stopped waiting.
            let _ = written.send(());
            return;
        }
    }
}

/// Shortens texts to what the parent would keep of them, so that every message fits a frame.
fn fit(message: ToParent) -> ToParent {
    match message {
        ToParent::Event(Event::Log {
            level,
            target,
            text,
        }) => ToParent::Event(Event::Log {
            level,
            target: log::clean(&target, log::MAX_NAME),
            text: log::clean(&text, log::MAX_LINE),
        }),
        ToParent::Event(Event::DeviceFault { device, reason }) => {
            ToParent::Event(Event::DeviceFault {
                device: log::clean(&device, log::MAX_NAME),
                reason: log::clean(&reason, log::MAX_LINE),
            })
        }
        ToParent::Event(Event::Ended(Exit::Fault(reason))) => ToParent::Event(Event::Ended(
            Exit::Fault(log::clean(&reason, log::MAX_LINE)),
        )),
        ToParent::Reply {
            id,
            result: Err(mut message),
        } => {
            message.text = log::clean(&message.text, log::MAX_LINE);
            ToParent::Reply {
                id,
                result: Err(message),
            }
        }
        other => other,
    }
}
