//! The guest kernel, verified if the configuration says what it must be.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::Error;
use crate::config::{Digest, Resolved};
use crate::images::{self, Identity};
use crate::sys;

pub(super) fn open(config: &Resolved) -> Result<File, Error> {
    let path = &config.kernel.path.0;
    let failed = |source| Error::Boot {
        what: "kernel",
        path: path.clone(),
        key: "kernel.path",
        source,
    };
    let kernel = File::open(path).map_err(failed)?;
    if let Some(expected) = config.kernel.sha256 {
        let found = digest(path, &config.images.directory.0).map_err(failed)?;
        if found != expected {
            return Err(Error::Digest {
                path: path.clone(),
                found,
                expected,
            });
        }
    }
    Ok(kernel)
}

/// The file's SHA-256, remembered in `directory` for as long as the file is the same one: reading
/// all of a kernel would be a good part of a start.
pub(crate) fn digest(path: &Path, directory: &Path) -> io::Result<Digest> {
    let identity = Identity::of(path)?;
    let remembered = directory.join(format!("{}.sha256", identity.as_str()));
    if let Ok(bytes) = std::fs::read(&remembered)
        && let Ok(bytes) = bytes.try_into()
    {
        return Ok(Digest(bytes));
    }
    let mut hash = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hash)?;
    let found = Digest(hash.finalize().into());
    if Identity::of(path)? == identity {
        // Without it the next start only takes longer.
        let _ = remember(directory, &remembered, found);
    }
    Ok(found)
}

/// Writes it in a file that has no name until it is whole.
fn remember(directory: &Path, remembered: &Path, digest: Digest) -> io::Result<()> {
    let mut file = images::nameless(directory).map_err(io::Error::other)?;
    file.write_all(&digest.0)?;
    sys::publish(&file, remembered)
}
