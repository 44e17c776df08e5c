//! Partitions of a block device that its content says nothing of (linux/blkpg.h).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::libc;

const ADD: libc::c_int = 1;

/// struct blkpg_ioctl_arg.
#[repr(C)]
struct Request {
    operation: libc::c_int,
    flags: libc::c_int,
    length: libc::c_int,
    data: *const Partition,
}

/// struct blkpg_partition.
#[repr(C)]
struct Partition {
    start: libc::c_longlong,
    length: libc::c_longlong,
    number: libc::c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

mod ioctls {
    use super::Request;

    // linux/fs.h: BLKPG = _IO(0x12, 105), BLKGETSIZE64 = _IOR(0x12, 114, size_t).
    nix::ioctl_write_ptr_bad!(blkpg, nix::request_code_none!(0x12, 105), Request);
    nix::ioctl_read!(size, 0x12, 114, u64);
}

/// Bytes of a block device.
pub(crate) fn device_size(device: &File) -> io::Result<u64> {
    let mut size = 0_u64;
    // SAFETY: the descriptor is open for the call, which writes one 64-bit number: on the 64-bit
    // systems that we run on a size_t is that.
    unsafe { ioctls::size(device.as_raw_fd(), &raw mut size) }?;
    Ok(size)
}

/// Makes `length` bytes of `disk` from `offset` on its partition `number`; the kernel refuses what
/// lies beyond its end or overlaps another. Its device file is there on return.
pub(crate) fn add(disk: &File, number: u32, offset: u64, length: u64) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let partition = Partition {
        start: offset.try_into().map_err(invalid)?,
        length: length.try_into().map_err(invalid)?,
        number: number.try_into().map_err(invalid)?,
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    let request = Request {
        operation: ADD,
        flags: 0,
        length: size_of::<Partition>()
            .try_into()
            .map_err(io::Error::other)?,
        data: &raw const partition,
    };
    // SAFETY: the descriptor is open for the call; `request` and the partition it points to are
    // laid out as the kernel's structures, outlive the call, and are only read.
    unsafe { ioctls::blkpg(disk.as_raw_fd(), &raw const request) }?;
    Ok(())
}
