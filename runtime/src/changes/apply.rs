//! The second step: what was received goes to its place in the snapshot's directory.

use std::fs::File;
use std::io::{self, BufReader};
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, mkdirat, renameat};
use supermachine_protocol::changes::{self, Attributes, Decoder, Record};

use super::{Job, tree};

/// Why some of the changes are missing.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("Cannot read the journal of the changes")]
    Journal(#[source] changes::Error),
    #[error("Cannot change {path:?}")]
    Entry { path: String, source: io::Error },
}

/// A directory that is being changed.
struct Level {
    name: Vec<u8>,
    directory: OwnedFd,
    /// Its time of modification is set last.
    attributes: Attributes,
}

struct Apply<'a> {
    staging: &'a OwnedFd,
    overlay: bool,
    /// Number of the next inode.
    next: u64,
    levels: Vec<Level>,
}

/// Does what the journal says to the directory `target`.
pub(super) fn apply(
    journal: File,
    staging: &OwnedFd,
    target: OwnedFd,
    job: &Job,
) -> Result<(), Error> {
    let mut decoder = Decoder::new(BufReader::new(journal), job.limits());
    let mut target = Some(target);
    let mut apply = Apply {
        staging,
        overlay: job.overlay,
        next: 0,
        levels: Vec::new(),
    };
    while let Some(record) = decoder.next_record().map_err(Error::Journal)? {
        let name = match &record {
            Record::Directory { name, .. }
            | Record::File { name, .. }
            | Record::Whiteout { name, .. } => name.clone(),
            _ => Vec::new(),
        };
        let applied = match (record, target.take()) {
            (
                Record::Root {
                    attributes,
                    changed,
                },
                Some(root),
            ) => apply.root(root, attributes, changed),
            (record, _) => apply.record(record),
        };
        applied.map_err(|source| Error::Entry {
            path: apply.path(&name),
            source,
        })?;
    }
    Ok(())
}

impl Apply<'_> {
    /// Where in the snapshot `name` is.
    fn path(&self, name: &[u8]) -> String {
        let mut path = String::new();
        for name in self
            .levels
            .iter()
            .skip(1)
            .map(|level| level.name.as_slice())
            .chain([name])
        {
            path.push('/');
            path.push_str(&String::from_utf8_lossy(name));
        }
        path
    }

    fn root(&mut self, root: OwnedFd, attributes: Attributes, changed: bool) -> io::Result<()> {
        if changed {
            tree::set_attributes(&root, &attributes)?;
        }
        self.levels.push(Level {
            name: Vec::new(),
            directory: root,
            attributes,
        });
        Ok(())
    }

    fn record(&mut self, record: Record) -> io::Result<()> {
        match record {
            Record::Up | Record::End { .. } => match self.levels.pop() {
                Some(level) => tree::set_times(level.directory, &level.attributes),
                None => Ok(()),
            },
            Record::Directory {
                name,
                attributes,
                opaque,
                below,
            } => self.enter(name, attributes, opaque, below),
            Record::File { name, .. } => self.place(&name),
            Record::Whiteout { name, below } => self.hide(&name, below),
            // A journal has nothing else.
            other => Err(io::Error::other(format!("unexpected {other:?}"))),
        }
    }

    fn here(&self) -> io::Result<&OwnedFd> {
        let last = self.levels.last().map(|level| &level.directory);
        last.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// The next inode gets its name, in place of whatever had it.
    fn place(&mut self, name: &[u8]) -> io::Result<()> {
        let here = self.here()?;
        if tree::look(here, name)?.is_some_and(|stat| tree::is_directory(&stat)) {
            tree::remove(here, name)?;
        }
        renameat(self.staging, self.next.to_string(), here, name)?;
        self.next += 1;
        Ok(())
    }

    /// The name is gone, and stays so if a layer below has it.
    fn hide(&self, name: &[u8], below: bool) -> io::Result<()> {
        let here = self.here()?;
        let found = tree::look(here, name)?;
        if below && found.is_some_and(|stat| tree::is_whiteout(&stat)) {
            return Ok(());
        }
        tree::remove(here, name)?;
        if below {
            tree::make_whiteout(here, name)?;
        }
        Ok(())
    }

    /// Enters a directory, which is made where there is none. One that replaces something else hides
    /// what that hid, as does one that the guest calls opaque.
    fn enter(
        &mut self,
        name: Vec<u8>,
        attributes: Attributes,
        opaque: bool,
        below: bool,
    ) -> io::Result<()> {
        let here = self.here()?;
        let found = tree::look(here, &name)?;
        let merges = !opaque && found.is_some_and(|stat| tree::is_directory(&stat));
        if found.is_some() && !merges {
            tree::remove(here, &name)?;
        }
        if !merges {
            mkdirat(here, name.as_slice(), Mode::RWXU)?;
        }
        let directory = tree::open_directory(here, &name)?;
        tree::set_attributes(&directory, &attributes)?;
        if self.overlay && !merges {
            tree::set_opaque(&directory, below && (opaque || found.is_some()))?;
        }
        self.levels.push(Level {
            name,
            directory,
            attributes,
        });
        Ok(())
    }
}
