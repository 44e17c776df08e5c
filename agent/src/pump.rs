//! Copies bytes between processes and the host's ports.
//!
//! One epoll instance serves every stream, and the agent's only thread waits for it among
//! everything else. Sources and sinks are non-blocking; a stream whose sink is full waits for it
//! and holds at most one buffer, so back-pressure reaches the writer.
//!
//! Edge-triggered (epoll(7)): each side is read or written until it says EAGAIN.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::unistd::{read, write};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, watch};

use crate::sys;

/// Size of a stream's buffer: a virtio-console port takes no more in one write.
const BUFFER: usize = 32 * 1024;
/// Buffers copied before other streams get their turn.
const TURN: usize = 8;

/// Copies streams, on the runtime it was started on.
#[derive(Debug, Clone)]
pub(crate) struct Pump(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    epoll: Epoll,
    state: Mutex<State>,
    /// A stream was put into `State::again` from outside the loop.
    kicked: Notify,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    flows: HashMap<u64, Flow>,
    /// Streams to look at without an event: their turn was cut short, or a request changed them.
    again: VecDeque<u64>,
}

/// A stream in the pump. Dropping the handle leaves the stream alone.
#[derive(Debug)]
pub(crate) struct Stream {
    number: u64,
    pump: Pump,
    finished: watch::Receiver<()>,
}

#[derive(Debug)]
struct Flow {
    source: OwnedFd,
    sink: OwnedFd,
    buffer: Box<[u8]>,
    filled: std::ops::Range<usize>,
    /// The source is a virtio port that the host has not been seen to open: no data means nothing.
    unopened: bool,
    /// epoll has not yet reported the state that such a port was in when it was added.
    first_report: bool,
    /// The source is at its end, or is to be treated so as soon as it has nothing more to read.
    close_when_idle: bool,
    // Dropped with the flow, which tells the handle.
    _finished: watch::Sender<()>,
}

/// What became of a stream's turn.
enum Turn {
    /// It waits for an event.
    Waiting,
    /// There is more to do at once.
    Unfinished,
    /// It is over.
    Finished,
}

impl Pump {
    /// Starts the copying loop on the current runtime.
    pub(crate) fn start() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let waiter = sys::readable(epoll.0.try_clone()?)?;
        let pump = Self(Arc::new(Inner {
            epoll,
            state: Mutex::default(),
            kicked: Notify::new(),
        }));
        tokio::spawn(pump.clone().run(waiter));
        Ok(pump)
    }

    /// Copies from `source` to `sink`, both non-blocking, until the end; then closes both.
    ///
    /// `port_source`: the source is a virtio-console port, which reads as ended until the host
    /// has opened it.
    pub(crate) fn copy(
        &self,
        source: OwnedFd,
        sink: OwnedFd,
        port_source: bool,
    ) -> io::Result<Stream> {
        let (finished, finish) = watch::channel(());
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        let edge = EpollFlags::EPOLLET;
        // Before it is added: see `handle`.
        let unopened = port_source && is_hung_up(&source)?;
        let (read_token, write_token) = (number * 2, number * 2 + 1);
        self.0.epoll.add(
            &source,
            EpollEvent::new(edge | EpollFlags::EPOLLIN, read_token),
        )?;
        self.0.epoll.add(
            &sink,
            EpollEvent::new(edge | EpollFlags::EPOLLOUT, write_token),
        )?;
        state.flows.insert(
            number,
            Flow {
                source,
                sink,
                buffer: vec![0; BUFFER].into_boxed_slice(),
                filled: 0..0,
                unopened,
                first_report: unopened,
                close_when_idle: false,
                _finished: finished,
            },
        );
        Ok(Stream {
            number,
            pump: self.clone(),
            finished: finish,
        })
    }

    async fn run(self, waiter: AsyncFd<OwnedFd>) {
        let mut events = [EpollEvent::empty(); 32];
        loop {
            let ready = tokio::select! {
                ready = waiter.readable() => ready,
                () = self.0.kicked.notified() => {
                    self.take_turns();
                    continue;
                }
            };
            let Ok(mut guard) = ready else { return };
            match self.0.epoll.wait(&mut events, EpollTimeout::ZERO) {
                Ok(0) => guard.clear_ready(),
                Ok(count) => {
                    for event in events.iter().take(count) {
                        self.handle(event);
                    }
                }
                Err(Errno::EINTR) => (),
                Err(error) => {
                    tracing::error!(%error, "cannot wait for streams");
                    return;
                }
            }
            drop(guard);
            self.take_turns();
            // Other tasks get theirs while a stream is busy.
            tokio::task::yield_now().await;
        }
    }

    fn handle(&self, event: &EpollEvent) {
        let (number, of_source) = (event.data() / 2, event.data().is_multiple_of(2));
        let mut state = self.state();
        let Some(flow) = state.flows.get_mut(&number) else {
            return;
        };
        let events = event.events();
        if of_source && flow.unopened {
            // A port that the host doesn't hold open polls as hung up. The first report says so;
            // any further one means that the host has opened it since, if only to close it again.
            let opened = !events.contains(EpollFlags::EPOLLHUP) || !flow.first_report;
            flow.first_report = false;
            flow.unopened = !opened;
        }
        if !of_source && events.contains(EpollFlags::EPOLLERR) {
            // Nobody will ever read the sink again.
            self.remove(&mut state, number);
            return;
        }
        self.take_turn(&mut state, number);
    }

    fn take_turns(&self) {
        let mut state = self.state();
        for _ in 0..state.again.len() {
            let Some(number) = state.again.pop_front() else {
                return;
            };
            self.take_turn(&mut state, number);
        }
        if !state.again.is_empty() {
            self.0.kicked.notify_one();
        }
    }

    fn take_turn(&self, state: &mut State, number: u64) {
        let Some(flow) = state.flows.get_mut(&number) else {
            return;
        };
        match flow.advance() {
            Turn::Waiting => (),
            Turn::Unfinished => state.again.push_back(number),
            Turn::Finished => self.remove(state, number),
        }
    }

    fn remove(&self, state: &mut State, number: u64) {
        if let Some(flow) = state.flows.remove(&number) {
            // Closing is not enough where a descriptor is a duplicate. Neither can fail: both are
            // open and were added.
            let _ = self.0.epoll.delete(&flow.source);
            let _ = self.0.epoll.delete(&flow.sink);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_hung_up(port: &OwnedFd) -> io::Result<bool> {
    let mut polled = [PollFd::new(port.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO)?;
    Ok(polled[0]
        .revents()
        .is_some_and(|events| events.contains(PollFlags::POLLHUP)))
}

impl Flow {
    fn advance(&mut self) -> Turn {
        for _ in 0..TURN {
            while !self.filled.is_empty() {
                match write(&self.sink, &self.buffer[self.filled.clone()]) {
                    Ok(count) => self.filled.start += count,
                    Err(Errno::EAGAIN) => return Turn::Waiting,
                    Err(Errno::EINTR) => (),
                    // The reader is gone (EPIPE, EIO of a pty, ENODEV of a port).
                    Err(_) => return Turn::Finished,
                }
            }
            match read(&self.source, &mut self.buffer) {
                Ok(0) if self.unopened && !self.close_when_idle => return Turn::Waiting,
                Ok(0) => return Turn::Finished,
                Ok(count) => {
                    self.filled = 0..count;
                    self.unopened = false;
                }
                Err(Errno::EAGAIN) if self.close_when_idle => return Turn::Finished,
                Err(Errno::EAGAIN) => return Turn::Waiting,
                Err(Errno::EINTR) => (),
                // A pty's master after the last terminal was closed (EIO).
                Err(_) => return Turn::Finished,
            }
        }
        Turn::Unfinished
    }
}

impl Stream {
    /// Waits until the stream is over: everything was copied and both ends are closed.
    pub(crate) async fn finished(&mut self) {
        // The sender is dropped with the flow.
        while self.finished.changed().await.is_ok() {}
    }

    /// Ends the stream as soon as its source has nothing more to read.
    pub(crate) fn close_when_idle(&self) {
        let mut state = self.pump.state();
        if let Some(flow) = state.flows.get_mut(&self.number) {
            flow.close_when_idle = true;
            state.again.push_back(self.number);
            self.pump.0.kicked.notify_one();
        }
    }

    /// Takes a port for opened by the host; where that was so before, nothing changes.
    pub(crate) fn assume_opened(&self) {
        let mut state = self.pump.state();
        if let Some(flow) = state
            .flows
            .get_mut(&self.number)
            .filter(|flow| flow.unopened)
        {
            flow.unopened = false;
            state.again.push_back(self.number);
            self.pump.0.kicked.notify_one();
        }
    }

    /// Ends the stream at once, whatever is still under way.
    pub(crate) fn cut(&self) {
        self.pump.remove(&mut self.pump.state(), self.number);
    }
}
