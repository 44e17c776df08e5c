//! The walls around a machine's process: one is started and says which it lacks.

use supermachine_vmm::control::{SpawnConfig, VmHandle};
use supermachine_vmm::jail::{Layer, Missing, Policy, Seccomp};

use super::Line;
use super::host::chain;
use crate::config::Resolved;

/// A line for each layer.
pub(super) fn lines(config: &Resolved) -> Vec<Line> {
    let spawn = SpawnConfig {
        jail: Policy {
            allow_missing: Layer::ALL.to_vec(),
            ..config.jail.policy()
        },
        exe: config.vm.program.0.clone(),
        ..SpawnConfig::new("check")
    };
    match VmHandle::spawn(spawn, Box::new(|_| {})) {
        Ok(process) => {
            let mut lines = judge(process.missing_layers(), &config.jail.allow_missing.0);
            if config.jail.seccomp.0 != Seccomp::Enforce {
                lines.retain(|line| line.name != name(Layer::Seccomp));
                lines.push(Line::warn(
                    name(Layer::Seccomp),
                    format!(
                        "not enforced: [jail] seccomp is \"{}\"",
                        config.jail.seccomp.0.as_str()
                    ),
                    "set it to \"enforce\" to end a process that makes a forbidden system call",
                ));
            }
            lines
        }
        Err(error) => vec![Line::fail(
            "jail",
            format!("a machine's process does not start: {}", chain(&error)),
            "look at what is named",
        )],
    }
}

/// What `missing` means where `allowed` may be.
pub(super) fn judge(missing: &[Missing], allowed: &[Layer]) -> Vec<Line> {
    let line = |layer: Layer| {
        let name = name(layer);
        let Some(missing) = missing.iter().find(|missing| missing.layer == layer) else {
            return Line::ok(name, what(layer));
        };
        let found = format!("absent: {}", missing.reason);
        if allowed.contains(&layer) {
            Line::warn(name, found, "machines start without; the other layers hold")
        } else {
            Line::fail(
                name,
                found,
                format!("let the host have it, or name \"{layer}\" in [jail] allow_missing"),
            )
        }
    };
    Layer::ALL.into_iter().map(line).collect()
}

fn name(layer: Layer) -> &'static str {
    match layer {
        Layer::Ids => "jail: ids",
        Layer::UserNamespace => "jail: user",
        Layer::Pid => "jail: pid",
        Layer::Root => "jail: root",
        Layer::Network => "jail: net",
        Layer::Ipc => "jail: ipc",
        Layer::Landlock => "jail: rules",
        Layer::Seccomp => "jail: calls",
    }
}

fn what(layer: Layer) -> &'static str {
    match layer {
        Layer::Ids => "each machine's process has user and group ids of its own",
        Layer::UserNamespace => "a user namespace of its own",
        Layer::Pid => "a pid namespace of its own",
        Layer::Root => "a mount namespace with an empty root",
        Layer::Network => "a network namespace of its own",
        Layer::Ipc => "ipc, uts and cgroup namespaces of its own",
        Layer::Landlock => "landlock forbids it files and sockets",
        Layer::Seccomp => "seccomp leaves each thread the system calls of its kind",
    }
}
