use std::path::Path;

use super::limits::{Hierarchy, Kind, hierarchies};
use super::*;
use crate::config::AbsolutePath;
use crate::ledger::{self, Ledger};

fn config(root: &Path) -> Resolved {
    let mut config = Resolved::default();
    config.kernel.path = AbsolutePath(root.join("vmlinux"));
    config.kernel.initramfs = AbsolutePath(root.join("initramfs.img"));
    config.images.directory = AbsolutePath(root.join("images"));
    config.rootfs.directory = AbsolutePath(root.join("writable"));
    config.state.directory = AbsolutePath(root.join("state"));
    std::fs::create_dir(root.join("images")).expect("mkdir");
    config
}

#[test]
fn a_missing_kernel_names_the_key() {
    let root = tempfile::tempdir().expect("tempdir");
    let error = kernel::open(&config(root.path())).expect_err("missing");
    assert!(
        error
            .to_string()
            .contains("see kernel.path in the configuration"),
        "{error}"
    );
}

#[test]
fn a_kernel_that_differs_is_refused_also_after_it_was_right() {
    let root = tempfile::tempdir().expect("tempdir");
    let mut config = config(root.path());
    std::fs::write(&config.kernel.path.0, "kernel").expect("write");
    let right = kernel::digest(&config.kernel.path.0, root.path()).expect("digest");
    // printf kernel | sha256sum
    assert!(right.to_string().starts_with("6923dd1b"), "{right}");
    config.kernel.sha256 = Some(right);
    for _ in 0..2 {
        kernel::open(&config).expect("right");
    }
    std::fs::write(&config.kernel.path.0, "kernem").expect("write");
    let error = kernel::open(&config).expect_err("replaced");
    assert!(
        matches!(error, Error::Digest { expected, .. } if expected == right),
        "{error}"
    );
}

#[test]
fn hierarchies_are_those_containerd_uses() {
    let hybrid = "\
25 30 0:24 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 25 0:25 / /sys/fs/cgroup/cpuset rw,relatime shared:7 - cgroup cgroup rw,cpuset
32 25 0:26 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
33 25 0:27 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
34 25 0:28 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
    let at = |path: &str, kind| Hierarchy {
        root: path.into(),
        kind,
    };
    assert_eq!(
        hierarchies(hybrid),
        [
            at("/sys/fs/cgroup/cpuset", Kind::V1Cpuset),
            at("/sys/fs/cgroup/memory", Kind::V1)
        ]
    );
    let unified = "30 25 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
    assert_eq!(hierarchies(unified), [at("/sys/fs/cgroup", Kind::V2)]);
    assert_eq!(hierarchies(""), []);
}

/// On this host's own hierarchies.
#[test]
fn a_process_is_accounted_for_and_the_cgroup_goes_with_the_ledger() {
    let root = tempfile::tempdir().expect("tempdir");
    let mut ledger = Ledger::create(&root.path().join("default/web")).expect("ledger");
    let path = format!("supermachine-test-{}/web", std::process::id());
    let cgroup = HostCgroup::create(Path::new(&path), "", &mut ledger).expect("ledger");
    let Some(cgroup) = cgroup else {
        eprintln!("skipped: this host's cgroups cannot be written to");
        return;
    };
    let mut child = std::process::Command::new("sleep")
        .arg("600")
        .spawn()
        .expect("sleep");
    cgroup.add(child.id());
    let pid = child.id();
    let start_time = ledger::start_time(pid).expect("running");
    ledger
        .record(ledger::Entry::Child { pid, start_time })
        .expect("record");
    let accounted = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("cgroup");
    let directories = cgroup.directories().to_vec();
    assert_eq!(
        accounted.matches(&path).count(),
        directories.len(),
        "{accounted}"
    );

    drop(ledger);
    child.wait().expect("wait");
    for directory in directories {
        assert!(!directory.exists(), "{}", directory.display());
        std::fs::remove_dir(directory.parent().expect("parent")).expect("rmdir");
    }
}

/// From a bundle to open disks, and back to nothing.
#[test]
fn what_was_acquired_is_gone_with_its_files() {
    use crate::plan::{HostFacts, plan};
    use crate::request::{Create, Mount, Stdio};

    let root = tempfile::tempdir_in("/var/tmp").expect("tempdir");
    let config = config(root.path());
    for file in [&config.kernel.path.0, &config.kernel.initramfs.0] {
        std::fs::write(file, "stand-in").expect("write");
    }
    let snapshot = |name: &str| root.path().join(name).display().to_string();
    for name in ["1/fs", "2/fs", "3/fs"] {
        std::fs::create_dir_all(snapshot(name)).expect("mkdir");
        std::fs::write(root.path().join(name).join("file"), name).expect("write");
    }
    let mount = Mount {
        kind: "overlay".into(),
        source: "overlay".into(),
        options: vec![
            format!("lowerdir={}:{}", snapshot("2/fs"), snapshot("1/fs")),
            format!("upperdir={}", snapshot("3/fs")),
            format!("workdir={}", snapshot("3/work")),
        ],
        target: String::new(),
    };
    let stdio = Stdio::new("", "", "", false).expect("stdio");
    let create = Create::new("default", "web", root.path(), vec![mount], stdio).expect("create");
    let text = r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},
        "process":{"user":{"uid":0,"gid":0},"args":["sh"],"cwd":"/"},
        "linux":{"namespaces":[{"type":"pid"},{"type":"ipc"}]}}"#;
    let spec = serde_json::from_str(text).expect("spec");
    let plan = plan(&create, &spec, &HostFacts::read(&create, &spec), &config).expect("plan");

    let resources = acquire(&plan, &config).expect("resources");
    let found: Vec<(&str, bool)> = resources
        .disks
        .iter()
        .map(|disk| (disk.serial.as_str(), disk.read_only))
        .collect();
    // The writable directory held a file: it is the topmost layer.
    assert_eq!(found, [("layers", true), ("writable-0", false)]);
    let layers = &resources.disks[0];
    let mut end = 0;
    for (index, (file, part)) in layers.files.iter().zip(&layers.partitions).enumerate() {
        assert_eq!(part.name, format!("lower-{index}"));
        assert_eq!((part.disk.as_str(), part.offset), ("layers", end));
        assert_eq!(part.length, file.metadata().expect("image").len());
        end += part.length;
    }
    assert_eq!((layers.files.len(), layers.partitions.len()), (3, 3));
    drop(resources);
    let left = std::fs::read_dir(root.path().join("writable"))
        .expect("writable")
        .count();
    assert_eq!(left, 0);

    // A layer that isn't there is named, and leaves nothing either.
    std::fs::remove_dir_all(snapshot("1")).expect("remove");
    let error = acquire(&plan, &config).expect_err("missing layer");
    assert!(error.to_string().contains("1/fs"), "{error}");
}
