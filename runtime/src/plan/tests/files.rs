//! Files of the host: which are copied for the guest, and which are refused.

use serde_json::{Value, json};

use super::*;

fn facts(files: &[(&str, u64)]) -> HostFacts {
    HostFacts {
        files: files
            .iter()
            .map(|(path, size)| (PathBuf::from(path), *size))
            .collect(),
        ..FACTS
    }
}

fn plan_with(mounts: Value, files: &[(&str, u64)]) -> Result<Plan, Error> {
    let text = altered(&["mounts"], mounts);
    plan(
        &create(vec![overlay(1)], false),
        &spec(&text),
        &facts(files),
        &Resolved::default(),
    )
}

#[test]
fn files_that_engines_make_and_those_that_are_only_read_are_copied() {
    let mounts = json!([
        {"destination": "/etc/hosts", "type": "bind", "source": "/d/hosts",
         "options": ["rbind", "rprivate"]},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/sbin/docker-init", "type": "bind", "source": "/usr/bin/docker-init",
         "options": ["bind", "ro"]},
        {"destination": "/relative", "type": "none", "source": "in-bundle",
         "options": ["rbind", "rw", "ro"]},
    ]);
    let files = [
        ("/d/hosts", 100),
        ("/usr/bin/docker-init", 1 << 20),
        ("/run/bundle/in-bundle", 0),
    ];
    let plan = plan_with(mounts, &files).expect("plan");
    let sources: Vec<_> = plan
        .files
        .iter()
        .map(|file| (file.name.as_str(), file.source.to_str().expect("UTF-8")))
        .collect();
    assert_eq!(
        sources,
        [
            ("file-0", "/d/hosts"),
            ("file-1", "/usr/bin/docker-init"),
            ("file-2", "/run/bundle/in-bundle")
        ]
    );
    let mounts = serde_json::to_value(plan.guest_spec.mounts()).expect("JSON");
    assert_eq!(
        mounts,
        json!([
            {"destination": "/etc/hosts", "type": "bind", "source": "file-0",
             "options": ["rbind", "rprivate"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/sbin/docker-init", "type": "bind", "source": "file-1",
             "options": ["bind", "ro"]},
            {"destination": "/relative", "type": "bind", "source": "file-2",
             "options": ["rbind", "rw", "ro"]},
        ])
    );
    // Where they are is not the guest's to know.
    let guest = serde_json::to_string(&plan.guest_spec).expect("JSON");
    assert!(!guest.contains("/d/hosts"), "{guest}");
}

#[test]
fn what_a_copy_cannot_stand_for_is_refused() {
    let bind = |options: &[&str]| json!([{"destination": "/data", "type": "bind", "source": "/d/file", "options": options}]);
    let refused = |mounts: Value, files: &[(&str, u64)]| {
        plan_with(mounts, files).expect_err("refusal").to_string()
    };
    let rules = [
        refused(bind(&["rbind"]), &[("/d/file", 1)]),
        refused(bind(&["bind", "ro", "rw"]), &[("/d/file", 1)]),
        refused(bind(&["bind", "ro"]), &[("/d/file", FILES_MAX + 1)]),
        refused(bind(&["bind", "ro"]), &[]),
    ];
    expect![[r#"
        The mount at /data is not supported in a microVM: the host's /d/file would not have what the container writes; expected it read-only
        The mount at /data is not supported in a microVM: the host's /d/file would not have what the container writes; expected it read-only
        The mount at /data is not supported in a microVM: with the 3145729 bytes of /d/file the container's files are more than 3145728 bytes
        The mount at /data is not supported in a microVM: the host's /d/file cannot be shared with the guest yet"#]]
    .assert_eq(&rules.join("\n"));
}

#[test]
fn the_facts_hold_the_files_among_the_sources() {
    let bundle = tempfile::tempdir().expect("tempdir");
    std::fs::write(bundle.path().join("file"), "text").expect("write");
    std::os::unix::fs::symlink("file", bundle.path().join("link")).expect("link");
    let bind = |source: &str| json!({"destination": "/x", "type": "bind", "source": source});
    let outside = bundle.path().join("file").display().to_string();
    let mounts = json!([bind("link"), bind("."), bind("gone"), bind(&outside),
        {"destination": "/x", "type": "tmpfs", "source": "file"}]);
    let stdio = Stdio::new("", "", "", false).expect("stdio");
    let create = Create::new("n", "c", bundle.path(), Vec::new(), stdio).expect("create");
    let found = HostFacts::read(&create, &spec(&altered(&["mounts"], mounts))).files;
    let expected = ["file", "link"].map(|name| (bundle.path().join(name), 4));
    assert_eq!(found, expected.into());
}
