//! Files of the host, read for the guest.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use supermachine_protocol::FileContent;

use super::Error;
use crate::plan::{FILES_MAX, HostFile};

/// Reads each file as it stands. What has changed since it was planned is as good, within limits.
pub(super) fn read(files: &[HostFile]) -> Result<Vec<FileContent>, Error> {
    let mut left = FILES_MAX;
    files
        .iter()
        .map(|file| {
            let content = read_one(&file.name, &file.source, left);
            let content = content.map_err(|source| Error::HostFile {
                path: file.source.clone(),
                source,
            })?;
            left = left.saturating_sub(content.content.len() as u64);
            Ok(content)
        })
        .collect()
}

fn read_one(name: &str, path: &Path, most: u64) -> io::Result<FileContent> {
    // Without waiting, should a fifo have taken its place.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file any more"));
    }
    let mut content = FileContent::new();
    content.name = name.to_owned();
    content.mode = metadata.mode() & 0o7777;
    content.uid = metadata.uid();
    content.gid = metadata.gid();
    content.content = read_at_most(&file, most)?;
    Ok(content)
}

fn read_at_most(file: &File, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        let text = format!("it has grown: the container's files are more than {FILES_MAX} bytes");
        return Err(io::Error::other(text));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn listed(name: &str, source: &Path) -> HostFile {
        HostFile {
            name: name.to_owned(),
            source: source.to_owned(),
        }
    }

    #[test]
    fn files_are_read_with_mode_and_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        fs::write(&path, "127.0.0.1 localhost\n").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let owner = fs::metadata(&path).unwrap();
        let [file] = &read(&[listed("file-0", &path)]).unwrap()[..] else {
            panic!("one file")
        };
        assert_eq!(file.name, "file-0");
        assert_eq!(file.content, b"127.0.0.1 localhost\n");
        assert_eq!(file.mode, 0o640);
        assert_eq!((file.uid, file.gid), (owner.uid(), owner.gid()));
    }

    #[test]
    fn what_is_no_file_or_too_much_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let error = read(&[listed("file-0", directory.path())]).unwrap_err();
        assert!(
            error
                .to_string()
                .contains(&*directory.path().to_string_lossy()),
            "{error}"
        );

        let large = directory.path().join("large");
        fs::write(&large, vec![b'x'; 2 << 20]).unwrap();
        assert_eq!(read(&[listed("file-0", &large)]).unwrap().len(), 1);
        let twice = [listed("file-0", &large), listed("file-1", &large)];
        let Error::HostFile { path, source } = read(&twice).unwrap_err() else {
            panic!("another error")
        };
        assert_eq!(path, large);
        assert!(source.to_string().contains("3145728"), "{source}");
    }
}
