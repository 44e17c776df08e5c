//! A root file system that its engine has mounted itself, found in the host's mount table.
//!
//! Docker's graph drivers hand over a bundle whose `root.path` is a mounted overlay. A guest can't
//! be given a mount, but it can be given what the overlay is made of, as if a snapshotter had
//! described it.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;

use crate::plan::split_layers;
use crate::request::{Create, Error, Mount};

const TABLE: &str = "/proc/self/mountinfo";

/// `create` with a description of its root, if that is an overlay somebody has mounted.
///
/// # Errors
/// The mount table can't be read.
pub fn with_root(create: &Create, spec: &Spec) -> Result<Create, Error> {
    let mut create = create.clone();
    if create.rootfs.is_empty()
        && let Some(root) = spec.root()
    {
        let directory = create.bundle.join(root.path());
        // One that isn't there is for others to tell.
        if let Ok(directory) = directory.canonicalize() {
            create.rootfs.extend(overlay_at(&directory)?);
        }
    }
    Ok(create)
}

/// The overlay mounted at `directory`, which has no links in it.
fn overlay_at(directory: &Path) -> Result<Option<Mount>, Error> {
    let table = std::fs::read(TABLE).map_err(|source| Error::Unreadable {
        path: TABLE.into(),
        source,
    })?;
    let overlay = find(&String::from_utf8_lossy(&table), directory);
    Ok(overlay.map(|overlay| overlay.describe(directory, |path| path.canonicalize().ok())))
}

/// An overlay as the mount table has it.
#[derive(Debug, Default, PartialEq)]
struct Overlay {
    /// Topmost first, without the escapes by which a colon is told from a separator.
    lower: Vec<String>,
    /// All other options, those of the mount first.
    others: Vec<String>,
}

/// What was mounted last at `directory`, if that is a whole overlay.
fn find(table: &str, directory: &Path) -> Option<Overlay> {
    // proc_pid_mountinfo(5): id, parent, device, root, mount point, options, any number of optional
    // fields, "-", type, source, options of the file system.
    let last = table.lines().rfind(|line| {
        let point = line.split(' ').nth(4);
        point.is_some_and(|point| Path::new(&unescape(point)) == directory)
    })?;
    let (mount, system) = last.split_once(" - ")?;
    let mount: Vec<&str> = mount.split(' ').collect();
    let [kind, _, options] = system.split(' ').collect::<Vec<_>>()[..] else {
        return None;
    };
    let (root, point_options) = (mount.get(3)?, mount.get(5)?);
    if kind != "overlay" || *root != "/" {
        return None;
    }
    let mut overlay = Overlay::default();
    for option in point_options.split(',').chain(options.split(',')) {
        let option = unescape(option).to_string_lossy().into_owned();
        if let Some(layers) = option.strip_prefix("lowerdir=") {
            overlay.lower.extend(split_layers(layers));
        } else if let Some(layer) = option.strip_prefix("lowerdir+=") {
            overlay.lower.push(layer.to_owned());
        } else {
            overlay.others.push(option);
        }
    }
    Some(overlay)
}

impl Overlay {
    /// The mount as a snapshotter would have described it. `resolve` follows links; it answers
    /// nothing for what isn't there.
    fn describe(self, directory: &Path, resolve: impl Fn(&Path) -> Option<PathBuf>) -> Mount {
        let upper = self
            .others
            .iter()
            .find_map(|option| option.strip_prefix("upperdir="));
        // Where the engine stood when it mounted: layers have short names then, to fit into a page.
        // Docker's is the driver's directory, of DRIVER/ID/merged; containerd's is that of all
        // snapshots, of SNAPSHOTS/N/fs.
        let bases: Vec<PathBuf> = [Some(directory), upper.map(Path::new)]
            .into_iter()
            .flatten()
            .filter_map(|path| Some(path.parent()?.parent()?.to_owned()))
            .collect();
        let find = |path: &str| -> String {
            let found = match Path::new(path) {
                path if path.is_absolute() => resolve(path),
                path => bases.iter().find_map(|base| resolve(&base.join(path))),
            };
            found.map_or_else(
                || path.to_owned(),
                |path| path.to_string_lossy().into_owned(),
            )
        };
        let lower: Vec<String> = self
            .lower
            .iter()
            .map(|layer| escape(&find(layer)))
            .collect();
        let mut options = vec![format!("lowerdir={}", lower.join(":"))];
        for option in &self.others {
            options.push(match option.split_once('=') {
                Some((name @ ("upperdir" | "workdir"), path)) => {
                    format!("{name}={}", escape(&find(path)))
                }
                _ => option.clone(),
            });
        }
        Mount {
            kind: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options,
            target: String::new(),
        }
    }
}

/// Undoes the mount table's escapes, three octal digits each.
pub(crate) fn unescape(text: &str) -> OsString {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let code = after.get(..3).filter(|_| byte == b'\\');
        let code =
            code.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes)
}

fn escape(path: &str) -> String {
    path.replace('\\', "\\\\").replace(':', "\\:")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line of the mount table.
    fn line(point: &str, root: &str, options: &str, kind: &str, system: &str) -> String {
        format!("36 25 0:32 {root} {point} {options} shared:1 - {kind} overlay {system}\n")
    }

    fn described(table: &str, directory: &str) -> Option<Vec<String>> {
        let directory = Path::new(directory);
        // Links lead where they do in Docker's directory: l/NAME to ../NAME/diff.
        let resolve = |path: &Path| {
            let text = path.to_str()?;
            match text.split_once("/l/") {
                Some((home, name)) => Some(PathBuf::from(format!("{home}/{name}/diff"))),
                None => [HOME, SNAPSHOTS, "/a", "/e"]
                    .iter()
                    .any(|known| text.starts_with(known))
                    .then(|| path.to_owned()),
            }
        };
        find(table, directory).map(|overlay| overlay.describe(directory, resolve).options)
    }

    const HOME: &str = "/var/lib/docker/overlay2";
    const SNAPSHOTS: &str = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";

    #[test]
    fn layers_of_dockers_driver_are_found_by_short_and_by_long_names() {
        let expected = [
            format!("lowerdir={HOME}/AAA/diff:{HOME}/BBB/diff"),
            "rw".to_owned(),
            "relatime".to_owned(),
            "rw".to_owned(),
            format!("upperdir={HOME}/cafe/diff"),
            format!("workdir={HOME}/cafe/work"),
            "index=off".to_owned(),
        ];
        let long = format!(
            "rw,lowerdir={HOME}/l/AAA:{HOME}/l/BBB,upperdir={HOME}/cafe/diff,\
             workdir={HOME}/cafe/work,index=off"
        );
        let short = "rw,lowerdir=l/AAA:l/BBB,upperdir=cafe/diff,workdir=cafe/work,index=off";
        let plus =
            "rw,lowerdir+=l/AAA,lowerdir+=l/BBB,upperdir=cafe/diff,workdir=cafe/work,index=off";
        let point = format!("{HOME}/cafe/merged");
        for system in [&long, short, plus] {
            let table = line(&point, "/", "rw,relatime", "overlay", system);
            assert_eq!(described(&table, &point).unwrap(), expected, "{system}");
        }
    }

    #[test]
    fn layers_of_containerds_snapshots_are_named_from_where_they_all_are() {
        let home = SNAPSHOTS;
        let point = "/var/lib/docker/rootfs/overlayfs/cafe";
        let system = format!("rw,lowerdir=2/fs:1/fs,upperdir={home}/3/fs,workdir={home}/3/work");
        let table = line(point, "/", "ro", "overlay", &system);
        let options = described(&table, point).unwrap();
        assert_eq!(options[0], format!("lowerdir={home}/2/fs:{home}/1/fs"));
        assert_eq!(options[1], "ro");
    }

    #[test]
    fn names_with_escapes_come_through() {
        // A directory "a:b, c\\d" in overlayfs' own escapes, in the mount table's.
        let system = r"rw,lowerdir=/a\134:b\054\040c\134\134d:/e";
        let table = line(r"/r\040oot", "/", "rw", "overlay", system);
        let options = described(&table, "/r oot").unwrap();
        assert_eq!(options[0], r"lowerdir=/a\:b, c\\d:/e");
        assert_eq!(
            split_layers(&options[0]["lowerdir=".len()..]),
            [r"/a:b, c\d", "/e"]
        );
    }

    #[test]
    fn only_the_last_mount_counts_and_only_a_whole_overlay() {
        let overlay = line("/r", "/", "rw", "overlay", "rw,lowerdir=/a:/b");
        let other = line("/r", "/", "rw", "ext4", "rw");
        let part = line("/r", "/usr", "rw", "overlay", "rw,lowerdir=/a:/b");
        assert!(described(&format!("{other}{overlay}"), "/r").is_some());
        assert!(described(&format!("{overlay}{other}"), "/r").is_none());
        assert!(described(&part, "/r").is_none());
        assert!(described(&overlay, "/r/s").is_none());
        assert!(described("", "/r").is_none());
        assert!(described("garbage\n36 25\n1 2 3 / /r", "/r").is_none());
    }

    #[test]
    fn a_bundle_with_a_plain_directory_stays_as_it_is() {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::create_dir(bundle.path().join("rootfs")).unwrap();
        let stdio = crate::request::Stdio::new("", "", "", false).unwrap();
        let create = Create::new("n", "c", bundle.path(), Vec::new(), stdio).unwrap();
        let spec: Spec =
            serde_json::from_str(r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"}}"#).unwrap();
        assert_eq!(with_root(&create, &spec).unwrap().rootfs, []);
    }
}
