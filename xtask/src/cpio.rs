//! The kernel's initramfs format: cpio "newc" (Documentation/driver-api/early-userspace).

use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};

/// Builds an archive in memory. Inode numbers are given in order, owner and time are 0, so that
/// the same contents give the same bytes.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

impl Archive {
    pub(crate) fn dir(&mut self, name: &str) -> Result<()> {
        self.entry(name, DIRECTORY | 0o755, &[], (0, 0))
    }

    pub(crate) fn file(&mut self, name: &str, mode: u32, contents: &[u8]) -> Result<()> {
        self.entry(name, REGULAR | mode, contents, (0, 0))
    }

    pub(crate) fn copy(&mut self, name: &str, mode: u32, from: &Path) -> Result<()> {
        let contents =
            std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.file(name, mode, &contents)
    }

    pub(crate) fn character_device(&mut self, name: &str, major: u32, minor: u32) -> Result<()> {
        self.entry(name, CHARACTER | 0o600, &[], (major, minor))
    }

    /// Ends the archive and returns its bytes.
    pub(crate) fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[], (0, 0))?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8], device: (u32, u32)) -> Result<()> {
        self.inodes += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let size = u32::try_from(data.len()).with_context(|| format!("{name} is too large"))?;
        let name_size = u32::try_from(name.len() + 1).context("a name is too long")?;
        let fields = [
            self.inodes,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        self.append(name, &fields, data)
            .with_context(|| format!("cannot add {name}"))
    }

    fn append(&mut self, name: &str, fields: &[u32], data: &[u8]) -> io::Result<()> {
        self.bytes.write_all(b"070701")?;
        for field in fields {
            write!(self.bytes, "{field:08x}")?;
        }
        self.bytes.write_all(name.as_bytes())?;
        self.bytes.push(0);
        self.pad();
        self.bytes.write_all(data)?;
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    #[test]
    fn entries_are_padded_and_the_trailer_ends_them() {
        let mut archive = Archive::default();
        archive.file("init", 0o755, b"#!x").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        // 110 bytes of header, "init\0", padded to 116; three bytes of data padded to 120.
        assert_eq!(&bytes[110..114], b"init");
        assert_eq!(&bytes[116..119], b"#!x");
        assert_eq!(&bytes[120..126], b"070701");
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}
