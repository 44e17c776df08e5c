//! Kernel parameters of the network, which here belong to the machine.
//!
//! The container shares the machine's network namespace, for which libcontainer sets none.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use crate::error::Error;

/// Takes the network's parameters out of `all` and sets them.
pub(crate) fn set_network(all: &mut HashMap<String, String>) -> Result<(), Error> {
    let is_network = |name: &str| name.starts_with("net.") || name.starts_with("net/");
    let network: Vec<_> = all.extract_if(|name, _| is_network(name)).collect();
    for (name, value) in network {
        let name = name.replace('.', "/");
        if name.split('/').any(|part| part.is_empty() || part == "..") {
            return Err(Error::invalid(
                "sysctl",
                format!("{name:?} is no parameter's name"),
            ));
        }
        let path = Path::new("/proc/sys").join(name);
        fs::write(&path, value).map_err(Error::file("write", path))?;
    }
    Ok(())
}
