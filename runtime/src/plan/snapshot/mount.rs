//! One mount of a list: its type, options and templates.

use std::path::PathBuf;

use super::super::template::{self, Piece, Place};
use super::super::{Error, MakeExt4, NewDirectory};
use super::Disk;
use crate::request::Mount;

/// What a mount shows to those after it.
#[derive(Debug)]
pub(super) enum Shown {
    Directory { path: PathBuf, read_only: bool },
    Part { place: Place, read_only: bool },
    Image { file: PathBuf },
    Disk { disk: Disk, read_only: bool },
    Overlay(Overlay),
}

#[derive(Debug)]
pub(super) struct Overlay {
    pub(super) lower: Vec<Place>,
    /// With its work directory.
    pub(super) upper: Option<(Place, Option<Place>)>,
    pub(super) read_only: bool,
}

/// Options that say how a mount is to be kept, not what it shows.
const INDIFFERENT: &[&str] = &[
    "loop",
    "rw",
    "defaults",
    "noatime",
    "nodiratime",
    "relatime",
    "strictatime",
    "lazytime",
    "discard",
    "nodiscard",
    "async",
    "dev",
    "suid",
    "exec",
    "barrier",
];
/// The same of a file system that is only read: its journal isn't replayed.
const NO_REPLAY: &[&str] = &["noload", "norecovery"];

const MKDIR: &str = "X-containerd.mkdir.";
const MKFS: &str = "X-containerd.mkfs.";

/// One mount, its type without what containerd's mount manager is to do first.
pub(super) struct Reader<'a> {
    pub(super) kind: &'a str,
    format: bool,
    mkdir: bool,
    mkfs: bool,
    mount: &'a Mount,
    earlier: &'a [Mount],
}

impl<'a> Reader<'a> {
    pub(super) fn new(mount: &'a Mount, earlier: &'a [Mount]) -> Result<Self, Error> {
        let mut reader = Self {
            kind: &mount.kind,
            format: false,
            mkdir: false,
            mkfs: false,
            mount,
            earlier,
        };
        while let Some((first, kind)) = reader.kind.split_once('/') {
            match first {
                "format" => reader.format = true,
                "mkdir" => reader.mkdir = true,
                "mkfs" => reader.mkfs = true,
                _ => return Err(reader.unknown_kind()),
            }
            reader.kind = kind;
        }
        Ok(reader)
    }

    fn unknown_kind(&self) -> Error {
        Error::Unsupported {
            key: format!("A root file system of type {:?}", self.mount.kind),
            reason:
                "expected bind, overlay, erofs or ext4, of which format/, mkdir/ and mkfs/ may \
                     come first"
                    .into(),
        }
    }

    /// What it shows; directories that it asks for are noted with the disks of `shown`.
    pub(super) fn read(&self, shown: &mut [Shown]) -> Result<Shown, Error> {
        self.make_directories(shown)?;
        match self.kind {
            "bind" | "rbind" => {
                let read_only = self.has("ro");
                Ok(match self.source()? {
                    Place::Host(path) => Shown::Directory { path, read_only },
                    place => Shown::Part { place, read_only },
                })
            }
            "overlay" => self.overlay().map(Shown::Overlay),
            "erofs" => {
                self.check_options(&[INDIFFERENT, &["ro"]])?;
                Ok(Shown::Image { file: self.file()? })
            }
            "ext4" => {
                let read_only = self.has("ro");
                self.check_options(&[
                    INDIFFERENT,
                    if read_only { NO_REPLAY } else { &[] },
                    &["ro"],
                ])?;
                let disk = Disk {
                    file: self.file()?,
                    make: self.make_ext4()?,
                    directories: Vec::new(),
                };
                Ok(Shown::Disk { disk, read_only })
            }
            _ => Err(self.unknown_kind()),
        }
    }

    pub(super) fn overlay(&self) -> Result<Overlay, Error> {
        for option in ["userxattr", "uidmap", "gidmap"] {
            if self.has(option) || self.value(option).is_some() {
                return Err(Error::Unsupported {
                    key: format!("Overlay option {option}"),
                    reason: match option {
                        "userxattr" => {
                            "layers of a rootless containerd mark deletions in another way"
                        }
                        _ => "ids of files are not mapped",
                    }
                    .into(),
                });
            }
        }
        let lower = self.value("lowerdir");
        let lower = lower.ok_or(Error::Missing { key: "lowerdir" })?;
        let lower = self.expand("lowerdir", lower)?;
        let place = |key: &'static str| {
            let value = self.value(key);
            value
                .map(|value| self.place(key, &self.expand(key, &template::unescape(value))?))
                .transpose()
        };
        let upper = place("upperdir")?;
        Ok(Overlay {
            lower: template::places(&lower)
                .map_err(|problem| self.wrong("lowerdir", problem.expected()))?,
            read_only: upper.is_none() || self.has("ro"),
            upper: match upper {
                Some(upper) => Some((upper, place("workdir")?)),
                None => None,
            },
        })
    }

    /// `X-containerd.mkfs.*`: the file system is made by whoever needs it first.
    fn make_ext4(&self) -> Result<Option<MakeExt4>, Error> {
        if !self.mkfs {
            return Ok(None);
        }
        let (mut size, mut uuid) = (None, None);
        for option in self
            .mount
            .options
            .iter()
            .filter_map(|option| option.strip_prefix(MKFS))
        {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            match (key, value) {
                ("fs", "ext4") => {}
                ("fs", _) => return Err(self.wrong(&format!("{MKFS}fs"), "ext4")),
                ("size", size_text) => size = parse_size(size_text),
                ("uuid", text) => uuid = Some(text.to_owned()).filter(|text| is_uuid(text)),
                _ => return Err(self.unknown_option(&format!("{MKFS}{key}"))),
            }
            if key == "uuid" && uuid.is_none() {
                return Err(self.wrong(&format!("{MKFS}uuid"), "a UUID"));
            }
        }
        match size.filter(|size| *size >= 1 << 20) {
            Some(size) => Ok(Some(MakeExt4 { size, uuid })),
            None => Err(self.wrong(
                &format!("{MKFS}size"),
                "a size such as 100MiB, at least 1MiB",
            )),
        }
    }

    /// `X-containerd.mkdir.path=PATH[:MODE[:UID:GID]]`, on a disk that an earlier mount shows.
    fn make_directories(&self, shown: &mut [Shown]) -> Result<(), Error> {
        if !self.mkdir {
            return Ok(());
        }
        const KEY: &str = "X-containerd.mkdir.path";
        for option in self
            .mount
            .options
            .iter()
            .filter_map(|option| option.strip_prefix(MKDIR))
        {
            let value = option.strip_prefix("path=");
            let value = value.ok_or_else(|| self.unknown_option(&format!("{MKDIR}{option}")))?;
            let malformed = || self.wrong(KEY, "PATH, PATH:MODE or PATH:MODE:UID:GID");
            let mut parts = value.split(':');
            let place = parts.next().unwrap_or_default();
            let place = self.place(KEY, &self.expand(KEY, place)?)?;
            let parts: Vec<&str> = parts.collect();
            let number = |text: &str| text.parse::<u32>().map_err(|_| malformed());
            let (mode, uid, gid) = match parts.as_slice() {
                [] => ("0700", 0, 0),
                [mode] => (*mode, 0, 0),
                [mode, uid, gid] => (*mode, number(uid)?, number(gid)?),
                _ => return Err(malformed()),
            };
            let mode = u32::from_str_radix(mode, 8)
                .ok()
                .filter(|mode| *mode <= 0o777);
            let mode = mode.ok_or_else(malformed)?;
            match place {
                Place::Mounted { mount, path } if !path.is_empty() => match shown.get_mut(mount) {
                    Some(Shown::Disk {
                        disk,
                        read_only: false,
                    }) => {
                        disk.directories.push(NewDirectory {
                            path,
                            mode,
                            uid,
                            gid,
                        });
                    }
                    _ => return Err(self.wrong(KEY, "a directory on a writable ext4 mount")),
                },
                _ => return Err(self.wrong(KEY, "a directory on a writable ext4 mount")),
            }
        }
        Ok(())
    }

    /// The source, which is a file of the host.
    fn file(&self) -> Result<PathBuf, Error> {
        match self.source()? {
            Place::Host(path) => Ok(path),
            Place::Mounted { .. } => Err(self.wrong("source", "a file of the host")),
        }
    }

    fn source(&self) -> Result<Place, Error> {
        let pieces = self.expand("source", &self.mount.source)?;
        self.place("source", &pieces)
    }

    fn expand(&self, key: &str, text: &str) -> Result<Vec<Piece>, Error> {
        if !self.format {
            return Ok(template::literal(text));
        }
        template::expand(text, self.earlier).map_err(|problem| Error::Invalid {
            key: format!("Mount option {key}"),
            value: text.to_owned(),
            expected: problem.expected(),
        })
    }

    fn place(&self, key: &str, pieces: &[Piece]) -> Result<Place, Error> {
        template::place(pieces).map_err(|problem| self.wrong(key, problem.expected()))
    }

    /// What a mount says where something else is expected.
    fn wrong(&self, key: &str, expected: &'static str) -> Error {
        let value = match key {
            "source" => Some(self.mount.source.as_str()),
            key => self.value(key),
        };
        Error::Invalid {
            key: format!("{} of the {} mount", key, self.mount.kind),
            value: value.unwrap_or_default().to_owned(),
            expected,
        }
    }

    fn check_options(&self, known: &[&[&str]]) -> Result<(), Error> {
        let made = |option: &str| {
            (self.mkfs && option.starts_with(MKFS)) || (self.mkdir && option.starts_with(MKDIR))
        };
        let is_known = |option: &&String| {
            made(option) || known.iter().any(|list| list.contains(&option.as_str()))
        };
        match self.mount.options.iter().find(|option| !is_known(option)) {
            Some(option) => Err(self.unknown_option(option)),
            None => Ok(()),
        }
    }

    fn unknown_option(&self, option: &str) -> Error {
        Error::Unsupported {
            key: format!("Option {option:?} of the {} mount", self.mount.kind),
            reason: "what it changes is not known here".into(),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.mount.options.iter().any(|option| option == name)
    }

    fn value(&self, name: &str) -> Option<&str> {
        let mut options = self.mount.options.iter();
        options.find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
    }
}

/// Bytes, as containerd writes them: a number, maybe with a unit of 1024 (`100MiB`, `1g`).
fn parse_size(text: &str) -> Option<u64> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim_start().to_ascii_lowercase();
    let shift = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" if unit != "i" && unit != "ib" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn is_uuid(text: &str) -> bool {
    let groups: Vec<usize> = text.split('-').map(str::len).collect();
    let hexadecimal = |byte: u8| byte.is_ascii_hexdigit() || byte == b'-';
    groups == [8, 4, 4, 4, 12] && text.bytes().all(hexadecimal)
}
