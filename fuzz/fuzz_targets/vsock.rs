//! A vsock device.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supermachine_fuzz::{misbehave, vsock};
use supermachine_vmm::devices::virtio::vsock::wire::{HEADER_LEN, Header};

fuzz_target!(|data: &[u8]| {
    if let Some((bytes, rest)) = data.split_first_chunk::<HEADER_LEN>() {
        let header = Header::parse(bytes);
        assert_eq!(header.encode(), *bytes);
        if header.check(3, rest.len() as u64).is_ok() {
            assert!(u64::from(header.len) <= rest.len() as u64);
        }
        if let Some(reply) = header.reset_reply() {
            assert!(reply.reset_reply().is_none(), "resets would go on for ever");
        }
    }
    misbehave(vsock(), data);
});
