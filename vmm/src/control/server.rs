//! The child's side: makes the VM it is asked for and speaks for it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::panic;
use std::process::{self, ExitCode};
use std::sync::mpsc::{self, Sender};
use std::thread;

use super::describe;
use super::frame::{self, FROM_CHILD, FROM_PARENT};
use super::log::ControlLog;
use super::message::{
    Answer, Body, ErrorKind, ErrorMessage, Event, Exit, FileIndex, LogLevel, Request, ToParent,
    VERSION,
};
use super::outbox::Outbox;

type Result<T> = std::result::Result<T, ErrorMessage>;

/// Serves the parent until it or the VM ends, and with it the process.
pub(crate) fn serve(socket: UnixStream, level: LogLevel) -> ExitCode {
    match start(socket, level) {
        Ok(code) => code,
        // A thread or a descriptor was refused; the parent finds the process ended.
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

fn start(socket: UnixStream, level: LogLevel) -> std::io::Result<ExitCode> {
    let outbox = Outbox::start(socket.try_clone()?)?;
    report_panics(outbox.clone());
    report_log(outbox.clone(), level);
    outbox.send(ToParent::Hello { version: VERSION });

    let (requests, inbox) = mpsc::channel();
    let speaker = outbox.clone();
    thread::Builder::new()
        .name("control-read".to_owned())
        .spawn(move || read(&socket, &speaker, &requests))?;

    let server = Server {
        outbox: outbox.clone(),
    };
    for (Request { id, body }, files) in inbox {
        let result = server.handle(body, Files::new(files));
        outbox.send(ToParent::Reply { id, result });
    }
    Ok(ExitCode::SUCCESS)
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
fn read(socket: &UnixStream, outbox: &Outbox, requests: &Sender<(Request, Vec<OwnedFd>)>) {
    loop {
        match frame::receive(socket, FROM_PARENT) {
            Ok(Some(request)) => {
                if requests.send(request).is_err() {
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

/// Files of a request; each is taken once.
struct Files(Vec<Option<OwnedFd>>);

impl Files {
    fn new(files: Vec<OwnedFd>) -> Self {
        Self(files.into_iter().map(Some).collect())
    }

    fn take(&mut self, place: FileIndex) -> Result<OwnedFd> {
        self.0
            .get_mut(place)
            .and_then(Option::take)
            .ok_or_else(|| refuse(ErrorKind::Invalid, format!("No file at place {place}")))
    }

    fn take_if(&mut self, place: Option<FileIndex>) -> Result<Option<OwnedFd>> {
        place.map(|place| self.take(place)).transpose()
    }
}

fn refuse(kind: ErrorKind, text: impl Into<String>) -> ErrorMessage {
    ErrorMessage {
        kind,
        text: text.into(),
    }
}

struct Server {
    outbox: Outbox,
}

impl Server {
    fn handle(&self, body: Body, _files: Files) -> Result<Answer> {
        match body {
            Body::Stop => {
                self.outbox.last(Exit::Stopped);
                process::exit(0)
            }
            Body::Boot(_)
            | Body::AttachPort { .. }
            | Body::DetachPort { .. }
            | Body::CloseInput { .. }
            | Body::ResizePort { .. }
            | Body::SetBalloon { .. }
            | Body::BalloonStats => Err(refuse(ErrorKind::State, "There is no VM")),
        }
    }
}
