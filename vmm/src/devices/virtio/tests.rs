//! All devices on one board, with a guest that misuses one of them: the others go on, and after a
//! reset so does that one.

use std::os::unix::net::UnixListener;

use proptest::prelude::*;

use super::VirtioDevice;
use super::balloon::{Balloon, BalloonConfig};
use super::block::wire::{HEADER_LEN, SECTOR};
use super::block::{Block, BlockConfig};
use super::console::{Console, ConsoleConfig, PortConfig};
use super::rng::Rng;
use super::vsock::wire::{HOST_CID, Header, Op, TYPE_STREAM};
use super::vsock::{Vsock, VsockConfig};
use crate::testing::{Board, Buffer, MemoryDisk};

/// How a device shows that it works, by its place on the board.
type Proof = fn(&mut Board, usize);

const PROOFS: [Proof; 5] = [console, vsock, balloon, rng, block];

fn board(dir: &std::path::Path) -> Board {
    let listener = UnixListener::bind(dir.join("vsock")).unwrap();
    let ports = ["a", "b"].map(|name| PortConfig { name: name.into() });
    let console = ConsoleConfig {
        ports: ports.into(),
        max_ports: 3,
        events: Box::new(|_| ()),
    };
    let balloon = BalloonConfig {
        free_page_hint: true,
        ..BalloonConfig::default()
    };
    let block = BlockConfig {
        id: "block0".into(),
        backend: Box::new(MemoryDisk(vec![7; 64 * SECTOR as usize])),
        read_only: false,
        serial: "disk".into(),
    };
    let devices: Vec<Box<dyn VirtioDevice>> = vec![
        Box::new(Console::new(console).unwrap()),
        Box::new(Vsock::new(VsockConfig { cid: 3, listener }).unwrap()),
        Box::new(Balloon::new(balloon, 9 << 20).unwrap()),
        Box::new(Rng::of_host()),
        Box::new(Block::new(block).unwrap()),
    ];
    Board::new(devices)
}

/// Announces itself and is told of the ports.
fn console(board: &mut Board, place: usize) {
    let guest = board.guest(place);
    let room = guest.room(64);
    board.submit(place, 2, &[room]);
    // DEVICE_READY (virtio 1.2, 5.3.6.2).
    let ready = guest.put(&[0, 0, 0, 0, 0, 0, 1, 0]);
    board.submit(place, 3, &[ready]);
    assert!(board.used(place, 3).is_some());
    assert_eq!(board.used(place, 2).map(|used| used.written), Some(8));
}

/// A connection to a port that nobody listens on is refused.
fn vsock(board: &mut Board, place: usize) {
    let guest = board.guest(place);
    let request = Header {
        src_cid: 3,
        dst_cid: HOST_CID,
        src_port: 1024,
        dst_port: 9,
        kind: TYPE_STREAM,
        op: Op::Request as u16,
        ..Header::default()
    };
    let room = guest.room(4096);
    board.submit(place, 0, &[room]);
    let packet = guest.put(&request.encode());
    board.submit(place, 1, &[packet]);
    assert!(board.used(place, 1).is_some());
    assert!(board.used(place, 0).is_some());
    let answer = Header::parse(guest.contents(room).first_chunk().unwrap());
    assert_eq!((answer.op, answer.dst_port), (Op::Reset as u16, 1024));
}

fn balloon(board: &mut Board, place: usize) {
    let guest = board.guest(place);
    let page = guest.alloc(4096, 4096);
    guest.write(page, &[9; 4096]);
    let list = guest.put(&((page / 4096) as u32).to_le_bytes());
    board.submit(place, 0, &[list]);
    assert!(board.used(place, 0).is_some());
    assert_eq!(guest.resident(page, 4096), 0);
}

fn rng(board: &mut Board, place: usize) {
    let guest = board.guest(place);
    let room = guest.room(64);
    board.submit(place, 0, &[room]);
    assert_eq!(board.used(place, 0).map(|used| used.written), Some(64));
}

fn block(board: &mut Board, place: usize) {
    let guest = board.guest(place);
    for (kind, data) in [(1, guest.put(&[5; 512])), (0, guest.room(512))] {
        let mut header = [0; HEADER_LEN];
        header[0] = kind;
        let (header, status) = (guest.put(&header), guest.room(1));
        board.submit(place, 0, &[header, data, status]);
        assert!(board.used(place, 0).is_some());
        assert_eq!(guest.contents(status), [0]);
        assert_eq!(guest.contents(Buffer { len: 4, ..data }), [5; 4]);
    }
}

/// Has a guest misuse the device in one place, as `script` says.
fn misuse(victim: usize, script: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let mut board = board(dir.path());
    for place in 0..board.len() {
        board.bring_up(place);
    }
    board.misuse(victim, script);
    for (place, prove) in PROOFS.into_iter().enumerate() {
        if place == victim {
            board.bring_up(place);
        } else {
            assert!(!board.is_broken(place), "device {place}");
        }
        let before = board.interrupts(place);
        prove(&mut board, place);
        assert!(board.interrupts(place) > before, "device {place}");
        assert!(!board.is_broken(place), "device {place}");
    }
}

#[test]
fn devices_work_behind_their_transport() {
    for victim in 0..PROOFS.len() {
        misuse(victim, &[]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn a_guest_that_misuses_a_device_harms_that_alone(
        victim in 0..PROOFS.len(),
        script in proptest::collection::vec(any::<u8>(), 0..500),
    ) {
        misuse(victim, &script);
    }
}
