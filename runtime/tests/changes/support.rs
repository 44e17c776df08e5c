//! A snapshot, and a guest that sends what a test says.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use supermachine_protocol::changes::{Attributes, Encoder, Record};
use supermachine_runtime::changes::{Job, Outcome, Place, start};
use supermachine_vmm::jail::{Layer, Policy, Seccomp};
use tempfile::TempDir;

/// A snapshot's directory, beside one that nothing may get into.
pub(crate) struct Snapshot {
    root: TempDir,
    pub(crate) job: Job,
}

impl Snapshot {
    pub(crate) fn new(overlay: bool) -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("snapshot")).unwrap();
        fs::create_dir(root.path().join("outside")).unwrap();
        let job = Job {
            overlay,
            entries: 1000,
            bytes: 1 << 20,
            time: Duration::from_secs(20),
            silence: Duration::from_secs(10),
            jail: Policy {
                // What the filter forbids is to be found here; walls are for other tests.
                allow_missing: Layer::ALL.to_vec(),
                seccomp: Seccomp::Enforce,
                ..Policy::default()
            },
        };
        Self { root, job }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("snapshot").join(name)
    }

    pub(crate) fn outside(&self) -> PathBuf {
        self.root.path().join("outside")
    }

    pub(crate) fn make(&self, name: &str, content: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// Lets a guest say something; what became of it.
    pub(crate) fn told(&self, guest: impl FnOnce(UnixStream) + Send) -> Outcome {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let directory = self.root.path().join("snapshot");
        let place = Place::new(&directory, "test").unwrap();
        assert_eq!(place.staging.parent(), directory.parent());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let outcome = std::thread::scope(|scope| {
            scope.spawn(move || guest(theirs));
            let started = runtime.block_on(async { start(&self.job, &place, &ours) });
            drop(ours);
            runtime.block_on(started.unwrap().outcome())
        });
        assert_eq!(fs::read_dir(self.outside()).unwrap().count(), 0);
        fs::remove_dir_all(place.staging).unwrap();
        outcome
    }

    /// Sends these records.
    pub(crate) fn records(&self, records: &[Record]) -> Outcome {
        self.encoded(|encoder| {
            for record in records {
                encoder.record(record)?;
            }
            Ok(())
        })
    }

    /// Sends what `work` encodes.
    pub(crate) fn encoded(
        &self,
        work: impl FnOnce(&mut Encoder<&mut Vec<u8>>) -> std::io::Result<()>,
    ) -> Outcome {
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(&mut bytes, &plain(0o755), false).unwrap();
        work(&mut encoder).unwrap();
        encoder.finish().unwrap();
        self.told(move |mut guest| {
            // Who is refused does not listen to the end.
            let _ = guest.write_all(&bytes);
        })
    }

    /// Everything in the snapshot, by name.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        let mut left = vec![self.path("")];
        while let Some(directory) = left.pop() {
            for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
                let path = entry.path();
                if entry.file_type().unwrap().is_dir() {
                    left.push(path.clone());
                }
                let name = path.strip_prefix(self.path("")).unwrap();
                names.push(name.display().to_string());
            }
        }
        names.sort();
        names
    }
}

pub(crate) fn plain(mode: u16) -> Attributes {
    Attributes {
        mode,
        ..Attributes::default()
    }
}

pub(crate) fn directory(name: &str, opaque: bool, below: bool) -> Record {
    Record::Directory {
        name: name.into(),
        attributes: plain(0o755),
        opaque,
        below,
    }
}

pub(crate) fn file(name: &str) -> Record {
    Record::File {
        name: name.into(),
        attributes: plain(0o644),
        shared: false,
        size: 0,
    }
}

pub(crate) fn gone(name: &str, below: bool) -> Record {
    Record::Whiteout {
        name: name.into(),
        below,
    }
}

pub(crate) fn is_written(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Written { .. })
}

/// Why it was refused.
#[track_caller]
pub(crate) fn refused(outcome: Outcome) -> String {
    match outcome {
        Outcome::Refused { reason } => reason,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn is_whiteout(path: &Path) -> bool {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let metadata = fs::symlink_metadata(path);
    metadata.is_ok_and(|it| it.file_type().is_char_device() && it.rdev() == 0)
}

pub(crate) fn is_opaque(path: &Path) -> bool {
    let mut value = [0; 8];
    matches!(
        rustix::fs::getxattr(path, "trusted.overlay.opaque", &mut value[..]),
        Ok(1)
    ) && value[0] == b'y'
}
