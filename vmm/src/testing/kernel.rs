//! Kernel images of any content, on the way a VM takes them.

use std::fs::File;

use crate::arch::{aarch64, current};
use crate::memory::GuestMemory;

/// Recognises the file as a kernel image of each architecture, and loads it where it is one, with an
/// initramfs beside it.
pub fn load_kernel(file: &mut File, initramfs: &mut File) {
    if let Ok(image) = aarch64::KernelImage::recognise(file) {
        let memory = GuestMemory::anonymous(&aarch64::layout::ram_ranges(64 << 20))
            .expect("memory for a guest");
        if let Ok(entry) = aarch64::load_kernel(&memory, &image, file) {
            assert!(entry >= aarch64::layout::RAM);
        }
    }
    // The host's own is another one on x86_64.
    if let Ok(kernel) = current::KernelImage::recognise(file) {
        let memory = GuestMemory::anonymous(&current::layout::ram_ranges(64 << 20))
            .expect("memory for a guest");
        let source = current::BootSource {
            kernel: &kernel,
            kernel_file: file,
            initramfs: Some(initramfs),
            command_line: "quiet",
            seed: [0; current::SEED_LEN],
        };
        // What it answers is its business; it may not panic.
        let _ = current::load(&memory, source, current::Platform::ordinary());
    }
}
