//! The handshake of `start`: what containerd says on stdin, and what it is told in return.
//!
//! containerd up to 2.2 writes the runtime's options, an `Any`, or nothing, and is told in JSON;
//! 2.3 and later write `BootstrapParams` and are told by `BootstrapResult`. Both inputs are
//! protobuf, and each parses as the other: what tells them apart is the identity, which is on the
//! command line as well.

use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message;

use crate::BoxError;
use crate::args::Args;

/// This program's version.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The name containerd knows this runtime by.
const RUNTIME: &str = "io.containerd.supermachine.v2";

/// More than any containerd writes.
const STDIN_MAX: u64 = 4 << 20;

/// Mounts of a root file system that containerd's mount manager is to leave to this shim: its type,
/// or a prefix of it with "/*". containerd asks for no more than these words, comma separated.
const ALLOW_MOUNTS: (&str, &str) = (
    "containerd.io/runtime-allow-mounts",
    "erofs,ext4,format/*,mkdir/*,mkfs/*",
);

/// How `start` is asked, which is how it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// By flags alone.
    Json,
    /// By `BootstrapParams` too.
    Protobuf,
}

/// What `start` is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Params {
    /// The command line, completed.
    pub(crate) args: Args,
    /// Where the shim's socket is to be, if containerd says so.
    pub(crate) socket_dir: Option<String>,
    pub(crate) form: Form,
}

/// Completes the command line by what is on stdin, unless that is a terminal: somebody trying the
/// program by hand.
///
/// # Errors
/// Stdin cannot be read, is about another container, or something is missing.
pub(crate) fn read(args: &Args) -> Result<Params, BoxError> {
    let stdin = io::stdin();
    let mut bytes = Vec::new();
    if !stdin.is_terminal() {
        stdin.lock().take(STDIN_MAX).read_to_end(&mut bytes)?;
    }
    decode(&bytes, args.clone())
}

fn decode(bytes: &[u8], args: Args) -> Result<Params, BoxError> {
    let (mut args, mut socket_dir, mut form) = (args, None, Form::Json);
    if let Some(params) = bootstrap_params(bytes, &args)? {
        let complete = |flag: &mut String, value: String| {
            if flag.is_empty() {
                *flag = value;
            }
        };
        complete(&mut args.id, params.instance_id);
        complete(&mut args.namespace, params.namespace);
        complete(&mut args.address, params.containerd_grpc_address);
        complete(&mut args.ttrpc_address, params.containerd_ttrpc_address);
        complete(&mut args.publish_binary, params.containerd_binary);
        // containerd's levels: 0 is info, more detail is negative.
        args.debug |= params.log_level.value() < 0;
        socket_dir = params.socket_dir.filter(|directory| !directory.is_empty());
        form = Form::Protobuf;
    }
    if let Some(directory) = socket_dir
        .as_deref()
        .filter(|dir| !Path::new(dir).is_absolute())
    {
        return Err(format!("Socket directory {directory:?} is not an absolute path").into());
    }
    args.check_identity()?;
    Ok(Params {
        args,
        socket_dir,
        form,
    })
}

/// `bytes` as `BootstrapParams`, if that is what they are.
fn bootstrap_params(bytes: &[u8], args: &Args) -> Result<Option<BootstrapParams>, BoxError> {
    let Ok(params) = BootstrapParams::parse_from_bytes(bytes) else {
        return Ok(None);
    };
    let fits = |flag: &str, value: &str| flag.is_empty() || flag == value;
    let named = !args.id.is_empty() && !args.namespace.is_empty();
    // Options have two fields only; a containerd's address is in neither.
    let addressed = !params.containerd_grpc_address.is_empty();
    if fits(&args.id, &params.instance_id) && fits(&args.namespace, &params.namespace) {
        return Ok((named || addressed).then_some(params));
    }
    if addressed {
        return Err(format!(
            "Bootstrap parameters are for container {:?} in namespace {:?}, the command line is for \
             {:?} in {:?}",
            params.instance_id, params.namespace, args.id, args.namespace
        )
        .into());
    }
    Ok(None)
}

/// Tells containerd where the daemon listens.
///
/// # Errors
/// Stdout is closed.
pub(crate) fn reply(address: &str, form: Form) -> Result<(), BoxError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(&encode(address, form)?)?;
    Ok(stdout.flush()?)
}

/// Whoever asked by flags is told version 2, which every containerd accepts: 1.7 refuses more, and
/// 2.x then speaks `containerd.task.v2`, whose messages are those of v3.
fn encode(address: &str, form: Form) -> Result<Vec<u8>, BoxError> {
    const PROTOCOL: &str = "ttrpc";
    Ok(match form {
        Form::Json => {
            let reply =
                serde_json::json!({ "version": 2, "address": address, "protocol": PROTOCOL });
            reply.to_string().into_bytes()
        }
        Form::Protobuf => {
            let mut result = BootstrapResult::new();
            result.version = 3;
            result.address = address.to_owned();
            result.protocol = PROTOCOL.to_owned();
            result.write_to_bytes()?
        }
    })
}

/// `-v`, as containerd's own shims answer it.
pub(crate) fn print_version() -> Result<(), BoxError> {
    let name = env!("CARGO_BIN_NAME");
    Ok(io::stdout().write_all(format!("{name}:\n  Version:  {VERSION}\n").as_bytes())?)
}

/// `-info`: what containerd asks before it uses features that not every runtime has.
pub(crate) fn print_info() -> Result<(), BoxError> {
    Ok(io::stdout().write_all(&info().write_to_bytes()?)?)
}

fn info() -> RuntimeInfo {
    let mut version = RuntimeVersion::new();
    version.version = VERSION.to_owned();
    let mut info = RuntimeInfo::new();
    info.name = RUNTIME.to_owned();
    info.version = Some(version).into();
    let (key, value) = ALLOW_MOUNTS;
    info.annotations.insert(key.to_owned(), value.to_owned());
    info
}

#[cfg(test)]
mod tests;
