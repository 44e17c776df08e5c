//! Leaf files where operating systems differ: event loop, notification, threads, children.

#![allow(unsafe_code)]

pub(crate) mod birth;
pub mod doorbell;
pub mod random;
pub mod reactor;
pub mod ring;
pub mod storage;
pub(crate) mod threads;
pub mod vectored;
