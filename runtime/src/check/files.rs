//! What the configuration points at: kernel, initramfs, directories.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use super::Line;
use super::host::chain;
use crate::acquire::kernel_digest;
use crate::config::Resolved;
use crate::sys;

/// Free space under which a start is likely to fail, and under which it can't work at all.
const LITTLE: u64 = 2 << 30;
const TOO_LITTLE: u64 = 64 << 20;

const GET: &str = "set its path in the configuration; `make kernel` builds one";

pub(super) fn lines(config: &Resolved) -> Vec<Line> {
    // First, as the kernel's digest is remembered in one of them.
    let directories = [
        directory("images", &config.images.directory.0, true),
        directory("writable", &config.rootfs.directory.0, true),
        directory("state", &config.state.directory.0, false),
    ];
    let mut lines = vec![kernel(config), initramfs(&config.kernel.initramfs.0)];
    lines.extend(directories);
    lines
}

fn head(path: &Path) -> std::io::Result<(Vec<u8>, u64)> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut head = Vec::new();
    file.take(4096).read_to_end(&mut head)?;
    Ok((head, size))
}

pub(super) fn kernel(config: &Resolved) -> Line {
    let name = "kernel";
    let path = &config.kernel.path.0;
    let shown = path.display();
    let (head, size) = match head(path) {
        Ok(found) => found,
        Err(error) => return Line::fail(name, format!("{shown}: {error}"), GET),
    };
    let kind = match kernel_kind(&head, size) {
        Ok(kind) => kind,
        Err(wrong) => return Line::fail(name, format!("{shown} {wrong}"), GET),
    };
    let found = format!("{shown}, {kind}, {}", mib(size));
    let Some(expected) = config.kernel.sha256 else {
        return Line::ok(
            name,
            format!("{found}; kernel.sha256 is not set, so not verified"),
        );
    };
    match kernel_digest(path, &config.images.directory.0) {
        Err(error) => Line::fail(name, format!("{shown}: {error}"), GET),
        Ok(digest) if digest != expected => Line::fail(
            name,
            format!("{shown} has SHA-256 {digest}, not {expected}"),
            "restore the kernel, or set kernel.sha256 if the change is meant",
        ),
        Ok(_) => Line::ok(name, format!("{found}, SHA-256 as configured")),
    }
}

/// What boots on this host's processor.
pub(super) fn kernel_kind(head: &[u8], size: u64) -> Result<&'static str, String> {
    if cfg!(target_arch = "aarch64") {
        arm64_kind(head)
    } else {
        x86_64_kind(head, size)
    }
}

/// An Image (Linux Documentation, arch/arm64/booting.rst). How long it is it doesn't say.
pub(super) fn arm64_kind(head: &[u8]) -> Result<&'static str, String> {
    match head.get(56..60) {
        Some(b"ARM\x64") => Ok("Image"),
        _ => Err("is no arm64 Image".to_owned()),
    }
}

/// A 64-bit ELF executable for x86-64, or a bzImage (Linux Documentation, arch/x86/boot.rst).
pub(super) fn x86_64_kind(head: &[u8], size: u64) -> Result<&'static str, String> {
    let word = |at: usize| {
        let bytes = head.get(at..at + 2)?;
        Some(u16::from_le_bytes([bytes[0], bytes[1]]))
    };
    if head.starts_with(b"\x7fELF") {
        return match (head.get(4), word(18)) {
            (Some(2), Some(62)) => Ok("ELF"),
            (_, machine) => Err(format!(
                "is an ELF file for machine {}, not x86-64 (62)",
                machine.unwrap_or_default()
            )),
        };
    }
    if head.get(0x202..0x206) != Some(b"HdrS") {
        return Err("is neither an ELF file nor a bzImage".to_owned());
    }
    let setup = u64::from(head.get(0x1f1).copied().unwrap_or(0).max(4)) + 1;
    let system = head.get(0x1f4..0x1f8).map_or(0, |bytes| {
        u64::from(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    });
    let needed = setup * 512 + system * 16;
    if size < needed {
        return Err(format!("is cut short: it has {size} bytes of {needed}"));
    }
    Ok("bzImage")
}

pub(super) fn initramfs(path: &Path) -> Line {
    let name = "initramfs";
    let shown = path.display();
    let advice = "set kernel.initramfs in the configuration; `make` builds one";
    match head(path) {
        Err(error) => Line::fail(name, format!("{shown}: {error}"), advice),
        Ok((head, size)) => match initramfs_kind(&head) {
            Some(kind) => Line::ok(name, format!("{shown}, {kind}, {}", mib(size))),
            None => Line::fail(name, format!("{shown} is not a cpio archive"), advice),
        },
    }
}

pub(super) fn initramfs_kind(head: &[u8]) -> Option<&'static str> {
    let kinds: [(&[u8], &str); 6] = [
        (b"070701", "cpio"),
        (b"070702", "cpio"),
        (b"\x1f\x8b", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\xfd7zXZ", "xz"),
        (b"\x02\x21\x4c\x18", "lz4"),
    ];
    kinds
        .iter()
        .find(|(magic, _)| head.starts_with(magic))
        .map(|(_, kind)| *kind)
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// `nameless` is whether files without a name are made there.
pub(super) fn directory(name: &'static str, path: &Path, nameless: bool) -> Line {
    let shown = path.display();
    let advice = "make it, or set another in the configuration";
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path);
    if let Err(error) = made {
        return Line::fail(name, format!("{shown}: {error}"), advice);
    }
    if nameless && let Err(error) = sys::nameless(path).and_then(|file| sys::forget(&file)) {
        let found = format!("{shown} takes no files without a name: {}", chain(&error));
        return Line::fail(name, found, "put it on ext4, XFS, Btrfs or tmpfs");
    }
    let free = match rustix::fs::statvfs(path) {
        Ok(stat) => stat.f_bavail.saturating_mul(stat.f_frsize),
        Err(error) => return Line::fail(name, format!("{shown}: {error}"), advice),
    };
    let found = format!("{shown}, {:.1} GiB free", free as f64 / f64::from(1 << 30));
    match free {
        _ if !nameless => Line::ok(name, found),
        ..TOO_LITTLE => Line::fail(name, found, "free some space"),
        TOO_LITTLE..LITTLE => Line::warn(name, found, "images and writable layers grow here"),
        _ => Line::ok(name, found),
    }
}
