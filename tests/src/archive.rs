//! Images made layer by layer, as OCI archives that `ctr images import` takes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// When everything in a layer was changed: long ago, so that nothing else looks like it.
const TIME: u64 = 1_234_567_890;

/// A layer: files in a tar.
#[allow(missing_debug_implementations, reason = "a tar has none")]
pub struct Layer {
    tar: Builder<Vec<u8>>,
}

/// What a file of a layer is.
#[derive(Debug, Clone, Copy)]
pub enum Kind<'a> {
    /// A regular file with this content.
    File(&'a [u8]),
    /// A directory.
    Directory,
    /// A symbolic link to this.
    Link(&'a str),
    /// Another name of this file of the layer.
    Same(&'a str),
    /// A character device.
    Character(u32, u32),
    /// A block device.
    Block(u32, u32),
    /// A fifo.
    Fifo,
}

/// Attributes of a file in a layer.
#[derive(Debug, Clone, Copy)]
pub struct Attributes<'a> {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Extended attributes.
    pub xattrs: &'a [(&'a str, &'a [u8])],
}

impl Default for Attributes<'_> {
    fn default() -> Self {
        Self {
            mode: 0o755,
            uid: 0,
            gid: 0,
            xattrs: &[],
        }
    }
}

impl Default for Layer {
    fn default() -> Self {
        Self {
            tar: Builder::new(Vec::new()),
        }
    }
}

impl Layer {
    /// Adds a file of root's, with mode 0755.
    ///
    /// # Errors
    /// The name is too long.
    pub fn with(self, name: impl AsRef<Path>, kind: Kind<'_>) -> Result<Self> {
        self.with_attributes(name, kind, Attributes::default())
    }

    /// Adds a file.
    ///
    /// # Errors
    /// The name is too long.
    pub fn with_attributes(
        mut self,
        name: impl AsRef<Path>,
        kind: Kind<'_>,
        attributes: Attributes<'_>,
    ) -> Result<Self> {
        // Of the kinds of tar, the one whose names are bytes of any kind.
        let mut header = Header::new_gnu();
        header.set_mode(attributes.mode);
        header.set_uid(attributes.uid);
        header.set_gid(attributes.gid);
        header.set_mtime(TIME);
        header.set_size(0);
        let mut content: &[u8] = &[];
        let entry = match kind {
            Kind::File(bytes) => {
                content = bytes;
                header.set_size(bytes.len() as u64);
                EntryType::Regular
            }
            Kind::Directory => EntryType::Directory,
            Kind::Link(to) => {
                header.set_link_name_literal(to)?;
                EntryType::Symlink
            }
            Kind::Same(to) => {
                header.set_link_name_literal(to)?;
                EntryType::Link
            }
            Kind::Character(major, minor) | Kind::Block(major, minor) => {
                header.set_device_major(major)?;
                header.set_device_minor(minor)?;
                match kind {
                    Kind::Block(..) => EntryType::Block,
                    _ => EntryType::Char,
                }
            }
            Kind::Fifo => EntryType::Fifo,
        };
        header.set_entry_type(entry);
        header.set_path(name.as_ref())?;
        header.set_cksum();
        let keys: Vec<String> = attributes
            .xattrs
            .iter()
            .map(|(name, _)| format!("SCHILY.xattr.{name}"))
            .collect();
        let values = attributes.xattrs.iter().map(|(_, value)| *value);
        let records = keys.iter().map(String::as_str).zip(values);
        if !keys.is_empty() {
            self.tar.append_pax_extensions(records)?;
        }
        self.tar.append(&header, content)?;
        Ok(self)
    }

    /// Adds a file of the host's, with mode 0755.
    ///
    /// # Errors
    /// It can't be read.
    pub fn with_copy(self, name: &str, from: &Path) -> Result<Self> {
        let content = std::fs::read(from).with_context(|| format!("read {}", from.display()))?;
        self.with(name, Kind::File(&content))
    }
}

/// Writes an image named `reference` to `to`.
///
/// # Errors
/// The file can't be written.
pub fn write(to: &Path, reference: &str, layers: Vec<Layer>) -> Result<()> {
    let mut blobs = BTreeMap::new();
    let (mut diffs, mut descriptors) = (Vec::new(), Vec::new());
    for layer in layers {
        let bytes = layer.tar.into_inner()?;
        let layer = add(&mut blobs, "application/vnd.oci.image.layer.v1.tar", bytes);
        diffs.push(layer["digest"].clone());
        descriptors.push(layer);
    }
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Cmd": ["sh"], "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] },
        "rootfs": { "type": "layers", "diff_ids": diffs },
    });
    let kind = "application/vnd.oci.image.config.v1+json";
    let config = add(&mut blobs, kind, config.to_string().into_bytes());
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": kind, "config": config, "layers": descriptors,
    });
    let mut manifest = add(&mut blobs, kind, manifest.to_string().into_bytes());
    manifest["annotations"] = json!({ "io.containerd.image.name": reference });
    manifest["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] }).to_string();

    let file = File::create(to).with_context(|| format!("create {}", to.display()))?;
    let mut archive = Builder::new(io::BufWriter::new(file));
    let mut append = |name: &str, bytes: &[u8]| {
        let mut header = Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(bytes.len() as u64);
        archive.append_data(&mut header, name, bytes)
    };
    append("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    append("index.json", index.as_bytes())?;
    for (digest, bytes) in blobs {
        append(&format!("blobs/sha256/{digest}"), &bytes)?;
    }
    Ok(archive.into_inner()?.flush()?)
}

/// Adds a blob; its descriptor.
fn add(blobs: &mut BTreeMap<String, Vec<u8>>, kind: &str, bytes: Vec<u8>) -> Value {
    let digest = Sha256::digest(&bytes);
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let size = bytes.len();
    let descriptor =
        json!({ "mediaType": kind, "digest": format!("sha256:{digest}"), "size": size });
    blobs.insert(digest, bytes);
    descriptor
}
