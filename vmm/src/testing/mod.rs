//! The guest's side of virtio, for unit tests, fuzz targets and benches.
//!
//! A [`Guest`] is memory with a bump allocator, a [`DriverQueue`] is a driver's half of a split
//! virtqueue, well-behaved or not, and a [`Rig`] is a device with its queues on a reactor that the
//! test turns by hand: no thread, no sleep. [`suite`] is what every device has to pass, [`hostile`]
//! turns bytes into a driver's misdeeds. A [`Board`] has several devices, each behind the registers of
//! its transport, and a guest that misuses those too.
//!
//! Everything here panics on trouble of its own: in a test that is the right answer.

mod board;
mod disk;
mod driver;
mod guest;
pub mod hostile;
mod kernel;
pub mod residency;
mod rig;
pub mod suite;

pub use board::Board;
pub use disk::MemoryDisk;
pub use driver::{DriverQueue, Used, flags};
pub use guest::{Buffer, Guest};
pub use kernel::load_kernel;
pub use rig::Rig;
