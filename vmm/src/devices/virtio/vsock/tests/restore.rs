//! Guests that go on from a snapshot, and those that were saved.

use super::*;

#[test]
fn a_driver_that_moved_hears_of_it_before_anybody_connects() {
    let mut linux = Linux::up();
    let (_program, old) = linux.connected();
    let (room, other) = (linux.rig.guest.room(4), linux.rig.guest.room(4));
    linux.rig.submit(EVENT, &[room]);
    linux.rig.submit(EVENT, &[other]);
    linux.rig.device.quiesce().unwrap();
    let (dir, listener) = listener();
    let cid = CID + 1;
    let device = Vsock::new(VsockConfig { cid, listener }).unwrap();
    let features = linux.rig.all_features();
    linux.rig.replace(device, features).unwrap();

    let mut program = UnixStream::connect(dir.path().join("vsock")).unwrap();
    program.write_all(b"CONNECT 1024\n").unwrap();
    assert_eq!(linux.rig.config::<4>(0), cid.to_le_bytes());
    linux.rig.run();
    assert_eq!(linux.rig.used(EVENT).unwrap().written, 4);
    assert_eq!(
        linux.rig.guest.contents(room),
        TRANSPORT_RESET.to_le_bytes()
    );
    // Once is enough: it asks for its number each time.
    assert!(linux.rig.used(EVENT).is_none());
    // It closes its connections first: what it says of them is of another's.
    assert_eq!(linux.next(), None);
    linux.send(linux.header(old, Op::Shutdown), b"");
    assert_eq!(linux.next(), None);

    linux.rig.submit(EVENT, &[room]);
    let (request, _) = linux.next().unwrap();
    assert_eq!(
        (request.op, request.dst_cid),
        (Op::Request as u16, u64::from(cid))
    );
}

#[test]
fn connections_outlive_a_snapshot() {
    let mut linux = Linux::up();
    let (mut program, port) = linux.connected();
    linux.rig.device.quiesce().unwrap();
    program.write_all(b"meanwhile").unwrap();
    linux.rig.device.resume().unwrap();
    let (header, data) = linux.next().unwrap();
    assert_eq!((header.src_port, &data[..]), (port, &b"meanwhile"[..]));
    linux.data(port, b"well");
    let mut answer = [0; 4];
    program.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"well");
}
