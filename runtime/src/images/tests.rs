//! On Linux, which can mount what it has made.

#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, FileType, FlockOperation, Mode, XattrFlags, flock, mknodat, setxattr};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use tempfile::TempDir;

use std::path::Path;
use std::process::Command;

use super::*;
use crate::config::{AbsolutePath, Resolved, Size};

fn cache(root: &TempDir, budget: u64) -> Cache {
    let mut config = Resolved::default();
    config.images.directory = AbsolutePath(root.path().join("images"));
    config.images.budget = Size(budget);
    config.rootfs.directory = AbsolutePath(root.path().join("writable"));
    Cache::open(&config).expect("cache")
}

/// On a real file system: a tmpfs has no holes worth the name.
fn tempdir() -> TempDir {
    tempfile::tempdir_in("/var/tmp").expect("tempdir")
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
    std::fs::write(path, text).expect("write");
}

/// overlayfs's mark of a deleted file.
fn whiteout(path: &Path) {
    mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), 0).expect("mknod");
}

/// overlayfs's mark of a directory that hides what lies below.
fn opaque(path: &Path) {
    setxattr(path, "trusted.overlay.opaque", b"y", XattrFlags::empty()).expect("setxattr");
}

fn in_namespace<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).expect("unshare");
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private).expect("private");
            work()
        });
        work.join().expect("work")
    })
}

fn loop_mount(image: &File, at: &Path, kind: &str, options: &str) {
    use std::os::fd::AsRawFd;
    std::fs::create_dir_all(at).expect("mkdir");
    let source = format!("/proc/{}/fd/{}", std::process::id(), image.as_raw_fd());
    let status = Command::new("mount")
        .args(["-t", kind, "-o", options, &source])
        .arg(at)
        .status()
        .expect("mount");
    assert!(status.success());
}

/// Path and text of every file; what isn't a file has its type instead.
fn tree(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut left = vec![root.to_path_buf()];
    while let Some(directory) = left.pop() {
        for entry in std::fs::read_dir(&directory).expect("directory") {
            let path = entry.expect("entry").path();
            let kind = path.symlink_metadata().expect("metadata").file_type();
            let name = path
                .strip_prefix(root)
                .expect("below")
                .display()
                .to_string();
            if kind.is_dir() {
                left.push(path);
            } else if kind.is_file() {
                found.insert(name, std::fs::read_to_string(&path).expect("text"));
            } else {
                found.insert(name, format!("{kind:?}"));
            }
        }
    }
    found
}

/// Two layers as containerd unpacks them: the upper one deletes a file, hides a directory and
/// replaces a file.
fn layers(root: &Path) -> [PathBuf; 2] {
    let (lower, upper) = (root.join("1/fs"), root.join("2/fs"));
    write(&lower.join("etc/kept"), "kept");
    write(&lower.join("etc/deleted"), "deleted");
    write(&lower.join("etc/replaced"), "old");
    write(&lower.join("hidden/below"), "below");
    symlink("kept", lower.join("etc/link")).expect("symlink");
    write(&upper.join("etc/replaced"), "new");
    write(&upper.join("hidden/above"), "above");
    whiteout(&upper.join("etc/deleted"));
    opaque(&upper.join("hidden"));
    [upper, lower]
}

fn merged_view(cache: &Cache, root: &Path, images: &[File]) -> BTreeMap<String, String> {
    let _ = cache;
    in_namespace(|| {
        let stage = root.join("stage");
        let lower: Vec<String> = images
            .iter()
            .enumerate()
            .map(|(index, image)| {
                let at = stage.join(index.to_string());
                loop_mount(image, &at, "erofs", "ro,loop");
                at.display().to_string()
            })
            .collect();
        for name in ["upper", "work", "root"] {
            std::fs::create_dir_all(stage.join(name)).expect("mkdir");
        }
        let options = format!(
            "lowerdir={},upperdir={stage}/upper,workdir={stage}/work",
            lower.join(":"),
            stage = stage.display()
        );
        let options = CString::new(options).expect("options");
        let at = stage.join("root");
        mount(
            "overlay",
            &at,
            "overlay",
            MountFlags::empty(),
            Some(options.as_c_str()),
        )
        .expect("overlay");
        tree(&at)
    })
}

fn expected_view() -> BTreeMap<String, String> {
    let root = tempdir();
    let [upper, lower] = layers(root.path());
    let mut expected = tree(&lower);
    expected.remove("etc/deleted");
    expected.remove("hidden/below");
    for (name, text) in tree(&upper) {
        if name != "etc/deleted" {
            expected.insert(name, text);
        }
    }
    expected
}

#[test]
fn deletions_survive_the_way_into_images() {
    let root = tempdir();
    let cache = cache(&root, 1 << 30);
    let images = layers(root.path()).map(|layer| cache.layer(&layer).expect("image"));
    assert_eq!(merged_view(&cache, root.path(), &images), expected_view());
}

#[test]
fn merged_layers_show_the_same() {
    let root = tempdir();
    let cache = cache(&root, 1 << 30);
    let image = cache.merged(&layers(root.path())).expect("image");
    assert_eq!(merged_view(&cache, root.path(), &[image]), expected_view());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    assert!(
        !mounts.contains(&root.path().display().to_string()),
        "{mounts}"
    );
}

#[test]
fn a_hundred_layers_become_one_image() {
    let root = tempdir();
    let cache = cache(&root, 1 << 30);
    let layers: Vec<PathBuf> = (0..100)
        .map(|n| {
            // Long names, as containerd's are: they don't fit into one page of mount options.
            let name = format!("{}/{n}/fs", "snapshotter.v1.overlayfs".repeat(4));
            let layer = root.path().join(name);
            write(&layer.join(format!("file-{n}")), "");
            write(&layer.join("top"), &n.to_string());
            layer
        })
        .collect();
    let image = cache.merged(&layers).expect("image");
    let view = in_namespace(|| {
        let at = root.path().join("view");
        loop_mount(&image, &at, "erofs", "ro,loop");
        tree(&at)
    });
    assert_eq!(view.len(), 101);
    assert_eq!(view["top"], "0");
}

#[test]
fn owners_modes_times_and_attributes_come_along() {
    let root = tempdir();
    let cache = cache(&root, 1 << 30);
    let layer = root.path().join("fs");
    let file = layer.join("bin/ping");
    write(&file, "ping");
    std::os::unix::fs::chown(&file, Some(70_000), Some(42)).expect("chown");
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o4711)).expect("chmod");
    setxattr(
        &file,
        "security.capability",
        CAPABILITY,
        XattrFlags::empty(),
    )
    .expect("setxattr");
    setxattr(&file, "user.note", b"n", XattrFlags::empty()).expect("setxattr");
    std::fs::hard_link(&file, layer.join("bin/ping4")).expect("link");
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_000_000);
    File::open(&file)
        .expect("open")
        .set_modified(time)
        .expect("times");
    mknodat(
        CWD,
        layer.join("null"),
        FileType::CharacterDevice,
        Mode::RUSR,
        0x103,
    )
    .expect("mknod");

    let image = cache.layer(&layer).expect("image");
    in_namespace(|| {
        let at = root.path().join("view");
        loop_mount(&image, &at, "erofs", "ro,loop");
        let file = at.join("bin/ping");
        let metadata = file.metadata().expect("metadata");
        assert_eq!((metadata.uid(), metadata.gid()), (70_000, 42));
        assert_eq!(metadata.mode() & 0o7777, 0o4711);
        assert_eq!(metadata.modified().expect("time"), time);
        assert_eq!(metadata.nlink(), 2);
        let mut value = [0u8; 64];
        let length = rustix::fs::getxattr(&file, "security.capability", &mut value[..]);
        assert_eq!(length.expect("capability"), CAPABILITY.len());
        let length = rustix::fs::getxattr(&file, "user.note", &mut value[..]);
        assert_eq!(length.expect("attribute"), 1);
        let device = at.join("null").metadata().expect("device");
        assert!(device.file_type().is_char_device());
        assert_eq!(device.rdev(), 0x103);
    });
}

#[test]
fn large_holes_take_no_space() {
    use std::os::unix::fs::FileExt;
    let root = tempdir();
    let cache = cache(&root, 1 << 30);
    let layer = root.path().join("fs");
    write(&layer.join("small"), "small");
    let hole = 200u64 << 20;
    let sparse = File::create(layer.join("sparse")).expect("create");
    sparse.write_all_at(b"start", 0).expect("write");
    sparse
        .write_all_at(b"behind the hole", hole)
        .expect("write");
    let image = cache.layer(&layer).expect("image");
    let blocks = image.metadata().expect("metadata").blocks();
    assert!(blocks * 512 < 2 << 20, "{blocks} blocks");
    in_namespace(|| {
        let at = root.path().join("view");
        loop_mount(&image, &at, "erofs", "ro,loop");
        let small = std::fs::read_to_string(at.join("small")).expect("text");
        assert_eq!(small, "small");
        let sparse = File::open(at.join("sparse")).expect("open");
        assert_eq!(sparse.metadata().expect("metadata").len(), hole + 15);
        for (offset, expected) in [
            (0, b"start\0"),
            (hole - 3, b"\0\0\0beh"),
            (hole / 2, &[0; 6]),
        ] {
            let mut found = [1; 6];
            sparse.read_exact_at(&mut found, offset).expect("read");
            assert_eq!(&found, expected, "at {offset}");
        }
    });
}

/// cap_net_raw=ep, revision 2 (linux/capability.h, struct vfs_cap_data).
const CAPABILITY: &[u8] = &[
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

fn images_in(root: &TempDir) -> Vec<String> {
    let entries = std::fs::read_dir(root.path().join("images")).expect("directory");
    let mut names: Vec<String> = entries
        .map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    names
}

#[test]
fn an_image_is_made_once() {
    let root = tempdir();
    let cache = cache(&root, 1 << 30);
    let layer = root.path().join("fs");
    write(&layer.join("a"), "a");
    let first = cache
        .layer(&layer)
        .expect("image")
        .metadata()
        .expect("metadata")
        .ino();
    let second = cache
        .layer(&layer)
        .expect("image")
        .metadata()
        .expect("metadata")
        .ino();
    assert_eq!(first, second);
    assert_eq!(images_in(&root).len(), 1, "{:?}", images_in(&root));
}

#[test]
fn a_name_used_again_is_another_image() {
    let root = tempdir();
    let cache = cache(&root, 1 << 30);
    let layer = root.path().join("7/fs");
    let read = |cache: &Cache| {
        let image = cache.layer(&layer).expect("image");
        in_namespace(|| {
            let at = root.path().join("view");
            loop_mount(&image, &at, "erofs", "ro,loop");
            tree(&at)["a"].clone()
        })
    };
    write(&layer.join("a"), "old");
    assert_eq!(read(&cache), "old");
    std::fs::remove_dir_all(&layer).expect("remove");
    write(&layer.join("a"), "new");
    assert_eq!(read(&cache), "new");
}

#[test]
fn makers_of_one_image_wait_for_each_other() {
    let root = tempdir();
    let cache = cache(&root, 1 << 30);
    let layer = root.path().join("fs");
    for n in 0..200 {
        write(&layer.join(n.to_string()), &"x".repeat(1000));
    }
    let inodes: Vec<u64> = std::thread::scope(|scope| {
        let makers: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| cache.layer(&layer).expect("image")))
            .collect();
        let inode = |image: File| image.metadata().expect("metadata").ino();
        makers
            .into_iter()
            .map(|maker| inode(maker.join().expect("maker")))
            .collect()
    });
    assert!(inodes.iter().all(|inode| *inode == inodes[0]), "{inodes:?}");
    assert_eq!(images_in(&root).len(), 1, "{:?}", images_in(&root));
}

#[test]
fn the_budget_takes_the_image_unused_longest_and_never_one_in_use() {
    let root = tempdir();
    let mib = 1 << 20;
    let cache = cache(&root, 5 * mib);
    let layer = |name: &str| {
        let layer = root.path().join(name);
        write(&layer.join("a"), &"x".repeat(2 * mib as usize));
        layer
    };
    let held = cache.layer(&layer("1")).expect("image");
    release(cache.layer(&layer("2")).expect("image"));
    let names = images_in(&root);
    drop(cache.layer(&layer("3")).expect("image"));
    let left = images_in(&root);
    assert_eq!(left.len(), 2, "{left:?}");
    assert_eq!(
        left.iter().filter(|name| names.contains(name)).count(),
        1,
        "{left:?}"
    );
    assert_eq!(
        held.metadata().expect("metadata").nlink(),
        1,
        "the image in use is gone"
    );
    drop(cache.layer(&layer("2")).expect("made again"));
}

/// Closes an image, and waits until processes that other tests are forking have closed theirs.
fn release(image: File) {
    use std::os::fd::AsRawFd;
    let by_name = format!("/proc/self/fd/{}", image.as_raw_fd());
    let same = File::open(by_name).expect("open again");
    drop(image);
    flock(&same, FlockOperation::LockExclusive).expect("lock");
}

#[test]
fn a_copy_has_no_name_and_cannot_be_written_to() {
    let root = tempdir();
    let cache = cache(&root, 1 << 30);
    let layer = root.path().join("fs");
    write(&layer.join("a"), "a");
    let image = cache.copy(&layer).expect("image");
    assert_eq!(image.metadata().expect("metadata").nlink(), 0);
    assert!(std::os::unix::fs::FileExt::write_at(&image, b"x", 0).is_err());
    assert_eq!(images_in(&root), Vec::<String>::new());
    in_namespace(|| {
        let at = root.path().join("view");
        loop_mount(&image, &at, "erofs", "ro,loop");
        assert_eq!(tree(&at)["a"], "a");
    });
}

#[test]
fn a_directory_that_is_not_there_is_named() {
    let root = tempdir();
    let cache = cache(&root, 1 << 30);
    let missing = root.path().join("missing/fs");
    for result in [
        cache.layer(&missing),
        cache.copy(&missing),
        cache.merged(std::slice::from_ref(&missing)),
    ] {
        let error = result.expect_err("missing");
        assert!(
            matches!(&error, Error::Source { path, .. } if *path == missing),
            "{error}"
        );
    }
    assert_eq!(images_in(&root), Vec::<String>::new());
}

#[test]
fn a_failing_mkfs_says_why() {
    let root = tempdir();
    let file = root.path().join("a-file");
    write(&file, "");
    let image = File::create(root.path().join("image")).expect("create");
    let error = erofs::write(&file, &image).expect_err("not a directory");
    assert!(
        error.to_string().starts_with("mkfs.erofs failed on "),
        "{error}"
    );
}

#[test]
fn writable_disks_are_empty_sparse_and_apart() {
    let root = tempdir();
    let cache = cache(&root, 1 << 30);
    let size = 8u64 << 30;
    let started = std::time::Instant::now();
    let first = cache.writable(size).expect("disk");
    let made = started.elapsed();
    let started = std::time::Instant::now();
    let second = cache.writable(size).expect("disk");
    println!(
        "8 GiB ext4: {made:?} the first time, then {:?}",
        started.elapsed()
    );
    for disk in [&first, &second] {
        let metadata = disk.metadata().expect("metadata");
        assert_eq!((metadata.len(), metadata.nlink()), (size, 0));
        assert!(
            metadata.blocks() * 512 < 1 << 20,
            "{} blocks",
            metadata.blocks()
        );
    }
    in_namespace(|| {
        let (one, two) = (root.path().join("one"), root.path().join("two"));
        loop_mount(&first, &one, "ext4", "loop");
        loop_mount(&second, &two, "ext4", "loop");
        std::fs::write(one.join("a"), "a").expect("write");
        assert_eq!(tree(&two), BTreeMap::new());
        // What the guest's kernel would zero in the background shows as allocated.
        assert!(first.metadata().expect("metadata").blocks() * 512 < 2 << 20);
    });
}

#[test]
fn data_is_copied_to_its_place() {
    use std::os::unix::fs::FileExt;
    let root = tempdir();
    let from = cache::nameless(root.path()).expect("file");
    from.set_len(10 << 20).expect("size");
    from.write_all_at(b"start", 0).expect("write");
    from.write_all_at(&[7; 300_000], 5_000_001).expect("write");
    let to = cache::nameless(root.path()).expect("file");
    ext4::copy_data(&from, &to).expect("copy");
    let (mut a, mut b) = (vec![0; 10 << 20], vec![1; 10 << 20]);
    from.read_exact_at(&mut a, 0).expect("read");
    to.read_exact_at(&mut b, 0).expect("read");
    assert!(a == b);
    assert!(to.metadata().expect("metadata").blocks() * 512 < 1 << 20);
}
