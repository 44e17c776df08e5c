//! What a plan needs to know of the host.

use std::path::Path;

use crate::request::Create;

/// Facts read once, before planning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// Processors this process may run on; at least 1.
    pub cpus: u32,
    /// Physical memory in bytes.
    pub memory: u64,
    /// The snapshot's writable directory already holds something, as after `nerdctl cp` into a
    /// container that never ran.
    pub upper_in_use: bool,
}

impl HostFacts {
    /// Reads the facts that matter to `create`.
    pub fn read(create: &Create) -> Self {
        let upper = super::rootfs::upper_directory(create);
        Self {
            cpus: std::thread::available_parallelism()
                .map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
            memory: host_memory(),
            upper_in_use: upper.is_some_and(|upper| has_entries(&upper)),
        }
    }
}

fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    #[allow(
        clippy::unnecessary_cast,
        reason = "a c_ulong, which isn't u64 everywhere"
    )]
    let total = info.totalram as u64;
    total.saturating_mul(u64::from(info.mem_unit))
}

fn has_entries(directory: &Path) -> bool {
    // A directory that can't be read is reported when it is acquired.
    std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some())
}
