//! Frames and log lines; whole processes are in `tests/control`.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::frame::{self, FROM_CHILD, FROM_PARENT, FrameError, MAX_FILES};
use super::log::{self, Budget, ControlLog};
use super::message::{Answer, Body, Event, LogLevel, Request, ToParent};

fn frame_bytes(length: u32, files: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend(files.to_le_bytes());
    bytes.extend(body);
    bytes
}

fn received(bytes: &[u8]) -> Result<Option<ToParent>, FrameError> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(bytes).unwrap();
    drop(theirs);
    Ok(frame::receive(&ours, FROM_CHILD)?.map(|(message, _)| message))
}

#[test]
fn frames_carry_messages_and_files_in_order() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut first = tempfile::tempfile().unwrap();
    first.write_all(b"first").unwrap();
    let second = tempfile::tempfile().unwrap();
    let attach = Request {
        id: 7,
        body: Body::AttachPort {
            port: 3,
            input: Some(0),
            output: None,
        },
    };
    let resize = Request {
        id: 8,
        body: Body::ResizePort {
            port: 3,
            columns: 80,
            rows: 25,
        },
    };
    let files = [first.as_fd(), second.as_fd()];
    frame::send(&ours, &attach, &files, FROM_PARENT).unwrap();
    frame::send(&ours, &resize, &[], FROM_PARENT).unwrap();
    drop(ours);

    let (request, files) = frame::receive::<Request>(&theirs, FROM_PARENT)
        .unwrap()
        .unwrap();
    assert_eq!(request.id, 7);
    let files = files.unwrap();
    assert_eq!(files.len(), 2);
    let mut file = File::from(files.into_iter().next().unwrap());
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "first");

    let (request, files) = frame::receive::<Request>(&theirs, FROM_PARENT)
        .unwrap()
        .unwrap();
    assert_eq!((request.id, files.unwrap().len()), (8, 0));
    assert!(matches!(request.body, Body::ResizePort { rows: 25, .. }));
    assert!(
        frame::receive::<Request>(&theirs, FROM_PARENT)
            .unwrap()
            .is_none()
    );
}

#[test]
fn a_frame_in_pieces_is_one_frame() {
    let body = br#"{"event":{"port_opened":{"port":5}}}"#;
    let bytes = frame_bytes(body.len() as u32, 0, body);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let writer = std::thread::spawn(move || {
        for byte in bytes {
            theirs.write_all(&[byte]).unwrap();
        }
    });
    let (message, _) = frame::receive::<ToParent>(&ours, FROM_CHILD)
        .unwrap()
        .unwrap();
    writer.join().unwrap();
    assert!(matches!(
        message,
        ToParent::Event(Event::PortOpened { port: 5 })
    ));
}

#[test]
fn received_files_close_on_exec() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let stop = Request {
        id: 0,
        body: Body::Stop,
    };
    frame::send(&ours, &stop, &[ours.as_fd()], FROM_PARENT).unwrap();
    let (_, files) = frame::receive::<Request>(&theirs, FROM_PARENT)
        .unwrap()
        .unwrap();
    let flags = rustix::io::fcntl_getfd(&files.unwrap()[0]).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
fn malformed_frames_are_told_apart() {
    assert!(received(&[]).unwrap().is_none());
    assert!(matches!(received(&[1, 0]), Err(FrameError::Cut)));
    let cut = frame_bytes(10, 0, b"{}");
    assert!(matches!(received(&cut), Err(FrameError::Cut)));
    let long = frame_bytes(u32::MAX, 0, b"");
    assert!(matches!(received(&long), Err(FrameError::Length { .. })));
    let files = frame_bytes(2, 1, b"{}");
    assert!(matches!(received(&files), Err(FrameError::Files { .. })));
    for body in [
        "",
        "{}",
        "nonsense",
        r#"{"event":{"no_such_event":{}}}"#,
        r#"{"event":{"port_opened":{"port":-1}}}"#,
        r#"{"event":{"port_opened":{"port":4294967296}}}"#,
        r#"{"event":{"port_opened":{"port":1,"more":1}}}"#,
        r#"{"event":{"port_opened":{"port":1}}} "trailing""#,
    ] {
        let bytes = frame_bytes(body.len() as u32, 0, body.as_bytes());
        assert!(
            matches!(received(&bytes), Err(FrameError::Body(_))),
            "accepted: {body}"
        );
    }
    let nested = "[".repeat(60_000);
    let bytes = frame_bytes(nested.len() as u32, 0, nested.as_bytes());
    assert!(matches!(received(&bytes), Err(FrameError::Body(_))));
}

#[test]
fn announced_files_must_come() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&frame_bytes(2, 1, b"{}")).unwrap();
    let error = frame::receive::<Request>(&ours, FROM_PARENT).unwrap_err();
    assert!(matches!(
        error,
        FrameError::FileCount {
            announced: 1,
            carried: 0
        }
    ));
}

#[test]
fn a_side_that_takes_no_files_gets_none() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let hello = ToParent::Hello {
        version: 1,
        missing: Vec::new(),
    };
    frame::send(&theirs, &hello, &[theirs.as_fd()], FROM_PARENT).unwrap();
    let error = frame::receive::<ToParent>(&ours, FROM_CHILD).unwrap_err();
    assert!(matches!(error, FrameError::UnexpectedFiles { limit: 0 }));
}

#[test]
fn what_is_too_much_is_not_sent() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let stop = Request {
        id: 0,
        body: Body::Stop,
    };
    let files = vec![ours.as_fd(); MAX_FILES + 1];
    let error = frame::send(&ours, &stop, &files, FROM_PARENT).unwrap_err();
    assert!(matches!(error, FrameError::Files { .. }));
    let log = ToParent::Event(Event::Log {
        level: LogLevel::Info,
        target: String::new(),
        text: "x".repeat(FROM_CHILD.body),
    });
    let error = frame::send(&ours, &log, &[], FROM_CHILD).unwrap_err();
    assert!(matches!(error, FrameError::Length { .. }));
}

#[test]
fn results_survive_the_journey() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let reply = ToParent::Reply {
        id: 1,
        result: Ok(Answer::Done),
    };
    frame::send(&theirs, &reply, &[], FROM_CHILD).unwrap();
    let (message, _) = frame::receive::<ToParent>(&ours, FROM_CHILD)
        .unwrap()
        .unwrap();
    assert!(matches!(
        message,
        ToParent::Reply {
            id: 1,
            result: Ok(Answer::Done)
        }
    ));
}

#[test]
fn a_budget_refuses_counts_and_recovers() {
    let start = Instant::now();
    let second = Duration::from_secs(1);
    let mut budget = Budget::new(2, second, start);
    assert_eq!(budget.take(start), Some(0));
    assert_eq!(budget.take(start), Some(0));
    assert_eq!(budget.take(start), None);
    assert_eq!(budget.take(start + second / 2), None);
    assert_eq!(budget.take(start + second), Some(2));
    assert_eq!(budget.take(start + second * 3 / 2), None);
    // However long it rested, it gives a burst and no more.
    let later = start + second * 1000;
    assert_eq!(budget.take(later), Some(1));
    assert_eq!(budget.take(later), Some(0));
    assert_eq!(budget.take(later), None);
    // The clock may be read out of order by two threads.
    assert_eq!(budget.take(start), None);
}

#[test]
fn log_lines_are_cut_and_kept_to_one_line() {
    assert_eq!(log::clean("a\nb\x1b[2J\u{85}c", 100), "a b [2J c");
    assert_eq!(log::clean("aéé", 4), "aé");
    assert_eq!(log::clean("", 0), "");
}

#[test]
fn log_events_carry_level_target_and_fields() {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&lines);
    let log = ControlLog::new(LogLevel::Info, move |event| {
        sink.lock().unwrap().push(event);
    });
    tracing::subscriber::with_default(log, || {
        tracing::warn!(target: "disk", sector = 7, name = "a b", "slow");
        tracing::debug!("not asked for");
        tracing::info_span!("within").in_scope(|| tracing::info!("spoken"));
    });
    let lines = lines.lock().unwrap();
    assert_eq!(lines.len(), 2);
    assert_eq!(
        lines[0],
        Event::Log {
            level: LogLevel::Warn,
            target: "disk".to_owned(),
            text: "slow sector=7 name=a b".to_owned(),
        }
    );
}

#[test]
fn log_lines_are_rationed() {
    let lines = Arc::new(Mutex::new(0));
    let sink = Arc::clone(&lines);
    let log = ControlLog::new(LogLevel::Info, move |_| *sink.lock().unwrap() += 1);
    let start = Instant::now();
    tracing::subscriber::with_default(log, || {
        for _ in 0..10_000 {
            tracing::info!("flood");
        }
    });
    let refilled = start.elapsed().as_nanos() / log::INTERVAL.as_nanos();
    let most = u128::from(log::BURST) + refilled + 1;
    assert!((1..=most).contains(&*lines.lock().unwrap()));
}
