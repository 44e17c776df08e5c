//! What a killed process leaves in the cache: names of locks nobody holds, and files whose making
//! was cut short.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

/// Removes from `directory` every lock that nobody holds, and what was being made under it.
///
/// Whoever waits for a lock finds that its name is gone and takes a new one.
pub(crate) fn sweep(directory: &Path) {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_none_or(|extension| extension != "lock") {
            continue;
        }
        let Ok(lock) = File::open(&path) else {
            continue;
        };
        let free = flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok();
        let named = lock.metadata().is_ok_and(|metadata| metadata.nlink() > 0);
        if free && named {
            // Before the lock's own name goes, as after that somebody else may make them.
            let _ = std::fs::remove_file(path.with_extension("new"));
            let _ = std::fs::remove_file(&path);
            tracing::info!(lock = %path.display(), "Removed a lock that nobody held");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_that_are_held_stay_and_others_go_with_what_was_half_made() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in [
            "held.lock",
            "held.new",
            "free.lock",
            "free.new",
            "free.erofs",
        ] {
            File::create(at(name)).unwrap();
        }
        let held = File::open(at("held.lock")).unwrap();
        flock(&held, FlockOperation::NonBlockingLockExclusive).unwrap();
        sweep(directory.path());
        let mut left: Vec<_> = std::fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["free.erofs", "held.lock", "held.new"]);
    }
}
