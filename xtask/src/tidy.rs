//! The layering of CONTRIBUTING.md as tests over the sources.

use std::fs;
use std::path::{Path, PathBuf};

use crate::paths;

/// Every Rust source below a folder of the checkout, with its path from there.
fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let root = paths::root();
    let mut found = Vec::new();
    let mut folders = vec![root.join(folder)];
    while let Some(dir) = folders.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(&root).unwrap().to_path_buf(), text));
            }
        }
    }
    found
}

/// The names of a package's ordinary dependencies.
fn dependencies(package: &str) -> Vec<String> {
    let manifest = fs::read_to_string(paths::root().join(package).join("Cargo.toml")).unwrap();
    manifest
        .lines()
        .skip_while(|line| line.trim() != "[dependencies]")
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split(['.', '=', ' ']).next())
        .filter(|name| !name.is_empty() && !name.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

/// Lines of code, not of comments, that contain `what`.
fn lines_with(text: &str, what: &str) -> Vec<usize> {
    let code = |line: &str| !line.trim_start().starts_with("//");
    let lines = text.lines().enumerate();
    lines
        .filter(|(_, line)| code(line) && line.contains(what))
        .map(|(at, _)| at + 1)
        .collect()
}

fn assert_none(folder: &str, what: &str, allowed: impl Fn(&Path) -> bool) {
    let mut places = Vec::new();
    for (path, text) in sources(folder).iter().filter(|(path, _)| !allowed(path)) {
        let lines = lines_with(text, what);
        places.extend(
            lines
                .iter()
                .map(|line| format!("{}:{line}", path.display())),
        );
    }
    assert!(
        places.is_empty(),
        "`{what}` doesn't belong in {}",
        places.join(", ")
    );
}

#[test]
fn vmm_knows_nothing_of_containers() {
    let found = dependencies("vmm");
    for name in [
        "oci-spec",
        "ttrpc",
        "libcontainer",
        "tokio",
        "containerd-shim-protos",
    ] {
        assert!(
            !found.iter().any(|dependency| dependency == name),
            "vmm depends on {name}"
        );
    }
}

#[test]
fn shim_speaks_to_the_runtime_alone() {
    assert!(
        !dependencies("shim")
            .iter()
            .any(|name| name == "supermachine-vmm")
    );
}

#[test]
fn devices_know_no_hypervisor() {
    assert_none("vmm/src/devices", "crate::hypervisor", |_| false);
}

#[test]
fn operating_systems_differ_in_four_folders_only() {
    // What tests look at from outside, such as residency, differs too.
    let leaves = ["hypervisor", "memory", "jail", "sys", "testing"];
    assert_none("vmm/src", "cfg(target_os", |path| {
        let part = path
            .strip_prefix("vmm/src")
            .ok()
            .and_then(|path| path.iter().next());
        part.is_some_and(|part| {
            let part = part.to_string_lossy();
            leaves.contains(&part.trim_end_matches(".rs"))
        })
    });
}

#[test]
fn runtime_and_shim_run_on_every_system_but_for_leaves() {
    // `tests.rs` may be about what one system has; a daemon of Linux has one call more.
    // Only Linux has snapshots whose directories changes go into.
    let leaves = [
        "runtime/src/sys/",
        "runtime/src/changes/mod.rs",
        "shim/src/daemon.rs",
    ];
    for folder in ["runtime/src", "shim/src"] {
        assert_none(folder, "cfg(target_os", |path| {
            let path = path.to_string_lossy();
            path.ends_with("/tests.rs") || leaves.iter().any(|leaf| path.starts_with(leaf))
        });
    }
}

#[test]
fn unsafe_is_forbidden_where_it_has_no_use() {
    for package in ["shim", "runtime", "protocol", "xtask"] {
        let source = paths::root().join(package).join("src");
        let crate_root = ["lib.rs", "main.rs"].map(|name| source.join(name));
        let text = crate_root
            .iter()
            .find_map(|path| fs::read_to_string(path).ok())
            .unwrap();
        assert!(
            text.contains("#![forbid(unsafe_code)]"),
            "{package} doesn't forbid unsafe"
        );
    }
}
