//! The administrator's configuration: `/etc/supermachine/config.toml`.
//!
//! Two types for each section: as written ([`Config`], every key optional) and
//! as used ([`Resolved`], every key decided). A wrong key or value is an error
//! that names the file, the line, the key, what stands there and what was
//! expected. `config.toml.example` is generated from the same table
//! ([`example`]), and a test holds the two together.

mod error;
mod schema;
mod value;

use std::path::{Path, PathBuf};

pub use error::Error;
pub use schema::{
    Config, Console, Images, Jail, Kernel, Log, Resolved, Rootfs, State, Timeouts, Vm, example,
};
pub use value::{
    AbsolutePath, Digest, FirstId, Layers, Level, MemorySize, Ports, SeccompMode, Size, Time, Vcpus,
};

/// Where the configuration is looked for unless [`PATH_VARIABLE`] says otherwise.
pub const DEFAULT_PATH: &str = "/etc/supermachine/config.toml";
/// Environment variable that names another configuration file.
pub const PATH_VARIABLE: &str = "SUPERMACHINE_CONFIG";

/// Reads the configuration that applies.
///
/// `path` wins over `SUPERMACHINE_CONFIG`, which wins over [`DEFAULT_PATH`].
/// A file somebody named must exist; the default one may be absent, and then
/// every key has its default.
///
/// # Errors
/// Those of [`read`].
pub fn load(path: Option<&Path>) -> Result<Resolved, Error> {
    let named = path.map(Path::to_path_buf).or_else(|| {
        std::env::var_os(PATH_VARIABLE)
            .filter(|p| !p.is_empty())
            .map(PathBuf::from)
    });
    let written = match named {
        Some(file) => read(&file)?,
        None => match read(Path::new(DEFAULT_PATH)) {
            Err(Error::Unreadable { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                Config::default()
            }
            other => other?,
        },
    };
    Ok(written.resolve())
}

/// Reads one configuration file as it is written.
///
/// # Errors
/// The file can't be read, isn't TOML, has a key that doesn't exist or a value
/// that can't be.
pub fn read(file: &Path) -> Result<Config, Error> {
    let text = std::fs::read_to_string(file).map_err(|source| Error::Unreadable {
        file: file.to_path_buf(),
        source,
    })?;
    parse(&text, file)
}

/// Reads configuration text; `file` is only named in errors.
///
/// # Errors
/// As [`read`], except for reading.
pub fn parse(text: &str, file: &Path) -> Result<Config, Error> {
    toml::from_str(text).map_err(|error| Error::located(text, file, &error))
}

#[cfg(test)]
mod tests;
