//! A vsock device.
#![no_main]

use std::os::unix::net::UnixListener;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use supermachine_fuzz::misbehave;
use supermachine_vmm::devices::virtio::vsock::wire::{HEADER_LEN, Header};
use supermachine_vmm::devices::virtio::vsock::{Vsock, VsockConfig};

/// One socket for all runs: nobody connects to it.
static LISTENER: LazyLock<UnixListener> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("supermachine-fuzz-{}", std::process::id()));
    let listener = UnixListener::bind(&path).expect("a socket");
    std::fs::remove_file(path).expect("the socket just bound");
    listener
});

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
    let listener = LISTENER.try_clone().expect("a descriptor");
    misbehave(
        Vsock::new(VsockConfig { cid: 3, listener }).expect("a valid id"),
        data,
    );
});
