//! Kernel modules, for kernels that don't have everything built in.

use std::ffi::CStr;
use std::fs::{self, File};
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

const DIRECTORY: &str = "/lib/supermachine/modules";
/// File names in the order of their loading, one a line.
const LIST: &str = "/lib/supermachine/modules/modules.list";
const NO_PARAMETERS: &CStr = c"";

/// Loads what is listed, if there is a list. What cannot be loaded is logged: whether it was needed
/// shows when its device is not found.
pub(super) fn load() {
    let Ok(list) = fs::read_to_string(LIST) else {
        return;
    };
    for name in list.lines().map(str::trim).filter(|name| !name.is_empty()) {
        let path = Path::new(DIRECTORY).join(name);
        let flags = match path.extension().and_then(|extension| extension.to_str()) {
            // MODULE_INIT_COMPRESSED_FILE: the kernel decompresses.
            Some("xz" | "gz" | "zst") => ModuleInitFlags::from_bits_retain(4),
            _ => ModuleInitFlags::empty(),
        };
        let loaded =
            File::open(&path).and_then(|file| match finit_module(&file, NO_PARAMETERS, flags) {
                Ok(()) | Err(Errno::EEXIST) => Ok(()),
                Err(error) => Err(error.into()),
            });
        if let Err(error) = loaded {
            tracing::warn!(name, %error, "cannot load a kernel module");
        }
    }
}
