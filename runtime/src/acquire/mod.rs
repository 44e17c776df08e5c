//! Obtaining what a plan needs, each step recorded in the ledger first.

pub mod limits;
pub mod rootfs;
pub mod stdio;
