use std::process::{Child, Command};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

fn sleeper() -> Child {
    Command::new("sleep").arg("600").spawn().expect("sleep")
}

fn child_entry(child: &Child) -> Entry {
    let start_time = start_time(child.id()).expect("running");
    Entry::Child {
        pid: child.id(),
        start_time,
    }
}

fn state() -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().expect("tempdir");
    let directory = root.path().join("default/web");
    (root, directory)
}

/// As after kill -9: nothing is undone, only the lock goes.
fn kill_owner(mut ledger: Ledger) {
    ledger.commit();
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("directory");
    entries
        .map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect()
}

#[test]
fn dropping_undoes_and_committing_keeps() {
    let (root, directory) = state();
    for commit in [false, true] {
        let mut ledger = Ledger::create(&directory).expect("create");
        let path = directory.join("vm.sock");
        ledger
            .record(Entry::File { path: path.clone() })
            .expect("record");
        std::fs::write(&path, "").expect("write");
        if commit {
            ledger.commit();
        }
        drop(ledger);
        assert_eq!(path.exists(), commit);
        assert_eq!(directory.exists(), commit);
    }
    Ledger::open(&directory)
        .expect("open")
        .undo()
        .expect("undo");
    assert_eq!(names(root.path()), Vec::<String>::new());
}

#[test]
fn a_second_ledger_of_one_name_is_refused() {
    let (_root, directory) = state();
    let ledger = Ledger::create(&directory).expect("create");
    assert!(matches!(
        Ledger::create(&directory),
        Err(Error::Exists { .. })
    ));
    assert!(matches!(Ledger::open(&directory), Err(Error::InUse { .. })));
    kill_owner(ledger);
    assert!(matches!(
        Ledger::create(&directory),
        Err(Error::Exists { .. })
    ));
    Ledger::open(&directory)
        .expect("owner is gone")
        .undo()
        .expect("undo");
    assert!(matches!(
        Ledger::open(&directory),
        Err(Error::NotFound { .. })
    ));
}

#[test]
fn a_recorded_process_is_killed() {
    let (_root, directory) = state();
    let mut ledger = Ledger::create(&directory).expect("create");
    let mut child = sleeper();
    ledger.record(child_entry(&child)).expect("record");
    ledger.undo().expect("undo");
    assert!(!child.wait().expect("wait").success());
}

#[test]
fn a_logger_may_end_by_itself_and_a_stubborn_one_is_killed() {
    let (_root, directory) = state();
    let mut ledger = Ledger::create(&directory).expect("create");
    let mut orderly = Command::new("sh")
        .args(["-c", "cat; exit 3"])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .expect("sh");
    let mut stubborn = sleeper();
    for child in [&orderly, &stubborn] {
        let (pid, start_time) = (child.id(), start_time(child.id()).expect("running"));
        ledger
            .record(Entry::Logger { pid, start_time })
            .expect("record");
    }
    drop(orderly.stdin.take());
    ledger.undo().expect("undo");
    assert_eq!(orderly.wait().expect("wait").code(), Some(3));
    assert_eq!(stubborn.wait().expect("wait").code(), None);
}

#[test]
fn hooks_run_once_all_else_is_gone_also_in_another_process() {
    let (root, directory) = state();
    let socket = directory.join("vsock");
    let said = root.path().join("said");
    let script = format!("test ! -e {} && cat > {}", socket.display(), said.display());
    let poststop = serde_json::json!({
        "hooks": [{"path": "/bin/sh", "args": ["sh", "-c", script]}],
        "state": {"ociVersion": "1.2.0", "id": "c1", "status": "stopped", "bundle": root.path()},
    });
    let poststop = serde_json::from_value(poststop).expect("hooks");
    let mut ledger = Ledger::create(&directory).expect("create");
    ledger.record(Entry::Poststop(poststop)).expect("record");
    ledger
        .record(Entry::File {
            path: socket.clone(),
        })
        .expect("record");
    std::fs::write(&socket, "").expect("write");
    ledger.commit();
    drop(ledger);
    Ledger::open(&directory)
        .expect("open")
        .undo()
        .expect("undo");
    let said = std::fs::read_to_string(said).expect("said");
    assert!(said.contains(r#""status":"stopped""#), "{said}");
    assert!(!directory.exists());
}

#[test]
fn a_process_that_took_over_the_number_is_spared() {
    let (_root, directory) = state();
    let mut ledger = Ledger::create(&directory).expect("create");
    let mut child = sleeper();
    let Entry::Child { pid, start_time } = child_entry(&child) else {
        unreachable!()
    };
    ledger
        .record(Entry::Child {
            pid,
            start_time: start_time - 1,
        })
        .expect("record");
    ledger
        .record(Entry::Child {
            pid: u32::MAX,
            start_time,
        })
        .expect("record");
    ledger.undo().expect("undo");
    assert!(
        child.try_wait().expect("wait").is_none(),
        "killed a stranger"
    );
    child.kill().expect("kill");
    child.wait().expect("wait");
}

#[test]
fn what_cannot_be_undone_is_named_and_stays_listed() {
    let (_root, directory) = state();
    let mut ledger = Ledger::create(&directory).expect("create");
    let full = directory.join("logs");
    let file = directory.join("vm.sock");
    for (entry, directory) in [
        (Entry::Directory { path: full.clone() }, true),
        (Entry::File { path: file.clone() }, false),
    ] {
        ledger.record(entry).expect("record");
        if directory {
            std::fs::create_dir(&full).expect("mkdir");
            std::fs::write(full.join("forgotten"), "").expect("write");
        } else {
            std::fs::write(&file, "").expect("write");
        }
    }
    let error = ledger.undo().expect_err("not empty");
    assert!(
        error.to_string().contains("logs: Directory not empty"),
        "{error}"
    );
    assert!(!file.exists());

    let ledger = Ledger::open(&directory).expect("open");
    assert_eq!(ledger.entries(), [Entry::Directory { path: full.clone() }]);
    std::fs::remove_file(full.join("forgotten")).expect("remove");
    ledger.undo().expect("undo");
    assert!(!directory.exists());
}

#[test]
fn a_record_half_written_is_passed_over() {
    let (_root, directory) = state();
    let mut ledger = Ledger::create(&directory).expect("create");
    ledger
        .record(Entry::File {
            path: directory.join("a"),
        })
        .expect("record");
    std::fs::write(directory.join(NEW_LIST), "[{\"fi").expect("write");
    kill_owner(ledger);
    Ledger::open(&directory)
        .expect("open")
        .undo()
        .expect("undo");
    assert!(!directory.exists());
}

#[test]
fn a_list_that_is_none_is_an_error() {
    let (_root, directory) = state();
    kill_owner(Ledger::create(&directory).expect("create"));
    std::fs::write(directory.join(LIST), "not json").expect("write");
    assert!(matches!(
        Ledger::open(&directory),
        Err(Error::Malformed { .. })
    ));
}

/// A step of a start that nests: a directory holds the steps after it.
#[derive(Clone, Debug)]
enum Step {
    Directory,
    File,
    Child,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Killed at any point, before or after the thing last recorded came to be, replay in another
    /// process leaves nothing.
    #[test]
    fn replay_after_any_prefix_leaves_nothing(
        steps in proptest::collection::vec(
            prop_oneof![Just(Step::Directory), Just(Step::File), Just(Step::Child)], 0..8),
        last_came_to_be: bool,
    ) {
        let (root, directory) = state();
        let mut ledger = Ledger::create(&directory).expect("create");
        let mut place = directory.clone();
        let mut children = Vec::new();
        for (index, step) in steps.iter().enumerate() {
            let acquired = last_came_to_be || index + 1 < steps.len();
            let path = place.join(index.to_string());
            match step {
                Step::Directory => {
                    ledger.record(Entry::Directory { path: path.clone() }).expect("record");
                    if acquired {
                        std::fs::create_dir(&path).expect("mkdir");
                        place = path;
                    }
                }
                Step::File => {
                    ledger.record(Entry::File { path: path.clone() }).expect("record");
                    if acquired {
                        std::os::unix::net::UnixListener::bind(&path).expect("bind");
                    }
                }
                Step::Child => {
                    let mut child = sleeper();
                    ledger.record(child_entry(&child)).expect("record");
                    if !acquired {
                        child.kill().expect("kill");
                    }
                    children.push(child);
                }
            }
        }
        kill_owner(ledger);
        Ledger::open(&directory).expect("open").undo().expect("undo");
        prop_assert_eq!(names(root.path()), Vec::<String>::new());
        for mut child in children {
            prop_assert!(!child.wait().expect("wait").success());
        }
    }
}

#[test]
fn an_owner_killed_before_its_directory_leaves_nothing() {
    let (root, directory) = state();
    std::fs::create_dir(root.path().join("default")).expect("the namespace's directory");
    let error = Ledger::open(&directory).expect_err("there is no ledger");
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    assert!(names(root.path()).is_empty());
}

#[test]
fn namespaces_come_and_go_with_many_at_once() {
    let (root, _) = state();
    std::thread::scope(|scope| {
        for name in ["a", "b", "c", "d"] {
            let directory = root.path().join("default").join(name);
            scope.spawn(move || {
                for _ in 0..200 {
                    let ledger = Ledger::create(&directory).expect("create");
                    ledger.undo().expect("undo");
                }
            });
        }
    });
    assert!(names(root.path()).is_empty());
}
