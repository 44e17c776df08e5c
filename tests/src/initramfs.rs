//! Initramfs archives for guests of tests and benches.

use std::path::Path;

use anyhow::{Context, Result};

/// A cpio archive, format "newc" (the kernel's buffer-format.rst).
#[derive(Debug)]
pub struct Initramfs {
    archive: Vec<u8>,
}

impl Initramfs {
    /// An archive with `/init` alone, the console the kernel opens for its standard streams, and
    /// what stands for them where there is none.
    pub fn new(init: &[u8]) -> Self {
        let mut initramfs = Self {
            archive: Vec::new(),
        };
        initramfs.entry("dev", 0o040_755, &[], (0, 0));
        initramfs.entry("dev/console", 0o020_600, &[], (5, 1));
        initramfs.entry("dev/null", 0o020_666, &[], (1, 3));
        initramfs.entry("init", 0o100_755, init, (0, 0));
        initramfs
    }

    /// The same with a file's contents as `/init`.
    ///
    /// # Errors
    /// The file can't be read.
    pub fn of_program(path: &Path) -> Result<Self> {
        let init =
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self::new(&init))
    }

    /// Its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.archive
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8], device: (u32, u32)) {
        let inode = self.archive.len();
        self.archive.extend(format!(
            "070701{inode:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}",
            0, 0, 1, 0, data.len(), 0, 0, device.0, device.1, name.len() + 1, 0
        ).bytes());
        self.archive.extend(name.bytes());
        self.archive.push(0);
        self.pad();
        self.archive.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        let len = self.archive.len().next_multiple_of(4);
        self.archive.resize(len, 0);
    }
}
