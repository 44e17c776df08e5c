//! Threads of the VMM.

use std::io;
use std::thread::{self, JoinHandle};

/// Bytes of stack. Less than a huge page: a stack of 2 MiB may get one at its first touch, which
/// costs that memory and the time to clear it.
const STACK: usize = 512 << 10;

/// A thread to be: named, with a stack that suits the VMM.
pub(crate) fn builder(name: impl Into<String>) -> thread::Builder {
    thread::Builder::new().name(name.into()).stack_size(STACK)
}

/// Starts a thread.
///
/// # Errors
/// The host refuses another thread.
pub(crate) fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    builder(name).spawn(work)
}
