//! Files that come with a container: copies of the host's, for bind mounts.

use std::fs::{OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;

use oci_spec::runtime::Mount;
use supermachine_protocol::{FILE_PREFIX, FileContent};

use crate::bundle::check_id;
use crate::error::Error;

/// Writes each file to a container's directory.
pub(crate) fn write(directory: &Path, files: &[FileContent]) -> Result<(), Error> {
    for file in files {
        check_name(&file.name)?;
        let path = directory.join(&file.name);
        write_one(&path, file).map_err(Error::file("write", &path))?;
    }
    Ok(())
}

fn write_one(path: &Path, file: &FileContent) -> io::Result<()> {
    let mut target = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    target.write_all(&file.content)?;
    fchown(&target, Some(file.uid), Some(file.gid))?;
    // After the owner: changing that takes set-id bits away.
    target.set_permissions(Permissions::from_mode(file.mode & 0o7777))
}

/// Makes the sources of mounts that are of such files absolute; the config has them relative to the
/// container's directory.
pub(crate) fn locate(
    directory: &Path,
    files: &[FileContent],
    mounts: &mut [Mount],
) -> Result<(), Error> {
    for mount in mounts {
        let Some(source) = mount.source().as_ref() else {
            continue;
        };
        if mount.typ().as_deref() != Some("bind") {
            continue;
        }
        let name = source.to_string_lossy().into_owned();
        if !files.iter().any(|file| file.name == name) {
            return Err(Error::not_found("file", name));
        }
        mount.set_source(Some(directory.join(name)));
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), Error> {
    check_id("files", name)?;
    if !name.starts_with(FILE_PREFIX) {
        let reason = format!("{name:?} does not begin with {FILE_PREFIX:?}");
        return Err(Error::invalid("files", reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn file(name: &str, mode: u32) -> FileContent {
        let mut file = FileContent::new();
        file.name = name.to_owned();
        file.content = b"127.0.0.1 localhost\n".to_vec();
        file.mode = mode;
        let own = fs::metadata("/proc/self").unwrap();
        (file.uid, file.gid) = (own.uid(), own.gid());
        file
    }

    #[test]
    fn a_file_has_its_content_and_mode() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), &[file("file-0", 0o4751)]).unwrap();
        let path = directory.path().join("file-0");
        assert_eq!(fs::read(&path).unwrap(), b"127.0.0.1 localhost\n");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o4751);
        // A name is given once.
        write(directory.path(), &[file("file-0", 0o600)]).unwrap_err();
    }

    #[test]
    fn names_stay_in_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["", "..", "file-0/x", "file-/../x", "config.json", "/file-0"] {
            write(directory.path(), &[file(name, 0o600)]).unwrap_err();
            let mut mount = Mount::default();
            mount.set_typ(Some("bind".to_owned()));
            mount.set_source(Some(name.into()));
            locate(directory.path(), &[], &mut [mount]).unwrap_err();
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn sources_of_bind_mounts_alone_are_made_absolute() {
        let mut bind = Mount::default();
        bind.set_typ(Some("bind".to_owned()));
        bind.set_source(Some("file-1".into()));
        let mut tmpfs = Mount::default();
        tmpfs.set_typ(Some("tmpfs".to_owned()));
        tmpfs.set_source(Some("tmpfs".into()));
        let mut mounts = [bind, tmpfs];
        locate(Path::new("/c/1"), &[file("file-1", 0)], &mut mounts).unwrap();
        assert_eq!(
            mounts[0].source().as_deref(),
            Some(Path::new("/c/1/file-1"))
        );
        assert_eq!(mounts[1].source().as_deref(), Some(Path::new("tmpfs")));
    }
}
