//! What a container wrote, as a stream from the guest to the host.
//!
//! The host connects to vsock port [`CHANGES_VSOCK_PORT`](crate::CHANGES_VSOCK_PORT) and names a container
//! ([`ask`]); the agent answers with the upper directory of its overlay, as one header and records
//! ([`Encoder`], [`Decoder`]). The stream is a walk of the tree: [`Record::Directory`] enters a
//! directory and [`Record::Up`] leaves it, so that a name is never a path, and nothing in the
//! stream can point out of the tree. Names in a directory ascend, so that none comes twice.
//!
//! ```text
//! ask     := length u8, container id
//! stream  := "SMCHANGE", version u32, Root, record*, (End | Failed)
//! record  := tag u8, fields; integers are little-endian
//! ```
//!
//! The decoder is given to bytes a hostile guest wrote: it checks each field, the order of records
//! and the [`Limits`], and holds no more than one record.

mod decode;
mod encode;
mod wire;

use std::io::{self, Read, Write};

pub use decode::{Decoder, Error};
pub use encode::Encoder;

/// First bytes of a stream.
pub const MAGIC: [u8; 8] = *b"SMCHANGE";
/// Version of the format; a stream of any other is refused.
pub const VERSION: u32 = 1;
/// Longest name in a directory, in bytes (NAME_MAX).
pub const NAME_MAX: usize = 255;
/// Longest target of a symbolic link, in bytes (PATH_MAX without its NUL).
pub const TARGET_MAX: usize = 4095;
/// Most data in one record.
pub const DATA_MAX: usize = 64 << 10;
/// Most extended attributes of one inode, and what their names and values may come to.
pub const XATTRS_MAX: usize = 256;
/// Bytes of all extended attributes of an inode (XATTR_SIZE_MAX is for one).
pub const XATTR_BYTES_MAX: usize = 64 << 10;
/// Longest reason in a [`Record::Failed`].
pub const REASON_MAX: usize = 1024;
/// Deepest directory: a path below it could not be named, not even with names of one byte.
pub const DEPTH_MAX: u32 = 2048;

/// One thing the container changed, or a step of the walk. Names are one component: never empty,
/// ".", "..", and without "/" and NUL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The root directory; comes first and once.
    Root {
        /// Its attributes.
        attributes: Attributes,
        /// The container changed mode, owner or extended attributes.
        changed: bool,
    },
    /// Enters a directory.
    Directory {
        /// Its name.
        name: Vec<u8>,
        /// Its attributes.
        attributes: Attributes,
        /// What lies below it in lower layers is hidden.
        opaque: bool,
        /// A layer below the snapshot's own has a directory of this name, which shows through unless
        /// something hides it.
        below: bool,
    },
    /// Leaves the directory entered last.
    Up,
    /// A regular file, all holes until [`Record::Data`] fills them.
    File {
        /// Its name.
        name: Vec<u8>,
        /// Its attributes.
        attributes: Attributes,
        /// Links to it will follow.
        shared: bool,
        /// Its length in bytes.
        size: u64,
    },
    /// Content of the file before it; offsets only grow. The bytes are [`Decoder::data`].
    Data {
        /// Where in the file.
        offset: u64,
        /// How many bytes, at least 1.
        length: u32,
    },
    /// A symbolic link.
    Symlink {
        /// Its name.
        name: Vec<u8>,
        /// Its attributes.
        attributes: Attributes,
        /// Links to it will follow.
        shared: bool,
        /// Where it points; any bytes but NUL.
        target: Vec<u8>,
    },
    /// A device, fifo or socket.
    Node {
        /// Its name.
        name: Vec<u8>,
        /// Its attributes.
        attributes: Attributes,
        /// Links to it will follow.
        shared: bool,
        /// What it is.
        kind: NodeKind,
    },
    /// One more name for an inode.
    Link {
        /// The new name.
        name: Vec<u8>,
        /// Which of the shared inodes so far, from 0.
        inode: u64,
    },
    /// A name that is gone.
    Whiteout {
        /// The name.
        name: Vec<u8>,
        /// A layer below the snapshot's own has it: it must stay hidden. Otherwise it was the
        /// snapshot's, and there is nothing left to hide.
        below: bool,
    },
    /// The stream is whole.
    End {
        /// Records that had a name.
        entries: u64,
        /// Bytes of data.
        bytes: u64,
    },
    /// The agent could not go on; nothing follows.
    Failed {
        /// Its words.
        reason: Vec<u8>,
    },
}

/// What is not a regular file, directory or symbolic link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// A character device; never 0:0, which is a whiteout.
    Character {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    Block {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A fifo.
    Fifo,
    /// A socket.
    Socket,
}

/// What inodes of all kinds have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// The lower twelve bits of `st_mode`.
    pub mode: u16,
    /// Owner; never `u32::MAX`, which chown(2) takes for "as it was".
    pub uid: u32,
    /// Group; as the owner.
    pub gid: u32,
    /// Time of modification: seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds of it, below 1 000 000 000.
    pub mtime_ns: u32,
    /// Extended attributes: full names ([`is_carried`]), and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What a stream may come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Records with a name.
    pub entries: u64,
    /// Bytes of data, link targets and extended attributes together.
    pub bytes: u64,
    /// Directories within one another; above [`DEPTH_MAX`] it has no effect.
    pub depth: u32,
}

/// Whether an extended attribute of this name travels. Overlayfs's own marks don't, as a stream has
/// words for them, nor do labels of security modules, which mean something on one machine alone.
pub fn is_carried(xattr: &[u8]) -> bool {
    const EXACTLY: [&[u8]; 3] = [
        b"security.capability",
        b"system.posix_acl_access",
        b"system.posix_acl_default",
    ];
    EXACTLY.contains(&xattr)
        || xattr.starts_with(b"user.")
        || xattr.starts_with(b"trusted.") && !xattr.starts_with(b"trusted.overlay.")
}

/// Asks for the changes of a container.
///
/// # Errors
/// The id is longer than 255 bytes; the connection broke.
pub fn ask(mut to: impl Write, container_id: &str) -> io::Result<()> {
    let length = u8::try_from(container_id.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the id is too long"))?;
    let mut message = vec![length];
    message.extend_from_slice(container_id.as_bytes());
    to.write_all(&message)
}

/// Reads what [`ask`] wrote.
///
/// # Errors
/// The connection broke; the id isn't UTF-8.
pub fn asked(mut from: impl Read) -> io::Result<String> {
    let mut length = [0];
    from.read_exact(&mut length)?;
    let mut id = vec![0; usize::from(length[0])];
    from.read_exact(&mut id)?;
    String::from_utf8(id).map_err(io::Error::other)
}

#[cfg(test)]
mod tests;
