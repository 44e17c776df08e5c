//! Numbers of the format.

/// First byte of a record.
pub(super) mod tag {
    pub(in super::super) const ROOT: u8 = 0;
    pub(in super::super) const DIRECTORY: u8 = 1;
    pub(in super::super) const UP: u8 = 2;
    pub(in super::super) const FILE: u8 = 3;
    pub(in super::super) const DATA: u8 = 4;
    pub(in super::super) const SYMLINK: u8 = 5;
    pub(in super::super) const NODE: u8 = 6;
    pub(in super::super) const LINK: u8 = 7;
    pub(in super::super) const WHITEOUT: u8 = 8;
    pub(in super::super) const END: u8 = 9;
    pub(in super::super) const FAILED: u8 = 10;
}

/// Kinds of node.
pub(super) mod node {
    pub(in super::super) const CHARACTER: u8 = 1;
    pub(in super::super) const BLOCK: u8 = 2;
    pub(in super::super) const FIFO: u8 = 3;
    pub(in super::super) const SOCKET: u8 = 4;
}

/// Highest mode: permissions, sticky, set-group-id, set-user-id.
pub(super) const MODE_MAX: u16 = 0o7777;

pub(super) const NANOSECONDS: u32 = 1_000_000_000;
