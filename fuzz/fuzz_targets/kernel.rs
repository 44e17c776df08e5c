//! Kernel images of any bytes: recognised and loaded, or refused.
#![no_main]

use std::fs::File;
use std::io::Write;

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};

fuzz_target!(|image: &[u8]| {
    let mut file = memfd_create("kernel", MemfdFlags::CLOEXEC)
        .map(File::from)
        .expect("a file in memory");
    file.write_all(image).expect("room in memory");
    supermachine_vmm::testing::load_kernel(&mut file);
});
