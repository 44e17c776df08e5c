//! Landlock: a rule book of the kernel's in which nothing is allowed (landlock(7)).

use std::io;
use std::os::fd::BorrowedFd;

use ::landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::{Refused, step};

/// The newest this was written for. An older kernel enforces what it knows: files since 5.13, TCP
/// since 6.7, signals and abstract sockets since 6.12.
const NEWEST: ABI = ABI::V6;

/// Forbids the process everything that Landlock can forbid, but for work beneath some directories.
/// What is open stays usable.
pub(super) fn forbid_all_but(beneath: &[BorrowedFd<'_>]) -> Result<(), Refused> {
    let everything = AccessFs::from_all(NEWEST) & !AccessFs::Execute;
    // Its first version (5.13) lets nobody move a file to another directory, whatever the rules.
    let least = match beneath {
        [] => AccessFs::from_all(ABI::V1),
        _ => AccessFs::Refer.into(),
    };
    let asked =
        Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(least)
            .map(|ruleset| ruleset.set_compatibility(CompatLevel::BestEffort))
            .and_then(|ruleset| ruleset.handle_access(AccessFs::from_all(NEWEST)))
            .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(NEWEST)))
            .and_then(|ruleset| ruleset.scope(Scope::from_all(NEWEST)))
            .and_then(Ruleset::create)
            .and_then(|ruleset| {
                let rules = beneath.iter();
                ruleset.add_rules(rules.map(|directory| {
                    Ok::<_, RulesetError>(PathBeneath::new(directory, everything))
                }))
            })
            .and_then(::landlock::RulesetCreated::restrict_self);
    let status = asked.map_err(|error| step("landlock")(io::Error::other(error)))?;
    if status.ruleset == RulesetStatus::NotEnforced {
        let none = io::Error::new(io::ErrorKind::Unsupported, "the kernel has none");
        return Err(step("landlock")(none));
    }
    Ok(())
}
