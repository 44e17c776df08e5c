//! A console with several ports.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supermachine_fuzz::misbehave;
use supermachine_vmm::devices::virtio::console::wire::FromDriver;
use supermachine_vmm::devices::virtio::console::{Console, ConsoleConfig, PortConfig};

fuzz_target!(|data: &[u8]| {
    let _ = FromDriver::parse(data);
    let config = ConsoleConfig {
        ports: vec![
            PortConfig {
                name: "fuzz".into(),
            },
            PortConfig::default(),
        ],
        max_ports: 3,
        events: Box::new(|_| ()),
    };
    misbehave(Console::new(config).expect("few ports"), data);
});
