//! A disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supermachine_fuzz::{SECTORS, block, misbehave};
use supermachine_vmm::devices::virtio::block::wire::{
    Disk, HEADER_LEN, RANGE_LEN, Request, SECTOR, parse, parse_range,
};

fuzz_target!(|data: &[u8]| {
    let disk = Disk {
        sectors: SECTORS,
        read_only: false,
    };
    if let Some((header, rest)) = data.split_first_chunk::<HEADER_LEN>() {
        let len = rest.len() as u64;
        if let Ok(Request::Read { offset, len } | Request::Write { offset, len }) =
            parse(disk, *header, len, len)
        {
            assert!(offset + len <= SECTORS * SECTOR);
        }
        if let Some(range) = rest.first_chunk::<RANGE_LEN>()
            && let Ok(range) = parse_range(disk, *range, header[0] & 1 == 0)
        {
            assert!(range.offset + range.len <= SECTORS * SECTOR);
        }
    }
    misbehave(block(), data);
});
