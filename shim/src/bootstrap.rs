//! The handshake of `start`: what containerd says on stdin, and what it is told in return.
//!
//! containerd up to 2.2 writes the runtime's options, an `Any`, or nothing; 2.3 and later write
//! `BootstrapParams`. Both are protobuf, and each parses as the other; the instance id, which is
//! also on the command line, tells them apart.

use std::io::{self, IsTerminal, Read, Write};

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message;

use crate::BoxError;

/// This program's version.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The name containerd knows this runtime by.
const RUNTIME: &str = "io.containerd.supermachine.v2";

/// More than any containerd writes.
const STDIN_MAX: u64 = 4 << 20;

/// What `start` needs of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Params {
    /// containerd logs debug messages.
    pub(crate) debug: bool,
    /// Where the shim's socket is to be, if containerd says so.
    pub(crate) socket_dir: Option<String>,
}

/// Reads stdin, unless it is a terminal: somebody trying the program by hand.
///
/// # Errors
/// Stdin cannot be read or is not what containerd writes.
pub(crate) fn read(id: &str) -> Result<Params, BoxError> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Ok(Params::default());
    }
    let mut bytes = Vec::new();
    stdin.lock().take(STDIN_MAX).read_to_end(&mut bytes)?;
    Ok(decode(&bytes, id))
}

fn decode(bytes: &[u8], id: &str) -> Params {
    match BootstrapParams::parse_from_bytes(bytes) {
        Ok(params) if params.instance_id == id => Params {
            // containerd's levels: 0 is info, more detail is negative.
            debug: params.log_level.value() < 0,
            socket_dir: params.socket_dir.filter(|directory| !directory.is_empty()),
        },
        // Options of another runtime, or none: there is nothing in them for this one yet.
        _ => Params::default(),
    }
}

/// Tells containerd where the daemon listens.
///
/// Version 2 is what every containerd accepts: 1.7 refuses more, and 2.x then speaks
/// `containerd.task.v2`, whose messages are those of v3. What version 3 adds is how containerd
/// reaches the later containers of a pod. JSON is read by all of them, including those that would
/// rather have a `BootstrapResult`.
///
/// # Errors
/// Stdout is closed.
pub(crate) fn reply(address: &str) -> Result<(), BoxError> {
    let reply = serde_json::json!({ "version": 2, "address": address, "protocol": "ttrpc" });
    let mut stdout = io::stdout().lock();
    stdout.write_all(reply.to_string().as_bytes())?;
    Ok(stdout.flush()?)
}

/// `-v`, as containerd's own shims answer it.
pub(crate) fn print_version() -> Result<(), BoxError> {
    let name = env!("CARGO_BIN_NAME");
    Ok(io::stdout().write_all(format!("{name}:\n  Version:  {VERSION}\n").as_bytes())?)
}

/// `-info`: what containerd asks before it uses features that not every runtime has.
pub(crate) fn print_info() -> Result<(), BoxError> {
    let mut version = RuntimeVersion::new();
    version.version = VERSION.to_owned();
    let mut info = RuntimeInfo::new();
    info.name = RUNTIME.to_owned();
    info.version = Some(version).into();
    Ok(io::stdout().write_all(&info.write_to_bytes()?)?)
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::LogLevel;
    use protobuf::well_known_types::any::Any;

    use super::*;

    #[test]
    fn bootstrap_parameters_are_told_from_options() {
        let mut params = BootstrapParams::new();
        params.instance_id = "c1".to_owned();
        params.namespace = "default".to_owned();
        params.log_level = LogLevel::LOG_LEVEL_DEBUG.into();
        params.socket_dir = Some("/run/s".to_owned());
        let bytes = params.write_to_bytes().unwrap();
        let expected = Params {
            debug: true,
            socket_dir: Some("/run/s".to_owned()),
        };
        assert_eq!(decode(&bytes, "c1"), expected);

        let mut options = Any::new();
        options.type_url = "containerd.runc.v1.Options".to_owned();
        options.value = vec![0x10, 0x01];
        let bytes = options.write_to_bytes().unwrap();
        assert_eq!(decode(&bytes, "c1"), Params::default());
    }

    #[test]
    fn nothing_and_nonsense_mean_no_parameters() {
        assert_eq!(decode(&[], "c1"), Params::default());
        assert_eq!(decode(b"\xff\xff\xff", "c1"), Params::default());
    }
}
