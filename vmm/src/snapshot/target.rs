//! Where a snapshot goes: a file that has its name only once it is whole and on the disk.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::SnapshotError;

/// The name of the snapshot in its directory.
const NAME: &str = "snapshot";

/// A snapshot that is being written. Dropped before [`commit`](Self::commit), it leaves nothing.
#[derive(Debug)]
pub struct SnapshotTarget {
    file: File,
    dir: PathBuf,
    temporary: Option<PathBuf>,
}

impl SnapshotTarget {
    /// Makes an empty file in `dir`, readable by its owner alone: it will hold a guest's memory.
    ///
    /// # Errors
    /// What the system refused.
    pub fn create(dir: &Path) -> Result<Self, SnapshotError> {
        let mut random = [0; 8];
        let source = Path::new("/dev/urandom");
        File::open(source)
            .and_then(|mut file| file.read_exact(&mut random))
            .map_err(on("read", source))?;
        let name = format!(".{NAME}.{:016x}.tmp", u64::from_ne_bytes(random));
        let temporary = dir.join(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(on("create", &temporary))?;
        Ok(Self {
            file,
            dir: dir.to_path_buf(),
            temporary: Some(temporary),
        })
    }

    /// The file to write to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where a snapshot of a directory is.
    pub fn path_in(dir: &Path) -> PathBuf {
        dir.join(NAME)
    }

    /// Gives the file its name, in place of an older snapshot's, once its bytes are on the disk.
    ///
    /// # Errors
    /// What the system refused; the older snapshot is still there then.
    pub fn commit(mut self) -> Result<PathBuf, SnapshotError> {
        self.file.sync_all().map_err(SnapshotError::file("sync"))?;
        let path = Self::path_in(&self.dir);
        if let Some(temporary) = &self.temporary {
            fs::rename(temporary, &path).map_err(on("rename", temporary))?;
        }
        self.temporary = None;
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(on("sync", &self.dir))?;
        Ok(path)
    }
}

impl Drop for SnapshotTarget {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary
            && let Err(error) = fs::remove_file(temporary)
        {
            tracing::warn!(%error, path = %temporary.display(), "an unfinished snapshot stays");
        }
    }
}

fn on(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> SnapshotError {
    let path = path.to_path_buf();
    move |source| SnapshotError::Path { what, path, source }
}
