//! One port: who has it open, what its driver was told, what is to be told next. Pure state; the
//! descriptors it keeps are moved by the worker.
//!
//! How Linux behaves at the other end, which is why this is as it is:
//! - A port's device can be opened once at a time. `open` and `close` are told in control messages,
//!   and the driver spins until each of them is consumed.
//! - Data that arrives while nobody in the guest has the port open is thrown away, and so is what is
//!   unread at `close`. So nothing is read from an input before the guest opened the port.
//! - While the host side is closed, `read` returns 0 once what arrived is consumed, `write` blocks.
//!   So an end of input closes the whole port: use two ports for streams that end apart.
//! - `close` is told on the control queue while data waits in the port's own queue. So a port is
//!   closed only when that queue has been drained.
//! - There is no trace of the last opening in the port itself: a slot can be used again as soon as
//!   both sides have closed and the driver was told of it.

use std::sync::mpsc::SyncSender;

use super::endpoint::{Input, Output};
use super::state::{GuestState, PortState, ToldState};
use super::wire::ToDriver;
use super::{PortEnds, PortEvent};

/// The guest's side of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guest {
    /// Nobody has it open.
    Closed,
    /// A process has it open.
    Open,
    /// It was closed; what was written before is still on its way.
    Draining,
}

/// What the host attached to a port.
#[derive(Debug)]
pub(super) struct Attachment {
    /// Where the guest's input comes from.
    pub(super) input: Option<Input>,
    /// Where the guest's output goes.
    pub(super) output: Option<Output>,
    /// Tells the worker this attachment from the one before.
    pub(super) generation: u64,
    /// Whether the guest had the port open during this attachment.
    opened: bool,
    /// The input has ended: the port is to be closed towards the guest.
    ended: bool,
    /// Signalled when the driver has dealt with the port's opening.
    pub(super) acknowledge: Option<SyncSender<()>>,
}

/// What the driver knows of a port.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    added: bool,
    ready: bool,
    named: bool,
    open: bool,
    size: Option<(u16, u16)>,
}

#[derive(Debug)]
pub(super) struct Port {
    /// Shown in the guest's sysfs; empty for none.
    name: String,
    /// Whether the driver is to know the port.
    wanted: bool,
    guest: Guest,
    /// The guest's present opening began under an attachment that is gone.
    stale: bool,
    told: Told,
    /// The driver must hear of a close before it hears of the next opening.
    close_due: bool,
    size: Option<(u16, u16)>,
    attachment: Option<Attachment>,
    generations: u64,
}

impl Port {
    /// A port; `configured` ones are announced at once, others when they are first attached.
    pub(super) fn new(name: String, configured: bool) -> Self {
        Self {
            name,
            wanted: configured,
            guest: Guest::Closed,
            stale: false,
            told: Told::default(),
            close_due: false,
            size: None,
            attachment: None,
            generations: 0,
        }
    }

    /// What a snapshot has of the port: a driver that goes on finds the host's side gone, unless it
    /// is attached before.
    pub(super) fn save(&self, taken: u64) -> PortState {
        let attachment = self.attachment.as_ref();
        PortState {
            name: self.name.clone(),
            wanted: self.wanted,
            guest: match self.guest {
                Guest::Closed => GuestState::Closed,
                Guest::Open => GuestState::Open,
                Guest::Draining => GuestState::Draining,
            },
            // Otherwise the next one goes on with the opening there is.
            stale: self.stale || attachment.is_some_and(|attachment| attachment.ended),
            told: ToldState {
                added: self.told.added,
                ready: self.told.ready,
                named: self.told.named,
                open: self.told.open,
                size: self.told.size,
            },
            close_due: self.close_due,
            size: self.size,
            taken,
        }
    }

    /// Becomes what another port was.
    pub(super) fn restore(&mut self, state: PortState) {
        self.name = state.name;
        self.wanted = state.wanted;
        self.guest = match state.guest {
            GuestState::Closed => Guest::Closed,
            GuestState::Open => Guest::Open,
            GuestState::Draining => Guest::Draining,
        };
        self.stale = state.stale;
        self.told = Told {
            added: state.told.added,
            ready: state.told.ready,
            named: state.told.named,
            open: state.told.open,
            size: state.told.size,
        };
        self.close_due = state.close_due;
        self.size = state.size;
    }

    pub(super) fn guest(&self) -> Guest {
        self.guest
    }

    pub(super) fn attachment(&mut self) -> Option<&mut Attachment> {
        self.attachment.as_mut()
    }

    /// Whether the driver may speak of the port: it was told of it, or still has it open from before
    /// it asked for all ports once more.
    pub(super) fn is_known(&self) -> bool {
        self.told.added || self.guest != Guest::Closed
    }

    /// Whether neither side has anything to do with the port: nothing is on its queues.
    pub(super) fn is_at_rest(&self) -> bool {
        !self.is_known() && self.attachment.is_none()
    }

    /// Whether [`attach`](Self::attach) may be called.
    pub(super) fn is_free(&self) -> bool {
        self.attachment.is_none() && !(self.stale && self.guest != Guest::Closed)
    }

    /// Connects the host side; the port must be free.
    pub(super) fn attach(&mut self, ends: PortEnds, acknowledge: SyncSender<()>) -> Option<Event> {
        self.generations += 1;
        self.wanted = true;
        let opened = self.guest == Guest::Open;
        self.attachment = Some(Attachment {
            input: ends.input.map(Input::new),
            output: ends.output.map(Output::new),
            generation: self.generations,
            opened,
            ended: false,
            acknowledge: Some(acknowledge),
        });
        opened.then_some(Event::Opened)
    }

    /// Disconnects the host side at once, whatever is on its way; tells whether it was connected.
    pub(super) fn detach(&mut self) -> bool {
        let was_attached = self.attachment.take().is_some();
        if was_attached {
            self.stale = self.guest != Guest::Closed;
            self.close_due = self.told.open;
        }
        was_attached
    }

    /// What is in the input now is its last: it ends where reading would block.
    pub(super) fn close_input(&mut self) {
        if let Some(attachment) = &mut self.attachment
            && let Some(input) = &mut attachment.input
        {
            input.finish();
        }
    }

    /// The input has ended and all of it is in the guest's buffers.
    pub(super) fn input_ended(&mut self) {
        if let Some(attachment) = &mut self.attachment {
            attachment.input = None;
            attachment.ended = true;
        }
    }

    pub(super) fn resize(&mut self, cols: u16, rows: u16) {
        self.size = Some((cols, rows));
    }

    pub(super) fn size(&self) -> Option<(u16, u16)> {
        self.size
    }

    /// Takes the port away from the driver; it comes back with the next attachment.
    pub(super) fn remove(&mut self) {
        self.detach();
        self.wanted = false;
    }

    /// A driver without multiport has port 0 open at all times and hears of nothing.
    pub(super) fn assume_open(&mut self) -> Option<Event> {
        self.told = Told {
            added: true,
            ready: true,
            named: true,
            open: true,
            size: None,
        };
        self.guest_open()
    }

    /// The driver asks for all ports, perhaps once more.
    pub(super) fn device_ready(&mut self) {
        self.told = Told::default();
        self.close_due = false;
    }

    /// The driver has set up the port, or failed to; tells whether it was asked to.
    pub(super) fn port_ready(&mut self, ready: bool) -> bool {
        if !self.told.added {
            return false;
        }
        // Asked again, for instance after a hibernation: name and state are told once more.
        self.told = Told {
            added: true,
            ready,
            ..Told::default()
        };
        self.close_due = false;
        true
    }

    /// A process in the guest opened the port.
    pub(super) fn guest_open(&mut self) -> Option<Event> {
        let before = std::mem::replace(&mut self.guest, Guest::Open);
        if before != Guest::Closed {
            // Opened before all the earlier opening wrote was taken: it is one stream.
            return None;
        }
        self.stale = false;
        let attachment = self.attachment.as_mut()?;
        attachment.opened = true;
        Some(Event::Opened)
    }

    /// The guest closed the port; [`drained`](Self::drained) follows.
    pub(super) fn guest_close(&mut self) {
        if self.guest == Guest::Open {
            self.guest = Guest::Draining;
        }
    }

    /// All that was written before the close is where it belongs.
    pub(super) fn drained(&mut self) -> Option<Event> {
        if self.guest != Guest::Draining {
            return None;
        }
        self.guest = Guest::Closed;
        if let Some(attachment) = self.attachment.take_if(|attachment| attachment.opened) {
            drop(attachment);
            self.close_due = self.told.open;
            return Some(Event::Closed);
        }
        std::mem::take(&mut self.stale).then_some(Event::Closed)
    }

    /// The driver is gone, and with it what was in the queues.
    pub(super) fn reset(&mut self) -> Option<Event> {
        self.device_ready();
        if let Some(attachment) = &mut self.attachment {
            attachment.acknowledge = None;
        }
        self.guest_close();
        self.drained()
    }

    /// What the driver should hear next, if anything.
    pub(super) fn next_message(&self) -> Option<ToDriver> {
        let told = &self.told;
        if !self.wanted {
            return told.added.then_some(ToDriver::Remove);
        }
        if !told.added {
            return Some(ToDriver::Add);
        }
        if !told.ready {
            return None;
        }
        if !told.named && !self.name.is_empty() {
            return Some(ToDriver::Name(self.name.clone()));
        }
        let open = self
            .attachment
            .as_ref()
            .is_some_and(|attachment| !attachment.ended);
        if told.open && (self.close_due || !open) {
            return Some(ToDriver::Open(false));
        }
        if open && !told.open {
            return Some(ToDriver::Open(true));
        }
        // Only a console port keeps a size (Linux ignores it for others), so it comes last.
        match self.size {
            Some((cols, rows)) if told.size != self.size => Some(ToDriver::Resize { cols, rows }),
            _ => None,
        }
    }

    /// `message` is in the driver's hands.
    pub(super) fn sent(&mut self, message: &ToDriver) -> Option<Event> {
        match message {
            ToDriver::Add => self.told.added = true,
            ToDriver::Remove => {
                self.told = Told::default();
                self.close_due = false;
                // The driver closes a removed port without a word.
                self.guest_close();
            }
            ToDriver::Name(_) => self.told.named = true,
            ToDriver::Resize { cols, rows } => self.told.size = Some((*cols, *rows)),
            ToDriver::Open(true) => self.told.open = true,
            ToDriver::Open(false) => {
                self.told.open = false;
                // A close left over from an earlier attachment is not this one's.
                let left_over = std::mem::take(&mut self.close_due);
                let ended = self
                    .attachment
                    .as_ref()
                    .is_some_and(|attachment| attachment.ended);
                return (ended && !left_over).then_some(Event::InputEnded);
            }
        }
        None
    }
}

/// A [`PortEvent`] before it has the port's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Opened,
    Closed,
    InputEnded,
}

impl Event {
    pub(super) fn of(self, port: u32) -> PortEvent {
        match self {
            Self::Opened => PortEvent::Opened(port),
            Self::Closed => PortEvent::Closed(port),
            Self::InputEnded => PortEvent::InputEnded(port),
        }
    }
}
