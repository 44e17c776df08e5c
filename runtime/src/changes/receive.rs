//! The first step: a guest's stream, checked, becomes inodes in a directory nobody looks into, and
//! a journal of where they belong.
//!
//! An inode's name there is its number, so nothing the guest says is a name yet. The journal is a
//! stream again, in which every name of an inode is a [`Record::File`] without content: the next of
//! the numbers.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Uid, XattrFlags, chmodat, chownat, linkat, lsetxattr,
    makedev, mknodat, openat, symlinkat, unlinkat, utimensat,
};
use supermachine_protocol::changes::{
    self, Attributes, Decoder, Encoder, Limits, NodeKind, Record,
};

use super::{Job, tree};

/// Directories within one another. Each holds a descriptor while it is written to.
const DEPTH: u32 = 1000;

impl Job {
    pub(super) fn limits(&self) -> Limits {
        Limits {
            entries: self.entries,
            bytes: self.bytes,
            depth: DEPTH,
        }
    }
}

/// Why the changes are refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("The guest's stream is refused")]
    Stream(#[source] changes::Error),
    #[error("The guest could not go on: {reason}")]
    Failed { reason: String },
    #[error(
        "The guest says that something is below {name:?}; the snapshot is a directory, and nothing is"
    )]
    NoOverlay { name: String },
    #[error("Cannot make inode {number} of the changes")]
    Inode { number: u64, source: io::Error },
    #[error("Cannot keep a journal of the changes")]
    Journal(#[source] io::Error),
}

/// What was received.
#[derive(Debug)]
pub(super) struct Received {
    /// To be read from its start.
    pub(super) journal: File,
    pub(super) entries: u64,
    pub(super) bytes: u64,
}

/// Receives a stream into `staging`, which is empty and the working directory.
pub(super) fn receive(stream: impl Read, staging: &OwnedFd, job: &Job) -> Result<Received, Error> {
    let timely = Timely {
        stream,
        until: Instant::now() + job.time,
        job,
    };
    let mut decoder = Decoder::new(BufReader::with_capacity(1 << 17, timely), job.limits());
    let file = journal(staging).map_err(Error::Journal)?;
    let root = decoder.next_record().map_err(Error::Stream)?;
    let (attributes, changed) = match root {
        Some(Record::Root {
            attributes,
            changed,
        }) => (attributes, changed),
        other => return Err(not_expected(other)),
    };
    let to = BufWriter::new(file.try_clone().map_err(Error::Journal)?);
    let journal = Encoder::new(to, &attributes, changed).map_err(Error::Journal)?;
    let mut stage = Stage {
        staging,
        overlay: job.overlay,
        journal,
        next: 0,
        shared: Vec::new(),
        file: None,
    };
    loop {
        let record = decoder.next_record().map_err(Error::Stream)?;
        match record {
            Some(Record::End { entries, bytes }) => {
                stage.finish_file()?;
                stage.journal.finish().map_err(Error::Journal)?;
                let mut journal = file;
                journal.rewind().map_err(Error::Journal)?;
                return Ok(Received {
                    journal,
                    entries,
                    bytes,
                });
            }
            Some(Record::Data { offset, .. }) => stage.data(offset, decoder.data())?,
            Some(Record::Failed { .. }) | None => return Err(not_expected(record)),
            Some(record) => stage.record(record)?,
        }
    }
}

/// A decoder lets nothing through that isn't expected but the guest's own failure.
fn not_expected(record: Option<Record>) -> Error {
    let reason = match record {
        Some(Record::Failed { reason }) => String::from_utf8_lossy(&reason).into_owned(),
        other => format!("it sent {other:?}"),
    };
    Error::Failed { reason }
}

/// A file without a name.
fn journal(staging: &OwnedFd) -> io::Result<File> {
    const NAME: &str = "journal";
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = openat(staging, NAME, flags, Mode::RUSR | Mode::WUSR)?;
    unlinkat(staging, NAME, AtFlags::empty())?;
    Ok(file.into())
}

struct Stage<'a> {
    staging: &'a OwnedFd,
    overlay: bool,
    journal: Encoder<BufWriter<File>>,
    /// Number of the next inode.
    next: u64,
    /// Numbers of the inodes that may have further names.
    shared: Vec<u64>,
    /// The regular file that data may still come for.
    file: Option<(u64, File, Attributes)>,
}

impl Stage<'_> {
    fn record(&mut self, record: Record) -> Result<(), Error> {
        self.finish_file()?;
        match record {
            Record::Directory {
                name, below: true, ..
            }
            | Record::Whiteout { name, below: true }
                if !self.overlay =>
            {
                let name = String::from_utf8_lossy(&name).into_owned();
                Err(Error::NoOverlay { name })
            }
            Record::Directory { .. } | Record::Up | Record::Whiteout { .. } => {
                self.journal.record(&record).map_err(Error::Journal)
            }
            Record::File {
                name,
                attributes,
                shared,
                size,
            } => {
                let number = self.begin(name, shared)?;
                let file = self.regular(number, size).map_err(inode(number))?;
                self.file = Some((number, file, attributes));
                Ok(())
            }
            Record::Symlink {
                name,
                attributes,
                shared,
                target,
            } => {
                let number = self.begin(name, shared)?;
                let made = symlinkat(target, self.staging, number.to_string());
                made.map_err(io::Error::from)
                    .and_then(|()| self.set_by_name(number, &attributes, false))
                    .map_err(inode(number))
            }
            Record::Node {
                name,
                attributes,
                shared,
                kind,
            } => {
                let number = self.begin(name, shared)?;
                self.node(number, kind)
                    .and_then(|()| self.set_by_name(number, &attributes, true))
                    .map_err(inode(number))
            }
            Record::Link { name, inode: link } => {
                let number = self.begin(name, false)?;
                let known = usize::try_from(link)
                    .ok()
                    .and_then(|at| self.shared.get(at));
                // The decoder knows how many there are.
                let known = known.ok_or_else(|| Error::Inode {
                    number,
                    source: io::ErrorKind::NotFound.into(),
                })?;
                let (from, to) = (known.to_string(), number.to_string());
                linkat(self.staging, from, self.staging, to, AtFlags::empty())
                    .map_err(|error| inode(number)(error.into()))
            }
            other @ (Record::Root { .. }
            | Record::Data { .. }
            | Record::End { .. }
            | Record::Failed { .. }) => Err(not_expected(Some(other))),
        }
    }

    /// Notes that the next inode belongs under `name`; its number.
    fn begin(&mut self, name: Vec<u8>, shared: bool) -> Result<u64, Error> {
        let placed = Record::File {
            name,
            attributes: Attributes::default(),
            shared: false,
            size: 0,
        };
        self.journal.record(&placed).map_err(Error::Journal)?;
        let number = self.next;
        self.next += 1;
        if shared {
            self.shared.push(number);
        }
        Ok(number)
    }

    fn regular(&self, number: u64, size: u64) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let name = number.to_string();
        let file = File::from(openat(self.staging, name, flags, Mode::RUSR | Mode::WUSR)?);
        file.set_len(size)?;
        Ok(file)
    }

    fn data(&mut self, offset: u64, data: &[u8]) -> Result<(), Error> {
        match &self.file {
            Some((number, file, _)) => file.write_all_at(data, offset).map_err(inode(*number)),
            // The decoder has seen a file before.
            None => Ok(()),
        }
    }

    /// Gives the last file what its content would have taken away again.
    fn finish_file(&mut self) -> Result<(), Error> {
        let Some((number, file, attributes)) = self.file.take() else {
            return Ok(());
        };
        tree::set_attributes(&file, &attributes)
            .and_then(|()| tree::set_times(&file, &attributes))
            .map_err(inode(number))
    }

    fn node(&self, number: u64, kind: NodeKind) -> io::Result<()> {
        let (kind, device) = match kind {
            NodeKind::Character { major, minor } => {
                (FileType::CharacterDevice, makedev(major, minor))
            }
            NodeKind::Block { major, minor } => (FileType::BlockDevice, makedev(major, minor)),
            NodeKind::Fifo => (FileType::Fifo, 0),
            NodeKind::Socket => (FileType::Socket, 0),
        };
        let name = number.to_string();
        Ok(mknodat(self.staging, name, kind, Mode::empty(), device)?)
    }

    /// Gives a link or node, which isn't to be opened, its attributes; a link's mode means nothing.
    fn set_by_name(&self, number: u64, attributes: &Attributes, mode: bool) -> io::Result<()> {
        let name = number.to_string();
        let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
        let itself = AtFlags::SYMLINK_NOFOLLOW;
        chownat(self.staging, &name, Some(uid), Some(gid), itself)?;
        if mode {
            chmodat(
                self.staging,
                &name,
                tree::mode(attributes),
                AtFlags::empty(),
            )?;
        }
        for (xattr, value) in &attributes.xattrs {
            // By a path, as there is no descriptor: the staging directory is the working directory.
            lsetxattr(&name, xattr.as_slice(), value, XattrFlags::empty())?;
        }
        utimensat(self.staging, &name, &tree::times(attributes), itself)?;
        Ok(())
    }
}

fn inode(number: u64) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Inode { number, source }
}

/// A stream that ends when its time is over.
struct Timely<'a, R> {
    stream: R,
    until: Instant,
    job: &'a Job,
}

impl<R: Read> Read for Timely<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let late = |text| Err(io::Error::new(io::ErrorKind::TimedOut, text));
        if Instant::now() >= self.until {
            return late(format!("The guest took more than {:?}", self.job.time));
        }
        match self.stream.read(buffer) {
            // The socket's own limit.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                late(format!("The guest said nothing for {:?}", self.job.silence))
            }
            other => other,
        }
    }
}
