//! Bytes that anybody wrote, put to every parser of a snapshot: for fuzz targets.

use super::format::{HEAD, Head, Image, seal};
use super::state;
use crate::devices::virtio::transport::mmio::TransportState;
use crate::machine::MachineState;

/// Reads `data` as each part of a snapshot; the head's magic, version and checksum are made right
/// first, as these alone would keep most bytes out. Whatever it is, it is taken or refused.
pub fn parse_anything(data: &[u8]) {
    let mut head = data.to_vec();
    head.resize(usize::try_from(HEAD).unwrap_or(0), 0);
    let length = data.len() as u64;
    let _ = Head::parse(data, length);
    for length in [length, HEAD, HEAD + length] {
        seal(&mut head, length);
        let _ = Head::parse(&head, length);
    }
    for behind in [HEAD, HEAD + 4096] {
        let _ = Image::parse(data, behind);
    }
    let _ = state::decode::<MachineState>(data);
    let _ = state::decode::<Vec<TransportState>>(data);
}
