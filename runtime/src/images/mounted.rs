//! Which directories are mounts of an EROFS image, and of which file.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::statfs;

use crate::mounted::unescape;

/// EROFS_SUPER_MAGIC_V1 of linux/magic.h.
const EROFS: u32 = 0xe0f5_e1e2;

/// Those of `directories` that show all of one image, with its file. Others are directories like any.
pub(crate) fn mounted(directories: Vec<PathBuf>) -> BTreeMap<PathBuf, PathBuf> {
    // A file system's type is a word of the machine's own, sign and all.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let erofs = |path: &PathBuf| {
        statfs(path).is_ok_and(|info| i128::from(info.f_type) == i128::from(EROFS))
    };
    let directories: Vec<PathBuf> = directories.into_iter().filter(erofs).collect();
    if directories.is_empty() {
        return BTreeMap::new();
    }
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let sources = sources(&String::from_utf8_lossy(&table));
    let file = |path: &PathBuf| backing_file(sources.get(path)?);
    directories
        .into_iter()
        .filter_map(|path| file(&path).map(|file| (path, file)))
        .collect()
}

/// The source of each mount of a whole EROFS image, by where it is mounted; the last one there is
/// what is seen.
fn sources(mountinfo: &str) -> BTreeMap<PathBuf, PathBuf> {
    let mut sources = BTreeMap::new();
    for line in mountinfo.lines() {
        // proc_pid_mountinfo(5): "… root mountpoint options … - type source super-options"
        let Some((mount, system)) = line.split_once(" - ") else {
            continue;
        };
        let mut mount = mount.split(' ').skip(3);
        let (Some(root), Some(at)) = (mount.next(), mount.next()) else {
            continue;
        };
        let at = PathBuf::from(unescape(at));
        let mut system = system.split(' ');
        let (kind, source, options) = (system.next(), system.next(), system.next());
        let mut options = options.unwrap_or_default().split(',');
        let several = options.any(|option| option.starts_with("device="));
        match (kind, source) {
            (Some("erofs"), Some(source)) if root == "/" && !several => {
                sources.insert(at, PathBuf::from(unescape(source)));
            }
            _ => {
                sources.remove(&at);
            }
        }
    }
    sources
}

/// The file that is mounted: by itself, or through a loop device.
fn backing_file(source: &Path) -> Option<PathBuf> {
    let file = match source.strip_prefix("/dev") {
        Ok(device) => {
            let name = device.to_str()?;
            let told = std::fs::read(format!("/sys/block/{name}/loop/backing_file")).ok()?;
            PathBuf::from(OsString::from_vec(told.trim_ascii_end().to_vec()))
        }
        Err(_) => source.to_path_buf(),
    };
    file.metadata()
        .is_ok_and(|found| found.is_file())
        .then_some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_those_of_whole_images_that_are_seen() {
        let table = "\
36 35 98:0 / / rw,noatime - ext4 /dev/root rw
40 36 7:0 / /snapshots/1/fs ro,relatime shared:1 - erofs /dev/loop0 ro,user_xattr
41 36 0:99 / /snapshots/a\\040b/fs ro - erofs /snapshots/a\\040b/layer.erofs ro
42 36 7:2 /part /snapshots/3/fs ro - erofs /dev/loop2 ro
43 36 7:3 / /snapshots/4/fs ro - erofs /dev/loop3 ro
44 36 0:50 / /snapshots/4/fs rw - tmpfs tmpfs rw
45 36 7:5 / /snapshots/5/fs ro - erofs /dev/loop5 ro,device=/dev/loop6
broken
";
        let expected = [
            ("/snapshots/1/fs", "/dev/loop0"),
            ("/snapshots/a b/fs", "/snapshots/a b/layer.erofs"),
        ];
        let expected = expected.map(|(at, source)| (PathBuf::from(at), PathBuf::from(source)));
        assert_eq!(sources(table), expected.into());
    }

    #[test]
    fn other_directories_are_not_named() {
        assert_eq!(
            mounted(vec!["/".into(), "/not there".into()]),
            BTreeMap::new()
        );
    }
}
