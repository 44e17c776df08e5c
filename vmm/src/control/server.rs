//! The child's side: makes the VM it is asked for and speaks for it.

use std::convert::Infallible;
use std::os::unix::net::UnixStream;
use std::panic;
use std::process::{self, ExitCode};
use std::sync::mpsc::{self, Sender};

use super::frame::{self, Carried, FROM_CHILD, FROM_PARENT};
use super::guest::{Done, Guest, Work};
use super::log::ControlLog;
use super::message::{Event, Exit, LogLevel, Request, ToParent, VERSION};
use super::outbox::Outbox;
use super::{CONTROL, describe};
use crate::hypervisor::{Ahead, Host, HypervisorError};
use crate::jail::Missing;
use crate::sys::ring::Rings;
use crate::sys::threads;

/// What the process has of its time before it was confined.
pub(crate) struct Start {
    /// The host's hypervisor with a VM, or why there is none; told when a VM is asked for.
    pub(crate) hypervisor: Result<Ahead<Host>, HypervisorError>,
    /// For the first disks.
    pub(crate) rings: Rings,
    /// Layers of the confinement that the host lacks.
    pub(crate) missing: Vec<Missing>,
}

/// Serves the parent until it or the VM ends, and with it the process. Returns only when it can't
/// start: then a thread or a descriptor was refused.
pub(crate) fn serve(socket: UnixStream, level: LogLevel, start: Start) -> ExitCode {
    match start_with(socket, level, start) {
        Ok(never) => match never {},
        // The parent finds the process ended.
        Err(_) => ExitCode::FAILURE,
    }
}

/// Tells the parent why there will be no VMM.
pub(crate) fn give_up(socket: &UnixStream, error: &dyn std::error::Error) -> ExitCode {
    let reason = ToParent::Event(Event::Ended(Exit::Fault(describe(error))));
    // The parent may be gone.
    let _ = frame::send(socket, &reason, &[], FROM_CHILD);
    ExitCode::FAILURE
}

fn start_with(socket: UnixStream, level: LogLevel, start: Start) -> std::io::Result<Infallible> {
    let outbox = Outbox::start(socket.try_clone()?)?;
    report_panics(outbox.clone());
    report_log(outbox.clone(), level);
    outbox.send(ToParent::Hello {
        version: VERSION,
        missing: start.missing,
    });

    let (news, inbox) = mpsc::channel();
    let (speaker, requests) = (outbox.clone(), news.clone());
    threads::spawn("control-read", &CONTROL, move || {
        read(&socket, &speaker, &requests)
    })?;

    let slow = answer_slowly(outbox.clone())?;
    let mut guest = Guest::new(outbox.clone(), news, start.hypervisor, start.rings);
    for news in inbox {
        match news {
            News::Request(Request { id, body }, files) => match guest.handle(body, files) {
                Done::Now(result) => outbox.send(ToParent::Reply { id, result }),
                Done::Later(work) => {
                    // The thread is there as long as this one.
                    let _ = slow.send((id, work));
                }
            },
            News::Ending => {
                outbox.last(guest.end());
                break;
            }
        }
    }
    // The other threads wait for what will not come.
    process::exit(0)
}

/// What the serving thread waits for.
pub(super) enum News {
    Request(Request, Carried),
    /// It is decided that there is or will be no VM.
    Ending,
}

/// Answers what waits for the guest's drivers, in order, while other requests go on.
fn answer_slowly(outbox: Outbox) -> std::io::Result<Sender<(u64, Work)>> {
    let (sender, work) = mpsc::channel::<(u64, Work)>();
    threads::spawn("control-slow", &CONTROL, move || {
        for (id, work) in work {
            let result = work();
            outbox.send(ToParent::Reply { id, result });
        }
    })?;
    Ok(sender)
}

/// A panic anywhere is the VM's end, and is reported as that. A hook sees it even where the
/// process would abort.
fn report_panics(outbox: Outbox) {
    panic::set_hook(Box::new(move |info| {
        outbox.last(Exit::Fault(info.to_string()));
        process::exit(1);
    }));
}

fn report_log(outbox: Outbox, level: LogLevel) {
    let log = ControlLog::new(level, move |event| outbox.offer(ToParent::Event(event)));
    // It fails where a subscriber is set, and nothing in this process set one.
    let _ = tracing::subscriber::set_global_default(log);
}

/// Reads requests. It has a thread of its own so that the parent's end is noticed at once, also
/// while a request is at work.
fn read(socket: &UnixStream, outbox: &Outbox, news: &Sender<News>) {
    loop {
        match frame::receive(socket, FROM_PARENT) {
            Ok(Some((request, files))) => {
                if news.send(News::Request(request, files)).is_err() {
                    return;
                }
            }
            // Nobody is left to run a VM for.
            Ok(None) => process::exit(0),
            Err(error) => {
                outbox.last(Exit::Fault(describe(&error)));
                process::exit(1);
            }
        }
    }
}
