//! What the targets share. `make fuzz` runs them all, `cargo xtask fuzz --target block` one.
//!
//! A target is a whole device behind the driver model of `supermachine_vmm::testing`: the input is a
//! script of what a driver does, good manners or bad. The device may fault; it may not panic, and it
//! comes to rest. Inputs also go through the device's pure parser, with its promises asserted.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::net::UnixListener;
use std::sync::LazyLock;

use supermachine_vmm::devices::virtio::VirtioDevice;
use supermachine_vmm::devices::virtio::balloon::{Balloon, BalloonConfig};
use supermachine_vmm::devices::virtio::block::wire::SECTOR;
use supermachine_vmm::devices::virtio::block::{Block, BlockConfig};
use supermachine_vmm::devices::virtio::console::{Console, ConsoleConfig, PortConfig};
use supermachine_vmm::devices::virtio::rng::Rng;
use supermachine_vmm::devices::virtio::vsock::{Vsock, VsockConfig};
use supermachine_vmm::testing::{MemoryDisk, Rig, hostile};

/// One socket for all runs: nobody connects to it.
pub static LISTENER: LazyLock<UnixListener> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("supermachine-fuzz-{}", std::process::id()));
    let listener = UnixListener::bind(&path).expect("a socket");
    std::fs::remove_file(path).expect("the socket just bound");
    listener
});

/// Sectors of [`block`].
pub const SECTORS: u64 = 64;

/// Has a driver misbehave as `script` says, then resets the device.
pub fn misbehave<D: VirtioDevice>(device: D, script: &[u8]) {
    let mut rig = Rig::new(device);
    hostile::run(&mut rig, script);
    rig.device.reset();
}

/// A small disk that notices accesses outside of it.
pub fn block() -> Block {
    Block::new(BlockConfig {
        id: "block0".into(),
        backend: Box::new(MemoryDisk(vec![0; (SECTORS * SECTOR) as usize])),
        read_only: false,
        serial: "fuzz".into(),
    })
    .expect("a short serial")
}

/// A balloon with everything there is.
pub fn balloon() -> Balloon {
    let config = BalloonConfig {
        free_page_hint: true,
        ..BalloonConfig::default()
    };
    Balloon::new(config, 1 << 20).expect("a descriptor")
}

/// An entropy device with little entropy.
pub fn rng() -> Rng {
    Rng::new(std::sync::Arc::new(|bytes: &mut [u8]| {
        bytes.fill(4);
        Ok(())
    }))
}

/// A console with several ports.
pub fn console() -> Console {
    Console::new(ConsoleConfig {
        ports: vec![
            PortConfig {
                name: "fuzz".into(),
            },
            PortConfig::default(),
        ],
        max_ports: 3,
        events: Box::new(|_| ()),
    })
    .expect("few ports")
}

/// A vsock device.
pub fn vsock() -> Vsock {
    let listener = LISTENER.try_clone().expect("a descriptor");
    Vsock::new(VsockConfig { cid: 3, listener }).expect("a valid id")
}

/// One of each.
pub fn devices() -> Vec<Box<dyn VirtioDevice>> {
    vec![
        Box::new(console()),
        Box::new(vsock()),
        Box::new(balloon()),
        Box::new(rng()),
        Box::new(block()),
    ]
}

/// A file with these bytes, without a name.
pub fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile_in("/dev/shm").expect("a file in memory");
    file.write_all(bytes).expect("room for a small file");
    file.rewind().expect("a file that seeks");
    file
}
