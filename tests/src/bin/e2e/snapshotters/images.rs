//! Images of the tests of snapshotters.

use std::path::Path;

use anyhow::Result;
use supermachine_tests::archive::{self, Attributes, Kind, Layer};
use supermachine_tests::host::Host;

use crate::support::World;

/// An image that is made when it is needed.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) name: &'static str,
    layers: fn(&World) -> Result<Vec<Layer>>,
}

/// Files of every kind, changed by further layers; in /data, with `/probe` to look at them.
pub(super) const TREES: Image = Image {
    name: "supermachine.test/trees:latest",
    layers: trees,
};

/// A hundred layers above busybox's.
pub(super) const HUNDRED: Image = Image {
    name: "supermachine.test/hundred:latest",
    layers: hundred,
};

/// Two images of as many layers, and what their file /which holds.
pub(super) const REUSED: [(Image, &str); 2] = [
    (
        Image {
            name: "supermachine.test/first:latest",
            layers: |world| two(world, "first"),
        },
        "first",
    ),
    (
        Image {
            name: "supermachine.test/second:latest",
            layers: |world| two(world, "other"),
        },
        "other",
    ),
];

/// Files that [`TREES`] has at the least.
pub(super) const TREE_FILES: usize = 320;

/// cap_net_raw=ep, revision 2 (linux/capability.h, struct vfs_cap_data).
const CAPABILITY: &[u8] = &[
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

impl Image {
    /// Hands it to a containerd that doesn't have it.
    pub(super) fn import(&self, world: &World, host: &Host) -> Result<()> {
        let held = host.ctr(&["images", "ls", "-q"])?.success()?;
        if held.lines().any(|name| name == self.name) {
            return Ok(());
        }
        let file = world.files()?.join("image.tar");
        archive::write(&file, self.name, (self.layers)(world)?)?;
        host.ctr.import(&file)?;
        Ok(std::fs::remove_file(file)?)
    }
}

fn base(world: &World) -> Result<Layer> {
    let mut layer = Layer::default();
    for name in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        layer = layer.with(name, Kind::Directory)?;
    }
    layer = layer.with_copy("bin/busybox", &world.busybox()?.join("bin/busybox"))?;
    for name in ["sh", "cat", "dd", "echo", "grep", "ls", "mkdir", "rm", "wc"] {
        layer = layer.with(format!("bin/{name}"), Kind::Link("busybox"))?;
    }
    Ok(layer)
}

fn two(world: &World, which: &str) -> Result<Vec<Layer>> {
    let layer = Layer::default().with("which", Kind::File(which.as_bytes()))?;
    Ok(vec![base(world)?, layer])
}

fn hundred(world: &World) -> Result<Vec<Layer>> {
    let mut layers = vec![base(world)?];
    for number in 1..=100 {
        let text = format!("{number}\n");
        let layer = Layer::default()
            .with("layers", Kind::Directory)?
            .with(format!("layers/{number}"), Kind::File(b""))?
            .with("top", Kind::File(text.as_bytes()))?;
        layers.push(layer);
    }
    Ok(layers)
}

fn trees(world: &World) -> Result<Vec<Layer>> {
    use std::os::unix::ffi::OsStrExt;

    let probe = std::env::current_exe()?.with_file_name("probe");
    let owned = |mode, uid, gid| Attributes {
        mode,
        uid,
        gid,
        xattrs: &[],
    };
    let attributes: &[(&str, &[u8])] = &[
        ("security.capability", CAPABILITY),
        ("user.note", b"a note"),
        ("user.binary", &[0, 255, b'\n', b'=']),
        ("user.empty", b""),
    ];
    let mut holes = vec![0; 3 << 20];
    holes.extend_from_slice(b"behind holes");
    let not_utf8 = Path::new(std::ffi::OsStr::from_bytes(b"data/\xff\xfe name\xe4"));
    let mut first = base(world)?
        .with_copy("probe", &probe)?
        .with_attributes("data", Kind::Directory, owned(0o751, 70_000, 70_001))?
        .with_attributes("data/setuid", Kind::File(b"s"), owned(0o4711, 1000, 0))?
        .with_attributes("data/sticky", Kind::Directory, owned(0o1777, 0, 0))?
        .with_attributes(
            "data/ids",
            Kind::File(b"i"),
            owned(0o640, 2_000_000, 100_000),
        )?
        .with_attributes(
            "data/attributes",
            Kind::File(b"x"),
            Attributes {
                xattrs: attributes,
                ..Attributes::default()
            },
        )?
        .with_attributes(
            "data/marked",
            Kind::Directory,
            Attributes {
                xattrs: &[("user.of-a-directory", b"d")],
                ..Attributes::default()
            },
        )?
        .with("data/one", Kind::File(b"linked"))?
        .with("data/two", Kind::Same("data/one"))?
        .with("data/marked/three", Kind::Same("data/one"))?
        .with("data/null", Kind::Character(1, 3))?
        .with("data/large-numbers", Kind::Character(4000, 70_000))?
        .with("data/disk", Kind::Block(8, 17))?
        .with("data/fifo", Kind::Fifo)?
        .with("data/link", Kind::Link("../no/where"))?
        .with("data/holes", Kind::File(&holes))?
        .with("data/empty", Kind::File(b""))?
        .with(not_utf8, Kind::File(b"bytes"))?
        .with("data/removed", Kind::File(b"gone"))?
        .with("data/removed-tree", Kind::Directory)?
        .with("data/removed-tree/inner", Kind::File(b"gone"))?
        .with("data/becomes-file", Kind::Directory)?
        .with("data/becomes-file/inner", Kind::File(b"gone"))?
        .with("data/becomes-directory", Kind::File(b"gone"))?
        .with("data/replaced", Kind::File(b"old"))?
        .with("data/opaque", Kind::Directory)?
        .with("data/opaque/below", Kind::File(b"hidden"))?
        .with("data/opaque/tree", Kind::Directory)?
        .with("data/opaque/tree/below", Kind::File(b"hidden"))?
        .with("data/many", Kind::Directory)?;
    for number in 0..300 {
        let text = number.to_string();
        first = first.with(
            format!("data/many/file-{number}"),
            Kind::File(text.as_bytes()),
        )?;
    }
    let second = Layer::default()
        .with("data/.wh.removed", Kind::File(b""))?
        .with("data/.wh.removed-tree", Kind::File(b""))?
        .with("data/becomes-file", Kind::File(b"a file"))?
        .with("data/becomes-directory", Kind::Directory)?
        .with("data/becomes-directory/inner", Kind::File(b"new"))?
        .with_attributes("data/replaced", Kind::File(b"new"), owned(0o600, 5, 6))?
        .with("data/opaque", Kind::Directory)?
        .with("data/opaque/.wh..wh..opq", Kind::File(b""))?
        .with("data/opaque/above", Kind::File(b"seen"))?
        .with("data/many/.wh.file-7", Kind::File(b""))?;
    let third = Layer::default()
        .with("data/removed", Kind::File(b"back again"))?
        .with("data/opaque/below", Kind::File(b"back again"))?
        .with_attributes("data/many", Kind::Directory, owned(0o700, 9, 9))?;
    Ok(vec![first, second, third])
}
