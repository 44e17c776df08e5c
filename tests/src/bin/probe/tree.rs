//! A tree of files, attribute by attribute.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{lgetxattr, llistxattr};
use sha2::{Digest, Sha256};

/// More than any attribute here has.
const XATTR_MAX: usize = 64 << 10;

/// Writes a line for each file below `root`, and for itself, in the order of their names. What says
/// more of the file system than of the file is left out: sizes and links of directories, inode
/// numbers, the space that is taken.
pub(crate) fn print(root: &Path, out: &mut impl Write) -> io::Result<()> {
    let mut first_names = HashMap::new();
    let mut left = vec![root.to_path_buf()];
    while let Some(path) = left.pop() {
        let found = path.symlink_metadata()?;
        if found.is_dir() {
            let entries = fs::read_dir(&path)?.map(|entry| entry.map(|entry| entry.path()));
            let mut entries = entries.collect::<io::Result<Vec<PathBuf>>>()?;
            // The last is the next.
            entries.sort_by(|one, other| other.cmp(one));
            left.append(&mut entries);
        }
        let name = escaped(path.strip_prefix(root).unwrap_or(&path).as_os_str());
        let attributes = attributes(&path, &found)?;
        write!(out, "{name}: {attributes}")?;
        if !found.is_dir() && found.nlink() > 1 {
            let first = first_names.entry(found.ino()).or_insert(name);
            write!(out, " links={} same={first}", found.nlink())?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn attributes(path: &Path, found: &Metadata) -> io::Result<String> {
    let kind = found.file_type();
    let mut said = format!(
        "mode={:o} owner={}:{} time={}.{:09}",
        found.mode(),
        found.uid(),
        found.gid(),
        found.mtime(),
        found.mtime_nsec()
    );
    if kind.is_symlink() {
        said += &format!(" to={}", escaped(fs::read_link(path)?.as_os_str()));
    } else if kind.is_file() {
        let mut hash = Sha256::new();
        io::copy(&mut fs::File::open(path)?, &mut hash)?;
        said += &format!(
            " size={} sha256={}",
            found.size(),
            hexadecimal(&hash.finalize())
        );
    } else if kind.is_char_device() || kind.is_block_device() {
        said += &format!(" device={:#x}", found.rdev());
    }
    let mut names = vec![0; XATTR_MAX];
    let length = llistxattr(path, &mut names[..])?;
    let mut names: Vec<&[u8]> = names
        .get(..length)
        .unwrap_or_default()
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .collect();
    names.sort();
    for name in names {
        let mut value = vec![0; XATTR_MAX];
        let length = lgetxattr(path, name, &mut value[..])?;
        let value = hexadecimal(value.get(..length).unwrap_or_default());
        said += &format!(" {}={value}", escaped(OsStr::from_bytes(name)));
    }
    Ok(said)
}

fn escaped(text: &OsStr) -> String {
    text.as_bytes().escape_ascii().to_string()
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
