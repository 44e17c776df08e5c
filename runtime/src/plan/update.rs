//! New limits for a container that runs, as far as its machine allows.

use oci_spec::runtime::LinuxResources;

use super::guest_spec::resources;
use super::{Error, LeftOut, machine};

/// The machine a container has got; it does not grow or shrink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineSize {
    /// Bytes of memory.
    pub memory: u64,
    /// How much of that the guest's kernel and agent need.
    pub overhead: u64,
    /// The least that a balloon leaves.
    pub least: u64,
}

/// What new limits come to.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// For the guest's cgroup of the container.
    pub guest: LinuxResources,
    /// The host's processors the machine may run on from now on, as a cpuset list.
    pub cpuset: Option<String>,
    /// Bytes of the machine's memory that nobody in it may use any more; `None` leaves that as it is.
    pub balloon: Option<u64>,
    /// What was left out, and why that is harmless.
    pub left_out: Vec<LeftOut>,
}

/// Decides what new limits mean for a container in a machine of this size.
///
/// # Errors
/// A limit that no machine enforces, or more memory than this one has. A CPU quota above the
/// machine's processors is taken, as runc takes one above the host's: they are the limit then.
pub fn update(source: &LinuxResources, machine: &MachineSize) -> Result<Update, Error> {
    let mut left_out = Vec::new();
    let mut guest = resources::build(source, &mut left_out)?;
    // Devices are a matter of creation; runc ignores them here as well.
    guest.set_devices(None);
    let limit = source.memory().as_ref().and_then(|memory| memory.limit());
    let balloon = match limit.filter(|limit| *limit != 0).map(u64::try_from) {
        None => None,
        // No limit.
        Some(Err(_)) => Some(0),
        Some(Ok(limit)) if limit > machine.memory => {
            return Err(Error::MemoryAboveMachine {
                limit,
                machine: machine.memory,
            });
        }
        Some(Ok(limit)) => {
            let needed = limit.saturating_add(machine.overhead).max(machine.least);
            Some(machine.memory.saturating_sub(needed))
        }
    };
    let cpuset = source.cpu().as_ref().and_then(|cpu| cpu.cpus().clone());
    let cpuset = cpuset.filter(|set| !set.is_empty());
    if let Some(set) = &cpuset {
        machine::check_cpuset(set)?;
    }
    Ok(Update {
        guest,
        cpuset,
        balloon,
        left_out,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const MACHINE: MachineSize = MachineSize {
        memory: 512 * MIB,
        overhead: 96 * MIB,
        least: 64 * MIB,
    };

    fn plan(json: &str) -> Result<Update, Error> {
        update(&serde_json::from_str(json).unwrap(), &MACHINE)
    }

    #[test]
    fn less_memory_goes_back_to_the_host() {
        let balloon = |limit: i64| {
            plan(&format!(r#"{{"memory":{{"limit":{limit}}}}}"#))
                .unwrap()
                .balloon
        };
        assert_eq!(balloon(128 << 20), Some((512 - 128 - 96) * MIB));
        // What the guest itself needs stays.
        assert_eq!(balloon(4096), Some((512 - 96) * MIB - 4096));
        assert_eq!(balloon(512 << 20), Some(0));
        assert_eq!(balloon(-1), Some(0));
        assert_eq!(balloon(0), None);
        assert_eq!(plan("{}").unwrap().balloon, None);
    }

    #[test]
    fn a_machine_does_not_grow() {
        let error = plan(r#"{"memory":{"limit":1073741824}}"#)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("1073741824") && error.contains("536870912"),
            "{error}"
        );
        // More processors than it has are no error: it is what runc does.
        let guest = plan(r#"{"cpu":{"quota":800000,"period":100000}}"#)
            .unwrap()
            .guest;
        assert_eq!(guest.cpu().as_ref().unwrap().quota(), Some(800_000));
    }

    #[test]
    fn processors_are_the_hosts() {
        let update = plan(r#"{"cpu":{"cpus":"0-1","mems":"","shares":512}}"#).unwrap();
        assert_eq!(update.cpuset.as_deref(), Some("0-1"));
        assert_eq!(update.guest.cpu().as_ref().unwrap().cpus(), &None);
        assert!(plan(r#"{"cpu":{"cpus":"0-x"}}"#).is_err());
        assert_eq!(plan(r#"{"cpu":{"cpus":""}}"#).unwrap().cpuset, None);
        let devices = plan(r#"{"devices":[{"allow":true,"access":"rwm"}]}"#).unwrap();
        assert_eq!(devices.guest.devices(), &None);
    }
}
