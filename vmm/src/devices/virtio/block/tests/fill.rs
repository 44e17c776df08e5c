//! An empty disk is given what it has.

use super::*;
use crate::devices::virtio::DeviceState;

fn empty() -> Block {
    disk(&tempfile::tempfile().unwrap(), false)
}

fn contents(file: &File) -> Box<FileBackend> {
    Box::new(FileBackend::open(file.try_clone().unwrap(), false).unwrap())
}

fn read_sector(rig: &mut Rig<Block>, sector: u64) -> (u8, Vec<u8>) {
    let target = rig.guest.room(SECTOR as u32);
    let status = request(rig, IN, sector, &[target]);
    (status, rig.guest.contents(target))
}

#[test]
fn a_disk_is_filled_between_two_requests() {
    let file = image();
    let mut rig = Rig::new(empty());
    rig.activate();
    assert_eq!(u64::from_le_bytes(rig.config(0)), 0);
    assert_eq!(read_sector(&mut rig, 0).0, IO_ERROR);

    rig.device.quiesce().unwrap();
    rig.device.fill(contents(&file)).unwrap();
    rig.device.resume().unwrap();
    assert_eq!(u64::from_le_bytes(rig.config(0)), SECTORS);
    assert_eq!(read_sector(&mut rig, 3), (OK, vec![3; SECTOR as usize]));
    prove(&mut rig);
    assert_eq!(rig.device.metrics().fills.get(), 1);
    let DeviceState::Block(state) = rig.device.save().device else {
        panic!("not a disk's state");
    };
    assert_eq!(state.sectors, SECTORS);
}

#[test]
fn a_disk_is_filled_before_its_driver_comes_and_stays_so() {
    let file = image();
    let mut rig = Rig::new(empty());
    rig.device.fill(contents(&file)).unwrap();
    rig.activate();
    assert_eq!(read_sector(&mut rig, 5).1, [5; SECTOR as usize]);
    rig.device.reset();
    rig.activate();
    assert_eq!(read_sector(&mut rig, 6).1, [6; SECTOR as usize]);
}

#[test]
fn only_an_empty_disk_is_filled_and_only_with_something() {
    let mut full = disk(&image(), false);
    let refused = full.fill(contents(&image())).unwrap_err();
    assert!(
        matches!(
            refused,
            FillError::NotEmpty {
                sectors: SECTORS,
                ..
            }
        ),
        "{refused}"
    );
    let small = tempfile::tempfile().unwrap();
    small.set_len(SECTOR - 1).unwrap();
    let mut disk = empty();
    let refused = disk.fill(contents(&small)).unwrap_err();
    assert!(matches!(refused, FillError::Nothing { .. }), "{refused}");
    // It can be asked again.
    disk.fill(contents(&image())).unwrap();
    let refused = disk.fill(contents(&image())).unwrap_err();
    assert!(matches!(refused, FillError::NotEmpty { .. }), "{refused}");
}

#[test]
fn a_disk_at_work_is_not_filled() {
    let mut rig = Rig::new(empty());
    rig.activate();
    let refused = rig.device.fill(contents(&image())).unwrap_err();
    assert!(matches!(refused, FillError::Quiesce(_)), "{refused}");
    assert_eq!(u64::from_le_bytes(rig.config(0)), 0);
}
