//! Landlock: a rule book of the kernel's in which nothing is allowed (landlock(7)).

use std::io;

use ::landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus,
    Scope,
};

use super::{Refused, step};

/// The newest this was written for. An older kernel enforces what it knows: files since 5.13, TCP
/// since 6.7, signals and abstract sockets since 6.12.
const NEWEST: ABI = ABI::V6;

/// Forbids the process everything that Landlock can forbid. What is open stays usable.
pub(super) fn forbid_all() -> Result<(), Refused> {
    let asked = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .and_then(::landlock::RulesetCreated::restrict_self);
    let status = asked.map_err(|error| step("landlock")(io::Error::other(error)))?;
    if status.ruleset == RulesetStatus::NotEnforced {
        let none = io::Error::new(io::ErrorKind::Unsupported, "the kernel has none");
        return Err(step("landlock")(none));
    }
    Ok(())
}
