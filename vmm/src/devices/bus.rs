//! Address to device.
