//! The VMM child process.
