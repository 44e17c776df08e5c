//! Block requests (virtio 1.2, 5.2.6): guest bytes to a typed request, before any I/O. Pure.

#![deny(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

/// Bytes of a sector, whatever the block size (virtio 1.2, 5.2.4).
pub const SECTOR: u64 = 512;
/// Bytes of a request's header.
pub const HEADER_LEN: usize = 16;
/// Bytes of one range of a discard or write-zeroes request.
pub const RANGE_LEN: usize = 16;
/// Bytes of the device's id string.
pub const ID_LEN: usize = 20;
/// The most ranges in one discard or write-zeroes request.
pub const MAX_RANGES: u32 = 16;
/// The most sectors in one such range: 256 MiB. Where zeroes have to be written, that is the most
/// work one range can mean.
pub const MAX_RANGE_SECTORS: u32 = (256 << 20) / SECTOR as u32;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// The unmap flag of a write-zeroes range.
const RANGE_UNMAP: u32 = 1;

/// Request status (virtio 1.2, 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`
    IoError = 1,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupported = 2,
}

/// What the driver asks for. Offsets and lengths are bytes within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill `len` writable bytes from the disk.
    Read {
        /// The first byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Write the `len` readable bytes behind the header to the disk.
    Write {
        /// The first byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Make what was written durable.
    Flush,
    /// Say which disk this is.
    GetId,
    /// Deallocate the ranges behind the header.
    Discard {
        /// How many.
        ranges: u32,
    },
    /// Zero the ranges behind the header.
    WriteZeroes {
        /// How many.
        ranges: u32,
    },
}

/// A range to discard or to zero, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Whether it may be deallocated.
    pub unmap: bool,
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Sectors.
    pub sectors: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

impl Disk {
    /// The byte range of `len` bytes from `sector` on, if it is whole sectors of the disk.
    fn extent(self, sector: u64, len: u64) -> Result<u64, Status> {
        let count = len.checked_div(SECTOR).unwrap_or(0);
        let whole = len.checked_rem(SECTOR) == Some(0);
        let end = sector.checked_add(count).ok_or(Status::IoError)?;
        if !whole || end > self.sectors {
            return Err(Status::IoError);
        }
        sector.checked_mul(SECTOR).ok_or(Status::IoError)
    }
}

/// Reads a request from its header, given the `readable` bytes behind that and the `writable`
/// bytes before the status.
pub fn parse(
    disk: Disk,
    header: [u8; HEADER_LEN],
    readable: u64,
    writable: u64,
) -> Result<Request, Status> {
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let sector = u64::from_le_bytes(sector);
    match kind {
        T_IN => Ok(Request::Read {
            offset: disk.extent(sector, writable)?,
            len: writable,
        }),
        T_OUT | T_DISCARD | T_WRITE_ZEROES if disk.read_only => Err(Status::IoError),
        T_OUT => Ok(Request::Write {
            offset: disk.extent(sector, readable)?,
            len: readable,
        }),
        T_FLUSH => Ok(Request::Flush),
        T_GET_ID if writable < ID_LEN as u64 => Err(Status::IoError),
        T_GET_ID => Ok(Request::GetId),
        T_DISCARD => Ok(Request::Discard {
            ranges: ranges(readable)?,
        }),
        T_WRITE_ZEROES => Ok(Request::WriteZeroes {
            ranges: ranges(readable)?,
        }),
        _ => Err(Status::Unsupported),
    }
}

fn ranges(readable: u64) -> Result<u32, Status> {
    let count = readable.checked_div(RANGE_LEN as u64).unwrap_or(0);
    if readable.checked_rem(RANGE_LEN as u64) != Some(0) {
        return Err(Status::IoError);
    }
    match u32::try_from(count) {
        Ok(count @ 1..=MAX_RANGES) => Ok(count),
        _ => Err(Status::IoError),
    }
}

/// Reads a range of a discard or, if `zeroes`, of a write-zeroes request (virtio 1.2, 5.2.6.2).
pub fn parse_range(disk: Disk, range: [u8; RANGE_LEN], zeroes: bool) -> Result<Range, Status> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = range;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let count = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes(flags);
    let known = if zeroes { RANGE_UNMAP } else { 0 };
    if flags & !known != 0 {
        return Err(Status::Unsupported);
    }
    if count > MAX_RANGE_SECTORS {
        return Err(Status::IoError);
    }
    let len = u64::from(count).saturating_mul(SECTOR);
    let offset = disk.extent(sector, len)?;
    Ok(Range {
        offset,
        len,
        unmap: !zeroes || flags & RANGE_UNMAP != 0,
    })
}
