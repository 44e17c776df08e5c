//! A process's privileges just before its program runs: capabilities and the filter of system calls.
//!
//! libcontainer leaves them to us: it drops one set of capabilities after the other, so that some
//! combinations fail, and installs filters too late or not at all.

use std::io;

use libcontainer::capabilities::CapabilityExt;
use libcontainer::oci_spec::runtime::{Capabilities as Names, LinuxCapabilities};

use super::seccomp::Filter;
use crate::sys::privilege::{self, Capabilities};

const CAP_SYS_ADMIN: u64 = 1 << 21;

/// What a process is to be left with.
#[derive(Debug, Clone)]
pub(crate) struct Privileges {
    bounding: u64,
    ambient: u64,
    sets: Capabilities,
    no_new: bool,
    filter: Option<Filter>,
}

impl Privileges {
    /// Of a process with these capabilities; none where a set isn't told.
    pub(crate) fn new(
        capabilities: &LinuxCapabilities,
        no_new: bool,
        filter: Option<Filter>,
    ) -> Self {
        let bits = |names: &Option<Names>| {
            let names = names.iter().flatten();
            names.fold(0, |bits, name| bits | 1_u64 << name.to_cap().index())
        };
        Self {
            bounding: bits(capabilities.bounding()),
            ambient: bits(capabilities.ambient()),
            sets: Capabilities {
                effective: bits(capabilities.effective()),
                permitted: bits(capabilities.permitted()),
                inheritable: bits(capabilities.inheritable()),
            },
            no_new,
            filter,
        }
    }

    /// Gives up what is not kept. What installing the filter takes is laid aside until then.
    pub(crate) fn drop_capabilities(&self) -> io::Result<()> {
        let mut known = 0;
        for capability in 0..64 {
            // From the first number that the kernel doesn't know, there are none.
            let Ok(bound) = privilege::is_bound(capability) else {
                break;
            };
            known |= 1 << capability;
            if bound && self.bounding & 1 << capability == 0 {
                privilege::unbind(capability)?;
            }
        }
        let sets = Capabilities {
            effective: self.sets.effective & known,
            permitted: self.sets.permitted & known | self.laid_aside(),
            inheritable: self.sets.inheritable & known,
        };
        privilege::clear_ambient()?;
        privilege::set_capabilities(sets)?;
        for capability in (0..64).filter(|capability| self.ambient & known & 1 << capability != 0) {
            // Only what is permitted and inheritable can be; runc lets the others go as well.
            let _ = privilege::raise_ambient(capability);
        }
        Ok(())
    }

    /// CAP_SYS_ADMIN, if there is a filter and nothing else allows a process to install it.
    fn laid_aside(&self) -> u64 {
        if self.filter.is_some() && !self.no_new {
            CAP_SYS_ADMIN
        } else {
            0
        }
    }

    /// Installs the filter, which may forbid whatever comes after.
    pub(crate) fn filter_calls(&self) -> io::Result<()> {
        let Some(filter) = &self.filter else {
            return Ok(());
        };
        let aside = self.laid_aside();
        if aside == 0 {
            return filter.install();
        }
        let kept = self.sets;
        privilege::set_capabilities(Capabilities {
            effective: kept.effective | aside,
            permitted: kept.permitted | aside,
            ..kept
        })?;
        filter.install()?;
        privilege::set_capabilities(kept)
    }
}
