use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::*;
use crate::sys::doorbell::Doorbell;

const LIMIT: Duration = Duration::from_secs(20);

/// Tells what it saw, and does what a test asks for through `call`.
struct Probe {
    bell: Arc<Doorbell>,
    seen: mpsc::Sender<(usize, Readiness)>,
}

impl Worker for Probe {
    fn start(&mut self, control: &mut Control<'_>) -> io::Result<()> {
        control.add(&self.bell, 7, Interest::READ)
    }

    fn ready(&mut self, _control: &mut Control<'_>, token: usize, readiness: Readiness) {
        if token == 7 {
            self.bell.clear().unwrap();
        }
        self.seen.send((token, readiness)).unwrap();
    }
}

fn probe() -> (Probe, Arc<Doorbell>, mpsc::Receiver<(usize, Readiness)>) {
    let bell = Arc::new(Doorbell::new().unwrap());
    let (seen, events) = mpsc::channel();
    (
        Probe {
            bell: Arc::clone(&bell),
            seen,
        },
        bell,
        events,
    )
}

fn begun() -> Reactor {
    let reactor = new();
    reactor.begin();
    reactor
}

fn new() -> Reactor {
    Reactor::new("test", &crate::devices::virtio::DEVICES).unwrap()
}

#[test]
fn a_rung_bell_reaches_its_worker() {
    let reactor = begun();
    let (worker, bell, events) = probe();
    let running = reactor.handle().spawn(worker).unwrap();
    for _ in 0..3 {
        bell.ring().unwrap();
        let (token, readiness) = events.recv_timeout(LIMIT).unwrap();
        assert_eq!(
            (token, readiness.readable, readiness.timer),
            (7, true, false)
        );
    }
    assert_eq!(running.call(|_, _| 5).unwrap(), 5);
}

#[test]
fn a_worker_that_is_there_before_its_reactor_begins_hears_of_what_came_before() {
    let reactor = new();
    let (worker, bell, events) = probe();
    let running = reactor.handle().spawn(worker).unwrap();
    let here = thread::current().id();
    assert_eq!(running.call(|_, _| thread::current().id()), Ok(here));
    bell.ring().unwrap();
    assert!(events.try_recv().is_err());
    reactor.begin();
    assert_eq!(events.recv_timeout(LIMIT).unwrap().0, 7);
    assert_ne!(running.call(|_, _| thread::current().id()), Ok(here));
}

#[test]
fn a_reactor_that_never_began_drops_its_workers() {
    let reactor = new();
    let (worker, _bell, events) = probe();
    let running = reactor.handle().spawn(worker).unwrap();
    drop(reactor);
    assert_eq!(events.recv(), Err(mpsc::RecvError));
    assert_eq!(running.call(|_, _| ()), Err(Stopped));
}

#[test]
fn stop_returns_the_worker_and_silences_it() {
    let reactor = begun();
    let (worker, bell, events) = probe();
    let running = reactor.handle().spawn(worker).unwrap();
    let worker = running.stop().unwrap();
    bell.ring().unwrap();
    // Another worker's full round proves that the reactor had its chance to see the ring.
    let (other, other_bell, other_events) = probe();
    let _other = reactor.handle().spawn(other).unwrap();
    other_bell.ring().unwrap();
    other_events.recv_timeout(LIMIT).unwrap();
    assert!(worker.bell.clear().unwrap(), "nobody cleared it");
    drop(worker);
    assert!(events.try_recv().is_err());
}

#[test]
fn a_timer_fires_once_and_can_be_cancelled_or_moved() {
    let reactor = begun();
    let (worker, _bell, events) = probe();
    let running = reactor.handle().spawn(worker).unwrap();
    let begin = Instant::now();
    running
        .call(move |_, control| {
            control.wake_at(1, begin + Duration::from_millis(10));
            control.wake_at(2, begin + Duration::from_millis(20));
            control.cancel_wake(1);
            control.wake_at(3, begin + LIMIT * 100);
            control.wake_at(3, begin + Duration::from_millis(30));
        })
        .unwrap();
    let fired: Vec<_> = (0..2)
        .map(|_| events.recv_timeout(LIMIT).unwrap())
        .collect();
    assert_eq!(
        fired.iter().map(|(token, _)| *token).collect::<Vec<_>>(),
        [2, 3]
    );
    assert!(
        fired
            .iter()
            .all(|(_, readiness)| readiness.timer && !readiness.readable)
    );
    assert!(begin.elapsed() >= Duration::from_millis(30));
    assert!(events.try_recv().is_err());
}

#[test]
fn a_failed_start_is_returned_and_leaves_nothing() {
    struct Failing;
    impl Worker for Failing {
        fn start(&mut self, control: &mut Control<'_>) -> io::Result<()> {
            let bell = Doorbell::new()?;
            control.add(&bell, 0, Interest::READ)?;
            control.add(&bell, 0, Interest::READ)
        }
        fn ready(&mut self, _: &mut Control<'_>, _: usize, _: Readiness) {}
    }
    let reactor = begun();
    let error = reactor.handle().spawn(Failing).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
}

#[test]
fn a_stopped_reactor_turns_callers_away() {
    let reactor = begun();
    let (worker, _bell, _events) = probe();
    let handle = reactor.handle();
    let running = handle.spawn(worker).unwrap();
    drop(reactor);
    assert_eq!(running.call(|_, _| ()), Err(Stopped));
    assert_eq!(running.stop().err(), Some(Stopped));
    let (worker, ..) = probe();
    assert_eq!(
        handle.spawn(worker).unwrap_err().kind(),
        io::ErrorKind::BrokenPipe
    );
}

#[test]
fn a_worker_that_panics_releases_its_callers() {
    let reactor = begun();
    let (worker, ..) = probe();
    let running = reactor.handle().spawn(worker).unwrap();
    assert_eq!(
        running.call::<()>(|_, _| panic!("expected by this test")),
        Err(Stopped)
    );
    assert_eq!(running.call(|_, _| ()), Err(Stopped));
}

#[test]
fn a_call_from_the_reactor_itself_is_refused() {
    let reactor = begun();
    let (first, ..) = probe();
    let (second, ..) = probe();
    let first = reactor.handle().spawn(first).unwrap();
    let second = reactor.handle().spawn(second).unwrap();
    let answer = second.call(move |_, _| first.call(|_, _| ())).unwrap();
    assert_eq!(answer, Err(Stopped));
}

/// Reads a socket under token 1 and writes to it under the same token.
struct Peer {
    socket: UnixStream,
    reads: Vec<usize>,
    writable: usize,
}

impl Worker for Peer {
    fn start(&mut self, control: &mut Control<'_>) -> io::Result<()> {
        self.socket.set_nonblocking(true)?;
        control.add(&self.socket, 1, Interest::NONE)
    }

    fn ready(&mut self, control: &mut Control<'_>, token: usize, readiness: Readiness) {
        if readiness.writable {
            self.writable += 1;
        }
        if readiness.readable
            && let Ok(count) = self.socket.read(&mut [0; 4])
        {
            self.reads.push(count);
            if count == 0 {
                control.remove(token);
            }
        }
    }
}

#[test]
fn interest_is_level_triggered_and_none_is_silent_even_for_a_hang_up() {
    let reactor = ManualReactor::new().unwrap();
    let (socket, mut far) = UnixStream::pair().unwrap();
    let running = reactor
        .handle()
        .spawn(Peer {
            socket,
            reads: Vec::new(),
            writable: 0,
        })
        .unwrap();
    let turn = || reactor.turn(Duration::ZERO).unwrap();

    far.write_all(b"123456").unwrap();
    assert_eq!(turn(), 0);
    running
        .call(|_, control| control.set_interest(1, Interest::READ))
        .unwrap()
        .unwrap();
    // What one call leaves is reported again.
    assert_eq!((turn(), turn(), turn()), (1, 1, 0));
    assert_eq!(running.call(|peer, _| peer.reads.clone()).unwrap(), [4, 2]);

    running
        .call(|_, control| control.set_interest(1, Interest::NONE))
        .unwrap()
        .unwrap();
    drop(far);
    assert_eq!((turn(), turn()), (0, 0));
    running
        .call(|_, control| control.set_interest(1, Interest::BOTH))
        .unwrap()
        .unwrap();
    assert_eq!((turn(), turn()), (1, 0));
    let peer = running.stop().unwrap();
    assert_eq!((peer.reads, peer.writable), (vec![4, 2, 0], 1));
}

#[test]
fn a_removed_source_is_not_reported_within_the_same_batch() {
    struct Pair {
        bells: [Doorbell; 2],
        calls: usize,
    }
    impl Worker for Pair {
        fn start(&mut self, control: &mut Control<'_>) -> io::Result<()> {
            control.add(&self.bells[0], 0, Interest::READ)?;
            control.add(&self.bells[1], 1, Interest::READ)
        }
        fn ready(&mut self, control: &mut Control<'_>, _: usize, _: Readiness) {
            self.calls += 1;
            control.remove(0);
            control.remove(1);
        }
    }
    let reactor = ManualReactor::new().unwrap();
    let bells = [Doorbell::new().unwrap(), Doorbell::new().unwrap()];
    bells[0].ring().unwrap();
    bells[1].ring().unwrap();
    let running = reactor.handle().spawn(Pair { bells, calls: 0 }).unwrap();
    assert_eq!(reactor.turn(Duration::ZERO).unwrap(), 1);
    assert_eq!(running.stop().unwrap().calls, 1);
}
