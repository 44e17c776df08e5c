//! Programs to run on the host around the container's life (OCI runtime spec, config.md, "POSIX-platform
//! Hooks").

use oci_spec::runtime::{Hook, Spec};
use serde::Serialize;

use super::{Error, refuse, some};

/// Those of one container, in the order in which they run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Hooks {
    /// With the machine there, and the container not yet made.
    pub prestart: Vec<Hook>,
    /// After those.
    pub create_runtime: Vec<Hook>,
    /// With the program running.
    pub poststart: Vec<Hook>,
    /// With everything gone.
    pub poststop: Vec<Hook>,
}

pub(super) fn build(spec: &Spec) -> Result<Hooks, Error> {
    let Some(source) = spec.hooks() else {
        return Ok(Hooks::default());
    };
    let inside = "it runs in the container's namespaces, which are the guest's, with a program of \
                  the host's";
    refuse(
        some(source.create_container()),
        "hooks.createContainer",
        inside,
    )?;
    refuse(
        some(source.start_container()),
        "hooks.startContainer",
        inside,
    )?;
    #[allow(deprecated, reason = "what old clients send still runs")]
    let prestart = source.prestart();
    Ok(Hooks {
        prestart: checked("hooks.prestart", prestart)?,
        create_runtime: checked("hooks.createRuntime", source.create_runtime())?,
        poststart: checked("hooks.poststart", source.poststart())?,
        poststop: checked("hooks.poststop", source.poststop())?,
    })
}

fn checked(point: &str, hooks: &Option<Vec<Hook>>) -> Result<Vec<Hook>, Error> {
    let hooks = hooks.clone().unwrap_or_default();
    for (index, hook) in hooks.iter().enumerate() {
        if !hook.path().is_absolute() {
            return Err(Error::Invalid {
                key: format!("{point}[{index}].path"),
                value: hook.path().display().to_string(),
                expected: "an absolute path",
            });
        }
        if let Some(timeout) = hook.timeout().filter(|timeout| *timeout <= 0) {
            return Err(Error::Invalid {
                key: format!("{point}[{index}].timeout"),
                value: timeout.to_string(),
                expected: "a number of seconds above 0",
            });
        }
    }
    Ok(hooks)
}
