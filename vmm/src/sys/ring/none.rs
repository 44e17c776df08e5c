//! No ring: this operating system has nothing like it.

use std::fs::File;
use std::io;

use vm_memory::VolatileSlice;

use super::{Direction, Ended};
use crate::memory::GuestMemory;
use crate::sys::doorbell::Doorbell;

/// A ring that can't be had.
#[derive(Debug)]
pub enum Spare {}

impl Spare {
    /// Refuses.
    ///
    /// # Errors
    /// Always.
    pub fn new(_depth: u32) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A ring that can't be had.
#[derive(Debug)]
pub enum Ring {}

impl Ring {
    /// Makes nothing of nothing.
    ///
    /// # Errors
    /// None are to be had.
    pub fn new(spare: Spare, _files: &[&File]) -> io::Result<Self> {
        match spare {}
    }

    /// Rings when something has ended.
    pub fn bell(&self) -> &Doorbell {
        match *self {}
    }

    /// What was started and has not been reported by [`ended`](Self::ended).
    pub fn in_flight(&self) -> usize {
        match *self {}
    }

    /// Starts a transfer.
    ///
    /// # Errors
    /// None are to be had.
    pub fn transfer(
        &mut self,
        _tag: u64,
        _direction: Direction,
        _place: (usize, u64),
        _slices: &[VolatileSlice<'_>],
        _memory: &GuestMemory,
    ) -> io::Result<()> {
        match *self {}
    }

    /// Starts to make a file durable.
    pub fn sync(&mut self, _tag: u64, _file: usize) {
        match *self {}
    }

    /// Hands the kernel what was started.
    ///
    /// # Errors
    /// None are to be had.
    pub fn submit(&mut self) -> io::Result<()> {
        match *self {}
    }

    /// Waits until something has ended.
    ///
    /// # Errors
    /// None are to be had.
    pub fn wait(&mut self) -> io::Result<()> {
        match *self {}
    }

    /// The next thing that has ended.
    pub fn ended(&mut self) -> Option<Ended> {
        match *self {}
    }

    /// Waits until nothing is in flight.
    ///
    /// # Errors
    /// None are to be had.
    pub fn settle(&mut self) -> io::Result<()> {
        match *self {}
    }
}
