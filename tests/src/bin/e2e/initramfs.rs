//! Initramfs archives of the tests, in newc format
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use supermachine_tests::shim::new_id;

use crate::support::World;

/// An archive that is being made.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

impl Archive {
    /// Goes on after another archive: of two files of one name the later counts.
    pub(crate) fn after(mut bytes: Vec<u8>) -> Self {
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        // Far from the other's, as files of one inode number would count as links.
        let inodes = 1 << 20;
        Self { bytes, inodes }
    }

    /// Adds a program or script.
    pub(crate) fn program(mut self, name: &str, data: &[u8]) -> Result<Self> {
        self.entry(name, 0o100_755, data)?;
        Ok(self)
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<()> {
        self.inodes += 1;
        let size = u32::try_from(data.len())?;
        write!(self.bytes, "070701")?;
        let fields = [self.inodes, mode, 0, 0, 1, 0, size, 0, 0, 0, 0];
        let name_size = u32::try_from(name.len())? + 1;
        for field in fields.into_iter().chain([name_size, 0]) {
            write!(self.bytes, "{field:08x}")?;
        }
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Writes it to a file of the tests'; the path, as a TOML value.
    pub(crate) fn write(mut self, world: &World) -> Result<String> {
        self.entry("TRAILER!!!", 0, b"")?;
        let path: PathBuf = world.files()?.join(format!("{}.cpio", new_id()));
        fs::write(&path, self.bytes).with_context(|| format!("write {}", path.display()))?;
        Ok(format!("{:?}", path.display().to_string()))
    }
}

/// A shell's own file, for scripts.
pub(crate) fn busybox(world: &World) -> Result<Vec<u8>> {
    fs::read(world.busybox()?.join("bin/busybox")).context("no busybox")
}

/// One whose /init waits for ever.
pub(crate) fn silent(world: &World) -> Result<String> {
    let script = b"#!/busybox sh\nwhile :; do /busybox sleep 1000; done\n";
    Archive::default()
        .program("busybox", &busybox(world)?)?
        .program("init", script)?
        .write(world)
}
