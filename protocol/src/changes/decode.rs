//! The host's side: every field of what the guest says is checked here, once.

use std::io::{self, Read};

use super::wire::{MODE_MAX, NANOSECONDS, node, tag};
use super::{
    Attributes, DATA_MAX, DEPTH_MAX, Limits, MAGIC, NodeKind, REASON_MAX, Record, TARGET_MAX,
    VERSION, XATTR_BYTES_MAX, XATTRS_MAX, is_carried,
};

/// Why a stream is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection broke, or ended before the stream did.
    #[error("The changes end before they are complete")]
    Cut(#[source] io::Error),
    /// What comes is no stream.
    #[error("The changes begin with {found:02x?}, expected {MAGIC:02x?}")]
    Magic {
        /// Its first bytes.
        found: [u8; 8],
    },
    /// It is one of another version.
    #[error("The changes have format version {found}, expected {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// A field has a value it can't have.
    #[error("{what} is {found}; expected {expected}")]
    Field {
        /// Which field.
        what: &'static str,
        /// Its value.
        found: String,
        /// What it can be.
        expected: &'static str,
    },
    /// A record came where it can't.
    #[error("A record of type {tag} came {place}")]
    Order {
        /// Which record.
        tag: u8,
        /// Where.
        place: &'static str,
    },
    /// More than allowed.
    #[error("The changes exceed their limit of {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How many are allowed.
        limit: u64,
    },
}

/// Reads a stream, one checked record at a time, holding no more than that.
#[derive(Debug)]
pub struct Decoder<R> {
    from: R,
    limits: Limits,
    stage: Stage,
    /// The last name in each directory that is open, the root's first.
    names: Vec<Vec<u8>>,
    entries: u64,
    /// Of data alone, as `End` counts them.
    data_bytes: u64,
    /// Of everything the limit is for.
    bytes: u64,
    shared: u64,
    /// Of the file that data may follow: where the next may begin, and its size.
    file: Option<(u64, u64)>,
    data: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Header,
    Root,
    Records,
    Over,
}

impl<R: Read> Decoder<R> {
    /// A decoder of what comes from `from`, which should be buffered.
    pub fn new(from: R, limits: Limits) -> Self {
        Self {
            from,
            limits,
            stage: Stage::Header,
            names: vec![Vec::new()],
            entries: 0,
            data_bytes: 0,
            bytes: 0,
            shared: 0,
            file: None,
            data: Vec::new(),
        }
    }

    /// The bytes of the [`Record::Data`] read last.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The next record; after `End` or `Failed`, or an error, `None`.
    ///
    /// # Errors
    /// The stream is cut, malformed or exceeds the limits.
    pub fn next_record(&mut self) -> Result<Option<Record>, Error> {
        let record = match self.stage {
            Stage::Over => return Ok(None),
            Stage::Header => self.header().and_then(|()| self.record()),
            Stage::Root | Stage::Records => self.record(),
        };
        match &record {
            Ok(Record::End { .. } | Record::Failed { .. }) | Err(_) => self.stage = Stage::Over,
            Ok(_) => self.stage = Stage::Records,
        }
        record.map(Some)
    }

    fn header(&mut self) -> Result<(), Error> {
        let found = self.array()?;
        if found != MAGIC {
            return Err(Error::Magic { found });
        }
        let found = self.u32()?;
        if found != VERSION {
            return Err(Error::Version { found });
        }
        self.stage = Stage::Root;
        Ok(())
    }

    fn record(&mut self) -> Result<Record, Error> {
        let tag = self.u8()?;
        let misplaced = |place| Err(Error::Order { tag, place });
        match (self.stage, tag) {
            (Stage::Root, tag::ROOT | tag::FAILED) => {}
            (Stage::Root, _) => return misplaced("before the root directory"),
            (_, tag::ROOT) => return misplaced("a second time"),
            _ => {}
        }
        let file = self.file.take();
        match tag {
            tag::ROOT => Ok(Record::Root {
                changed: self.flag("The changed flag of the root directory")?,
                attributes: self.attributes()?,
            }),
            tag::DIRECTORY => self.directory(),
            tag::UP if self.depth() == 0 => misplaced("in the root directory"),
            tag::UP => {
                self.names.pop();
                Ok(Record::Up)
            }
            tag::FILE => {
                let (name, shared) = (self.entry()?, self.shared()?);
                let (attributes, size) = (self.attributes()?, self.u64()?);
                if i64::try_from(size).is_err() {
                    return Err(field("The size of a file", size, "less than 2^63"));
                }
                self.file = Some((0, size));
                Ok(Record::File {
                    name,
                    attributes,
                    shared,
                    size,
                })
            }
            tag::DATA => match file {
                Some(file) => self.file_data(file),
                None => misplaced("without a file before it"),
            },
            tag::SYMLINK => {
                let (name, shared) = (self.entry()?, self.shared()?);
                let attributes = self.attributes()?;
                let length = usize::from(self.u16()?);
                if !(1..=TARGET_MAX).contains(&length) {
                    return Err(field("The length of a link's target", length, "1 to 4095"));
                }
                self.count(length)?;
                let target = self.vec(length)?;
                if target.contains(&0) {
                    return Err(field("A link's target", text(&target), "one without NUL"));
                }
                Ok(Record::Symlink {
                    name,
                    attributes,
                    shared,
                    target,
                })
            }
            tag::NODE => {
                let (name, shared) = (self.entry()?, self.shared()?);
                Ok(Record::Node {
                    name,
                    attributes: self.attributes()?,
                    shared,
                    kind: self.node()?,
                })
            }
            tag::LINK => {
                let (name, inode) = (self.entry()?, self.u64()?);
                if inode >= self.shared {
                    let expected = "the number of an inode that was marked as shared";
                    return Err(field("The inode of a hard link", inode, expected));
                }
                Ok(Record::Link { name, inode })
            }
            tag::WHITEOUT => Ok(Record::Whiteout {
                name: self.entry()?,
                below: self.flag("The below flag of a whiteout")?,
            }),
            tag::END if self.depth() > 0 => misplaced("below the root directory"),
            tag::END => self.end(),
            tag::FAILED => {
                let length = usize::from(self.u16()?);
                if length > REASON_MAX {
                    return Err(field("The length of a reason", length, "at most 1024"));
                }
                let reason = self.vec(length)?;
                Ok(Record::Failed { reason })
            }
            other => Err(field("The type of a record", other, "0 to 10")),
        }
    }

    fn depth(&self) -> usize {
        self.names.len().saturating_sub(1)
    }

    fn directory(&mut self) -> Result<Record, Error> {
        let most = self.limits.depth.min(DEPTH_MAX);
        if self.depth() >= usize::try_from(most).unwrap_or(usize::MAX) {
            return Err(Error::Limit {
                what: "directories within one another",
                limit: u64::from(most),
            });
        }
        let name = self.entry()?;
        let opaque = self.flag("The opaque flag of a directory")?;
        let below = self.flag("The below flag of a directory")?;
        self.names.push(Vec::new());
        Ok(Record::Directory {
            name,
            opaque,
            below,
            attributes: self.attributes()?,
        })
    }

    fn file_data(&mut self, (next, size): (u64, u64)) -> Result<Record, Error> {
        let (offset, length) = (self.u64()?, self.u32()?);
        let bytes = match usize::try_from(length) {
            Ok(bytes @ 1..=DATA_MAX) => bytes,
            _ => return Err(field("The length of data", length, "1 to 65536")),
        };
        if offset < next {
            return Err(field("The offset of data", offset, "one after the last"));
        }
        match offset.checked_add(u64::from(length)) {
            Some(end) if end <= size => self.file = Some((end, size)),
            _ => return Err(field("The offset of data", offset, "one within the file")),
        }
        self.count(bytes)?;
        self.data_bytes = self.data_bytes.saturating_add(u64::from(length));
        self.data.resize(bytes, 0);
        self.from.read_exact(&mut self.data).map_err(Error::Cut)?;
        Ok(Record::Data { offset, length })
    }

    fn node(&mut self) -> Result<NodeKind, Error> {
        let kind = self.u8()?;
        match kind {
            node::FIFO => return Ok(NodeKind::Fifo),
            node::SOCKET => return Ok(NodeKind::Socket),
            node::CHARACTER | node::BLOCK => {}
            other => return Err(field("The kind of a node", other, "1 to 4")),
        }
        // The kernel's dev_t: 12 bits of major, 20 of minor.
        let (major, minor) = (self.u32()?, self.u32()?);
        if major >= 1 << 12 || minor >= 1 << 20 {
            let found = format!("{major}:{minor}");
            return Err(field("A device", found, "at most 4095:1048575"));
        }
        match (kind, major, minor) {
            (node::CHARACTER, 0, 0) => Err(field("A device", "c 0:0", "one that is no whiteout")),
            (node::CHARACTER, ..) => Ok(NodeKind::Character { major, minor }),
            _ => Ok(NodeKind::Block { major, minor }),
        }
    }

    fn end(&mut self) -> Result<Record, Error> {
        let (entries, bytes) = (self.u64()?, self.u64()?);
        if (entries, bytes) != (self.entries, self.data_bytes) {
            let found = format!("{entries} entries, {bytes} bytes");
            return Err(field("The count at the end", found, "what came before it"));
        }
        Ok(Record::End { entries, bytes })
    }

    /// The name of one entry more.
    fn entry(&mut self) -> Result<Vec<u8>, Error> {
        self.entries = self.entries.saturating_add(1);
        if self.entries > self.limits.entries {
            return Err(Error::Limit {
                what: "entries",
                limit: self.limits.entries,
            });
        }
        let length = usize::from(self.u8()?);
        let name = self.vec(length)?;
        match name.as_slice() {
            b"" | b"." | b".." => {}
            name if name.contains(&b'/') || name.contains(&0) => {}
            _ => return self.ascending(name),
        }
        let expected = "one name, without \"/\" and NUL, and not \".\" or \"..\"";
        Err(field("The name of an entry", text(&name), expected))
    }

    /// The name, if it is above the last one in its directory.
    fn ascending(&mut self, name: Vec<u8>) -> Result<Vec<u8>, Error> {
        if let Some(last) = self.names.last_mut() {
            if *last >= name {
                let expected = "one above the last in its directory";
                return Err(field("The name of an entry", text(&name), expected));
            }
            last.clone_from(&name);
        }
        Ok(name)
    }

    fn shared(&mut self) -> Result<bool, Error> {
        let shared = self.flag("The shared flag of an inode")?;
        self.shared = self.shared.saturating_add(u64::from(shared));
        Ok(shared)
    }

    fn flag(&mut self, what: &'static str) -> Result<bool, Error> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(field(what, other, "0 or 1")),
        }
    }

    fn attributes(&mut self) -> Result<Attributes, Error> {
        let mode = self.u16()?;
        if mode > MODE_MAX {
            return Err(field("A mode", format!("{mode:#o}"), "at most 0o7777"));
        }
        let (uid, gid) = (self.u32()?, self.u32()?);
        for id in [uid, gid] {
            if id == u32::MAX {
                return Err(field("An owner", id, "below 4294967295"));
            }
        }
        let (mtime, mtime_ns) = (self.i64()?, self.u32()?);
        if mtime_ns >= NANOSECONDS {
            return Err(field("Nanoseconds", mtime_ns, "below 1000000000"));
        }
        let count = usize::from(self.u16()?);
        if count > XATTRS_MAX {
            let what = "The number of extended attributes";
            return Err(field(what, count, "at most 256"));
        }
        let mut xattrs = Vec::with_capacity(count);
        let mut total = 0_usize;
        for _ in 0..count {
            let length = usize::from(self.u8()?);
            let name = self.vec(length)?;
            if name.contains(&0) || !is_carried(&name) {
                let what = "The name of an extended attribute";
                let expected = "user.*, trusted.* but overlayfs's, a capability or an ACL";
                return Err(field(what, text(&name), expected));
            }
            let length = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
            total = total.saturating_add(name.len()).saturating_add(length);
            if total > XATTR_BYTES_MAX {
                let what = "The size of an inode's extended attributes";
                return Err(field(what, total, "at most 65536 bytes"));
            }
            xattrs.push((name, self.vec(length)?));
        }
        self.count(total)?;
        Ok(Attributes {
            mode,
            uid,
            gid,
            mtime,
            mtime_ns,
            xattrs,
        })
    }

    fn count(&mut self, bytes: usize) -> Result<(), Error> {
        self.bytes = self
            .bytes
            .saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
        if self.bytes > self.limits.bytes {
            return Err(Error::Limit {
                what: "bytes",
                limit: self.limits.bytes,
            });
        }
        Ok(())
    }

    /// Reads `length` bytes, which its caller has bounded.
    fn vec(&mut self, length: usize) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; length];
        self.from.read_exact(&mut bytes).map_err(Error::Cut)?;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.from.read_exact(&mut bytes).map_err(Error::Cut)?;
        Ok(bytes)
    }

    fn u8(&mut self) -> Result<u8, Error> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Result<u16, Error> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Error> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Error> {
        self.array().map(u64::from_le_bytes)
    }

    fn i64(&mut self) -> Result<i64, Error> {
        self.array().map(i64::from_le_bytes)
    }
}

fn field(what: &'static str, found: impl ToString, expected: &'static str) -> Error {
    Error::Field {
        what,
        found: found.to_string(),
        expected,
    }
}

/// A guest's bytes, fit for an error message.
fn text(bytes: &[u8]) -> String {
    format!("\"{}\"", bytes.escape_ascii())
}
