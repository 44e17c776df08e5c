//! Leaf files where operating systems differ: event loop, notification.

#![allow(unsafe_code)]

pub mod doorbell;
pub mod random;
pub mod reactor;
pub mod storage;
pub mod vectored;
