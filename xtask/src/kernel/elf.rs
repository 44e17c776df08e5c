//! An ELF vmlinux out of a bzImage: its payload, decompressed.
//!
//! Hosts whose KVM only emulates, and QEMU's emulation, start an ELF much faster than a bzImage,
//! which must decompress itself with the guest's own instructions.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Offsets in the x86 boot protocol's setup header (Documentation/arch/x86/boot.rst).
const SETUP_SECTS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// Writes the ELF image inside the bzImage `from` to `to`.
pub(crate) fn extract(from: &Path, to: &Path) -> Result<()> {
    let image = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    let payload = payload(&image)
        .with_context(|| format!("{} is no bzImage with a payload", from.display()))?;
    let (package, program, args) = decompressor(payload)?;
    crate::apt::ensure(&[package])?;

    let out = File::create(to).with_context(|| format!("cannot create {}", to.display()))?;
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(out)
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    // The decompressor may stop at the end of its stream, before our padding: judge the result.
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(payload);
    }
    child
        .wait()
        .with_context(|| format!("cannot wait for {program}"))?;
    let mut head = [0; 4];
    File::open(to)
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut head))
        .context("the kernel's payload decompressed to nothing")?;
    if head != *b"\x7fELF" {
        bail!("the payload of {} is no ELF image", from.display());
    }
    Ok(())
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    if image.get(MAGIC..MAGIC + 4)? != b"HdrS" {
        return None;
    }
    let sectors = usize::from(*image.get(SETUP_SECTS)?);
    let sectors = if sectors == 0 { 4 } else { sectors };
    let begin = (sectors + 1) * 512 + word(PAYLOAD_OFFSET)?;
    image.get(begin..begin + word(PAYLOAD_LENGTH)?)
}

fn decompressor(payload: &[u8]) -> Result<(&'static str, &'static str, &'static [&'static str])> {
    Ok(match payload {
        [0x1f, 0x8b, ..] => ("gzip", "gzip", &["-dc"]),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => ("xz-utils", "xz", &["-dc", "--single-stream"]),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", "zstd", &["-dc"]),
        [0x02, 0x21, 0x4c, 0x18, ..] => ("lz4", "lz4", &["-dc"]),
        [b'B', b'Z', b'h', ..] => ("bzip2", "bzip2", &["-dc"]),
        _ => bail!("the kernel is compressed in a way this tool doesn't know"),
    })
}
