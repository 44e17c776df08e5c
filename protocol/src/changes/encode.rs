//! The agent's side.

use std::io::{self, Write};

use super::wire::{node, tag};
use super::{Attributes, MAGIC, NodeKind, REASON_MAX, Record, VERSION};

/// Writes a stream. It counts, and checks only that lengths fit: what to write is its user's affair.
#[derive(Debug)]
pub struct Encoder<W> {
    to: W,
    entries: u64,
    bytes: u64,
    shared: u64,
    /// A record while it is put together.
    buffer: Vec<u8>,
}

impl<W: Write> Encoder<W> {
    /// Begins a stream for a root directory with these attributes, which the container has `changed`
    /// or not.
    ///
    /// # Errors
    /// It can't be written.
    pub fn new(to: W, root: &Attributes, changed: bool) -> io::Result<Self> {
        let mut encoder = Self {
            to,
            entries: 0,
            bytes: 0,
            shared: 0,
            buffer: Vec::new(),
        };
        encoder.to.write_all(&MAGIC)?;
        encoder.to.write_all(&VERSION.to_le_bytes())?;
        encoder.buffer.extend([tag::ROOT, u8::from(changed)]);
        encoder.attributes(root)?;
        encoder.flush_record()?;
        Ok(encoder)
    }

    /// Writes one record; not `Root`, which [`new`](Self::new) wrote, nor `Data`
    /// ([`data`](Self::data)), nor `End` ([`finish`](Self::finish)).
    ///
    /// # Errors
    /// It can't be written, or a length in it doesn't fit the format.
    pub fn record(&mut self, record: &Record) -> io::Result<()> {
        match record {
            Record::Directory {
                name,
                attributes,
                opaque,
                below,
            } => {
                self.begin(tag::DIRECTORY, name)?;
                self.buffer.extend([u8::from(*opaque), u8::from(*below)]);
                self.attributes(attributes)?;
            }
            Record::Up => self.buffer.push(tag::UP),
            Record::File {
                name,
                attributes,
                shared,
                size,
            } => {
                self.begin(tag::FILE, name)?;
                self.share(*shared);
                self.attributes(attributes)?;
                self.buffer.extend(size.to_le_bytes());
            }
            Record::Symlink {
                name,
                attributes,
                shared,
                target,
            } => {
                self.begin(tag::SYMLINK, name)?;
                self.share(*shared);
                self.attributes(attributes)?;
                self.buffer.extend(short(target.len())?);
                self.buffer.extend_from_slice(target);
            }
            Record::Node {
                name,
                attributes,
                shared,
                kind,
            } => {
                self.begin(tag::NODE, name)?;
                self.share(*shared);
                self.attributes(attributes)?;
                self.node(*kind);
            }
            Record::Link { name, inode } => {
                self.begin(tag::LINK, name)?;
                self.buffer.extend(inode.to_le_bytes());
            }
            Record::Whiteout { name, below } => {
                self.begin(tag::WHITEOUT, name)?;
                self.buffer.push(u8::from(*below));
            }
            Record::Failed { reason } => {
                let reason = reason.get(..REASON_MAX).unwrap_or(reason);
                self.buffer.push(tag::FAILED);
                self.buffer.extend(short(reason.len())?);
                self.buffer.extend_from_slice(reason);
            }
            Record::Root { .. } | Record::Data { .. } | Record::End { .. } => {
                return Err(invalid("a record that has a method of its own"));
            }
        }
        self.flush_record()
    }

    /// Which number links to the inode written last will have, if it was marked as shared.
    pub fn last_shared(&self) -> Option<u64> {
        self.shared.checked_sub(1)
    }

    /// Writes content of the file written last; at most [`DATA_MAX`](super::DATA_MAX) bytes.
    ///
    /// # Errors
    /// It can't be written.
    pub fn data(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let length = u32::try_from(data.len()).map_err(|_| invalid("too much data"))?;
        self.bytes = self.bytes.saturating_add(u64::from(length));
        self.buffer.push(tag::DATA);
        self.buffer.extend(offset.to_le_bytes());
        self.buffer.extend(length.to_le_bytes());
        self.flush_record()?;
        self.to.write_all(data)
    }

    /// Says that the stream is whole; its counts.
    ///
    /// # Errors
    /// It can't be written.
    pub fn finish(mut self) -> io::Result<(u64, u64)> {
        self.buffer.push(tag::END);
        self.buffer.extend(self.entries.to_le_bytes());
        self.buffer.extend(self.bytes.to_le_bytes());
        self.flush_record()?;
        self.to.flush()?;
        Ok((self.entries, self.bytes))
    }

    /// Says why it can't be.
    ///
    /// # Errors
    /// It can't be written.
    pub fn fail(mut self, reason: &str) -> io::Result<()> {
        // A record left half done is none.
        self.buffer.clear();
        self.record(&Record::Failed {
            reason: reason.as_bytes().to_vec(),
        })?;
        self.to.flush()
    }

    fn begin(&mut self, tag: u8, name: &[u8]) -> io::Result<()> {
        self.buffer.clear();
        self.entries = self.entries.saturating_add(1);
        self.buffer.push(tag);
        self.name(name)
    }

    fn name(&mut self, name: &[u8]) -> io::Result<()> {
        let length = u8::try_from(name.len()).map_err(|_| invalid("a name is too long"))?;
        self.buffer.push(length);
        self.buffer.extend_from_slice(name);
        Ok(())
    }

    fn share(&mut self, shared: bool) {
        self.shared = self.shared.saturating_add(u64::from(shared));
        self.buffer.push(u8::from(shared));
    }

    fn attributes(&mut self, attributes: &Attributes) -> io::Result<()> {
        self.buffer.extend(attributes.mode.to_le_bytes());
        self.buffer.extend(attributes.uid.to_le_bytes());
        self.buffer.extend(attributes.gid.to_le_bytes());
        self.buffer.extend(attributes.mtime.to_le_bytes());
        self.buffer.extend(attributes.mtime_ns.to_le_bytes());
        self.buffer.extend(short(attributes.xattrs.len())?);
        for (name, value) in &attributes.xattrs {
            self.name(name)?;
            let length = u32::try_from(value.len()).map_err(|_| invalid("a value is too long"))?;
            self.buffer.extend(length.to_le_bytes());
            self.buffer.extend_from_slice(value);
        }
        Ok(())
    }

    fn node(&mut self, kind: NodeKind) {
        let (kind, numbers) = match kind {
            NodeKind::Character { major, minor } => (node::CHARACTER, Some((major, minor))),
            NodeKind::Block { major, minor } => (node::BLOCK, Some((major, minor))),
            NodeKind::Fifo => (node::FIFO, None),
            NodeKind::Socket => (node::SOCKET, None),
        };
        self.buffer.push(kind);
        if let Some((major, minor)) = numbers {
            self.buffer.extend(major.to_le_bytes());
            self.buffer.extend(minor.to_le_bytes());
        }
    }

    fn flush_record(&mut self) -> io::Result<()> {
        self.to.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

fn short(length: usize) -> io::Result<[u8; 2]> {
    u16::try_from(length)
        .map(u16::to_le_bytes)
        .map_err(|_| invalid("a list or text is too long"))
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}
