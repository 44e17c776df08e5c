//! A balloon as data.

use serde::{Deserialize, Serialize};

use super::{BalloonConfig, PAGE};
use crate::devices::virtio::StateError;

/// What a balloon is, beside its queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonState {
    /// What it offered.
    pub offers: BalloonConfig,
    /// Pages asked of it.
    pub target: u32,
    /// Pages the guest says it holds.
    pub actual: u32,
    /// What its driver fills free pages with.
    pub poison: u32,
    /// The pages it does hold: first guest page and count of each run.
    pub inside: Vec<(u64, u64)>,
}

impl BalloonState {
    /// Whether a balloon of at most `limit` bytes can be this. What of `inside` is no RAM is passed
    /// over, as it is when a driver names it.
    pub(super) fn check(&self, limit: u64) -> Result<(), StateError> {
        if u64::from(self.target) * PAGE > limit {
            let most = format!("at most {}", limit / PAGE);
            return Err(StateError::value(
                "Balloon target in pages",
                self.target,
                most,
            ));
        }
        // Whoever puts them in does a step for each page.
        let mut behind = 0;
        for &(first, count) in &self.inside {
            let end = first
                .checked_add(count)
                .filter(|end| count > 0 && first >= behind && *end <= 1 << 32);
            let Some(end) = end else {
                let run = format!("{first:#x}+{count:#x}");
                return Err(StateError::value(
                    "Run of balloon pages",
                    run,
                    "one behind the other",
                ));
            };
            behind = end;
        }
        Ok(())
    }
}
