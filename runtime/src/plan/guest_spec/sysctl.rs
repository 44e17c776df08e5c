//! Kernel parameters: those that runc allows, which belong to one namespace.

use std::collections::HashMap;

use super::Error;

/// Parameters of the IPC namespace, beside `fs.mqueue.*`.
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Refuses, as runc does, what is not of a namespace, and what `hostname` sets.
pub(super) fn check(parameters: &HashMap<String, String>) -> Result<(), Error> {
    for name in parameters.keys() {
        let dotted = name.replace('/', ".");
        let namespaced = IPC.contains(&dotted.as_str())
            || dotted.starts_with("fs.mqueue.")
            || dotted.starts_with("net.")
            || dotted == "kernel.domainname";
        // The name becomes a path in the guest.
        let plain = dotted.split('.').all(|part| !part.is_empty());
        if !namespaced || !plain {
            return Err(Error::Unsupported {
                key: format!("linux.sysctl {name}"),
                reason: if dotted == "kernel.hostname" {
                    "it conflicts with hostname".to_owned()
                } else {
                    "it is not in a separate kernel namespace".to_owned()
                },
            });
        }
    }
    Ok(())
}
