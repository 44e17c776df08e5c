//! What a VM is made of.
