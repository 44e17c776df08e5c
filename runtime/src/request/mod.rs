//! What containerd asks for, validated: nothing past this point sees a ttrpc type, an identifier
//! that could leave its directory, or a relative path.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxResources, Process, Spec};
use serde::de::IgnoredAny;

/// The longest identifier containerd makes or accepts.
const IDENTIFIER_MAX: usize = 76;

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "{what} {value:?} is not an identifier; expected 1 to {IDENTIFIER_MAX} letters and digits \
         with single '.', '_' or '-' between them"
    )]
    Identifier { what: &'static str, value: String },
    #[error("{what} {value:?} is not an absolute path")]
    RelativePath { what: &'static str, value: String },
    #[error(
        "{stream} has the URI {value:?}; expected a path, fifo:///PATH, file:///PATH or, for output, \
         binary:///PATH?KEY=VALUE"
    )]
    Stream { stream: &'static str, value: String },
    #[error(
        "stderr has the URI {value:?}; one program logs both streams, expected stdout's {stdout:?}"
    )]
    TwoLoggers { stdout: String, value: String },
    #[error("Bundle {} does not exist or cannot be entered", path.display())]
    Bundle {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("Cannot read {}", path.display())]
    Unreadable {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("New limits are of type {found:?}; expected LinuxResources of the OCI runtime spec")]
    Resources { found: String },
    #[error("New limits are no LinuxResources of the OCI runtime spec")]
    MalformedResources { source: serde_json::Error },
    #[error("{} is not an OCI runtime configuration", path.display())]
    Malformed {
        path: PathBuf,
        source: serde_json::Error,
    },
}

/// An identifier as containerd validates them, so one path component and nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(transparent)]
pub struct Id(String);

impl Id {
    /// Validates `value`; `what` names it in the error.
    ///
    /// # Errors
    /// [`Error::Identifier`]
    pub fn new(what: &'static str, value: &str) -> Result<Self, Error> {
        let valid = value.len() <= IDENTIFIER_MAX
            && value
                .split(['.', '_', '-'])
                .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric()));
        if valid {
            Ok(Self(value.to_owned()))
        } else {
            Err(Error::Identifier {
                what,
                value: value.to_owned(),
            })
        }
    }

    /// The identifier's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One mount of the root file system, as the snapshotter describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub kind: String,
    pub source: String,
    pub options: Vec<String>,
    pub target: String,
}

/// New limits for a container, from the type and value of a protobuf `Any`.
///
/// # Errors
/// It is another type, or not what it says it is.
pub fn resources(type_url: &str, value: &[u8]) -> Result<LinuxResources, Error> {
    // "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
    if type_url.rsplit('/').next() != Some("LinuxResources") {
        return Err(Error::Resources {
            found: type_url.to_owned(),
        });
    }
    serde_json::from_slice(value).map_err(|source| Error::MalformedResources { source })
}

/// Where one standard stream of a process comes from or goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Nowhere: reads end at once, writes vanish.
    None,
    /// A fifo containerd made.
    Fifo(PathBuf),
    /// A file to append to.
    File(PathBuf),
    /// A program that reads it.
    Logger(Box<Logger>),
}

/// A program that gets a process's output: `binary:///PATH?KEY=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logger {
    uri: String,
    pub program: PathBuf,
    /// Keys and values in turn, which is how it gets them.
    pub args: Vec<String>,
    /// It must say that it is ready, by a byte (`binary-v2`), not just close the pipe.
    pub speaks: bool,
}

impl Logger {
    fn parse(uri: &str, speaks: bool) -> Option<Self> {
        let (_, rest) = uri.split_once("://")?;
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path: Vec<u8> = percent_encoding::percent_decode_str(path).collect();
        let program = PathBuf::from(OsString::from_vec(path));
        let pairs = form_urlencoded::parse(query.as_bytes()).into_owned();
        program.is_absolute().then(|| Self {
            uri: uri.to_owned(),
            program,
            args: pairs.flat_map(|(key, value)| [key, value]).collect(),
            speaks,
        })
    }
}

/// As it is asked for; a fifo by its path alone.
impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::Fifo(path) => write!(f, "{}", path.display()),
            Self::File(path) => write!(f, "file://{}", path.display()),
            Self::Logger(logger) => f.write_str(&logger.uri),
        }
    }
}

impl Stream {
    fn parse(stream: &'static str, value: &str) -> Result<Self, Error> {
        let absolute = |path: &str| {
            let path = PathBuf::from(path);
            path.is_absolute().then_some(path)
        };
        let parsed = match value.split_once("://") {
            None if value.is_empty() => Some(Self::None),
            None => absolute(value).map(Self::Fifo),
            Some(("fifo", path)) => absolute(path).map(Self::Fifo),
            Some(("file", path)) => absolute(path).map(Self::File),
            Some((scheme @ ("binary" | "binary-v2"), _)) if stream != "stdin" => {
                Logger::parse(value, scheme == "binary-v2")
                    .map(|logger| Self::Logger(Box::new(logger)))
            }
            Some(_) => None,
        };
        parsed.ok_or_else(|| Error::Stream {
            stream,
            value: value.to_owned(),
        })
    }
}

/// The standard streams of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stdio {
    pub stdin: Stream,
    pub stdout: Stream,
    /// [`Stream::None`] with a terminal, whatever was asked for.
    pub stderr: Stream,
    pub terminal: bool,
}

impl Stdio {
    /// Validates the three paths or URIs of a request; empty means no stream.
    ///
    /// # Errors
    /// [`Error::Stream`] for a relative path or a scheme that isn't supported,
    /// [`Error::TwoLoggers`].
    pub fn new(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> Result<Self, Error> {
        let stderr = Stream::parse("stderr", stderr)?;
        let stdout = Stream::parse("stdout", stdout)?;
        if matches!(stderr, Stream::Logger(_)) && stderr != stdout {
            return Err(Error::TwoLoggers {
                stdout: stdout.to_string(),
                value: stderr.to_string(),
            });
        }
        Ok(Self {
            stdin: Stream::parse("stdin", stdin)?,
            stdout,
            stderr: if terminal { Stream::None } else { stderr },
            terminal,
        })
    }
}

/// A request to create a container.
#[derive(Clone, Debug)]
pub struct Create {
    pub namespace: Id,
    pub id: Id,
    /// The directory that holds `config.json`; absolute.
    pub bundle: PathBuf,
    /// How to mount the root file system; empty if the spec names a directory instead.
    pub rootfs: Vec<Mount>,
    pub stdio: Stdio,
}

impl Create {
    /// Validates a request.
    ///
    /// # Errors
    /// An identifier or the bundle's path isn't one.
    pub fn new(
        namespace: &str,
        id: &str,
        bundle: &Path,
        rootfs: Vec<Mount>,
        stdio: Stdio,
    ) -> Result<Self, Error> {
        if !bundle.is_absolute() {
            let value = bundle.display().to_string();
            return Err(Error::RelativePath {
                what: "Bundle",
                value,
            });
        }
        Ok(Self {
            namespace: Id::new("Namespace", namespace)?,
            id: Id::new("Container id", id)?,
            bundle: bundle.to_path_buf(),
            rootfs,
            stdio,
        })
    }

    /// Reads the bundle's `config.json`.
    ///
    /// # Errors
    /// There is no bundle or no `config.json`, or it isn't an OCI runtime configuration.
    pub fn load_spec(&self) -> Result<Spec, Error> {
        load_spec(&self.bundle)
    }
}

/// Reads `config.json` of the bundle at `bundle`.
///
/// # Errors
/// As [`Create::load_spec`].
pub fn load_spec(bundle: &Path) -> Result<Spec, Error> {
    std::fs::read_dir(bundle).map_err(|source| Error::Bundle {
        path: bundle.to_path_buf(),
        source,
    })?;
    let path = bundle.join("config.json");
    let text = std::fs::read(&path).map_err(|source| Error::Unreadable {
        path: path.clone(),
        source,
    })?;
    // An array would pass for a configuration of which everything is missing.
    serde_json::from_slice::<BTreeMap<String, IgnoredAny>>(&text)
        .and_then(|_| serde_json::from_slice(&text))
        .map_err(|source| Error::Malformed { path, source })
}

/// A request to run a further process in a container.
#[derive(Clone, Debug)]
pub struct Exec {
    pub container_id: Id,
    pub exec_id: Id,
    pub process: Process,
    pub stdio: Stdio,
}

impl Exec {
    /// Validates a request; `process` is the OCI process object as JSON.
    ///
    /// # Errors
    /// An identifier isn't one, or `process` isn't an OCI process.
    pub fn new(
        container_id: &str,
        exec_id: &str,
        process: &[u8],
        stdio: Stdio,
    ) -> Result<Self, Error> {
        Ok(Self {
            container_id: Id::new("Container id", container_id)?,
            exec_id: Id::new("Exec id", exec_id)?,
            process: serde_json::from_slice(process).map_err(|source| Error::Malformed {
                path: "The exec's process".into(),
                source,
            })?,
            stdio,
        })
    }
}

#[cfg(test)]
mod tests;
