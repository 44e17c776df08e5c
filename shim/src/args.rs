//! The command line containerd gives a shim: Go's flags, with one dash or two, then an action.

use std::path::PathBuf;

use crate::BoxError;

/// What the shim is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Start the daemon of a new container and print where it listens.
    Start,
    /// Clean up after a daemon that is gone.
    Delete,
    /// Be the daemon: no action given.
    Serve,
    /// Print the version.
    Version,
    /// Print what this runtime can do.
    Info,
}

/// The parsed command line and the variables that belong to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) command: Command,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// The container's, or the sandbox's, id.
    pub(crate) id: String,
    /// containerd's gRPC socket.
    pub(crate) address: String,
    /// containerd's ttrpc socket; empty if there is none.
    pub(crate) ttrpc_address: String,
    /// The containerd binary, which can publish events too.
    pub(crate) publish_binary: String,
    /// The OCI bundle; the working directory unless given.
    pub(crate) bundle: PathBuf,
    /// Log more.
    pub(crate) debug: bool,
}

/// Where containerd leaves its ttrpc address.
pub(crate) const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

impl Args {
    /// Parses what follows the program's name.
    ///
    /// # Errors
    /// An unknown flag or action, or a missing value.
    pub(crate) fn parse(args: impl Iterator<Item = String>) -> Result<Self, BoxError> {
        let mut parsed = Self {
            command: Command::Serve,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            ttrpc_address: std::env::var(TTRPC_ADDRESS).unwrap_or_default(),
            publish_binary: String::new(),
            bundle: PathBuf::new(),
            debug: false,
        };
        let mut args = args;
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix('-') else {
                parsed.command = match arg.as_str() {
                    "start" => Command::Start,
                    "delete" => Command::Delete,
                    _ => {
                        return Err(
                            format!("Unknown action {arg:?}; expected start or delete").into()
                        );
                    }
                };
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let mut value = || {
                inline
                    .clone()
                    .or_else(|| args.next())
                    .ok_or_else(|| format!("Flag -{name} needs a value"))
            };
            match name {
                "namespace" => parsed.namespace = value()?,
                "id" => parsed.id = value()?,
                "address" => parsed.address = value()?,
                "publish-binary" => parsed.publish_binary = value()?,
                "bundle" => parsed.bundle = PathBuf::from(value()?),
                "debug" => parsed.debug = inline.as_deref() != Some("false"),
                "v" | "version" => parsed.command = Command::Version,
                "info" => parsed.command = Command::Info,
                _ => return Err(format!("Unknown flag -{name}").into()),
            }
        }
        if matches!(parsed.command, Command::Version | Command::Info) {
            return Ok(parsed);
        }
        // For `start` the identity may be on stdin instead.
        if parsed.command != Command::Start {
            parsed.check_identity()?;
        }
        if parsed.bundle.as_os_str().is_empty() {
            // containerd runs `start` in the bundle and does not name it.
            parsed.bundle = std::env::current_dir()?;
        }
        Ok(parsed)
    }

    /// Whether it is known whose shim this is.
    ///
    /// # Errors
    /// The flag that is missing.
    pub(crate) fn check_identity(&self) -> Result<(), BoxError> {
        for (name, value) in [("namespace", &self.namespace), ("id", &self.id)] {
            if value.is_empty() {
                return Err(format!("Flag -{name} is missing").into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, BoxError> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn containerds_line_is_understood() {
        let args = parse(
            "-namespace default -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id c1 -debug start",
        )
        .unwrap();
        assert_eq!(args.command, Command::Start);
        assert_eq!(args.namespace, "default");
        assert_eq!(args.id, "c1");
        assert_eq!(args.address, "/run/containerd/containerd.sock");
        assert_eq!(args.publish_binary, "/usr/bin/containerd");
        assert_eq!(args.bundle, std::env::current_dir().unwrap());
        assert!(args.debug);
    }

    #[test]
    fn two_dashes_and_inline_values_are_gos_habit_too() {
        let args = parse("--namespace=k8s.io --id=c1 --bundle=/b --debug=false delete").unwrap();
        assert_eq!(args.command, Command::Delete);
        assert_eq!(args.namespace, "k8s.io");
        assert_eq!(args.bundle, PathBuf::from("/b"));
        assert!(!args.debug);
    }

    #[test]
    fn what_is_missing_or_unknown_is_named() {
        for (line, named) in [
            ("-namespace default delete", "-id"),
            ("-id c1 delete", "-namespace"),
            ("-id c1", "-namespace"),
            ("-namespace n -id c1 stop", "\"stop\""),
            ("-namespace n -id c1 -color start", "-color"),
            ("-id", "-id"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(named), "{line}: {error}");
        }
        assert_eq!(parse("-v").unwrap().command, Command::Version);
    }
}
