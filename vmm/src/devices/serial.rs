//! COM1.
