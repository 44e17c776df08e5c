//! Kernel images of any bytes: refused, or loaded within guest RAM. The first byte chooses what the
//! rest is made to look like.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supermachine_fuzz::file;
use supermachine_vmm::testing::load_kernel;

fuzz_target!(|data: &[u8]| {
    let Some((&kind, rest)) = data.split_first() else {
        return;
    };
    let mut image = rest.to_vec();
    match kind % 4 {
        0 => {}
        // An ELF file for x86_64.
        1 => {
            image.resize(image.len().max(64), 0);
            image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
            image[18..20].copy_from_slice(&62_u16.to_le_bytes());
        }
        // An Image for arm64.
        2 => {
            image.resize(image.len().max(64), 0);
            image[0x38..0x3c].copy_from_slice(b"ARM\x64");
        }
        // A bzImage: boot flag and header magic (the kernel's boot protocol).
        _ => {
            image.resize(image.len().max(0x400), 0);
            image[0x1fe..0x200].copy_from_slice(&0xaa55_u16.to_le_bytes());
            image[0x202..0x206].copy_from_slice(b"HdrS");
        }
    }
    load_kernel(&mut file(&image), &mut file(rest));
});
