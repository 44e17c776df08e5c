//! Work whose state is a number and its hash: whether it went on exactly where it was, can be told.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// Bytes of a block on the disk.
pub const BLOCK: usize = 4096;
/// Blocks of the disk that are worked on.
pub const BLOCKS: u64 = 64;
/// The port where the guest answers with its state, after its timer has gone off [`TICKS`] times.
pub const VSOCK_PORT: u32 = 7;
/// How often the timer goes off before an answer.
pub const TICKS: u64 = 5;
/// How long the timer takes each time, at least.
pub const TICK: Duration = Duration::from_millis(10);

/// How far the work has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Of all steps so far.
    pub hash: u64,
    /// Times a timer has gone off meanwhile.
    pub ticks: u64,
    /// The guest's monotonic clock, in microseconds.
    pub clock: u64,
}

impl State {
    /// One step on.
    pub fn advance(&mut self) {
        self.step += 1;
        self.hash = (self.hash.rotate_left(5) ^ self.step).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    /// After so many steps from the beginning.
    pub fn after(steps: u64) -> Self {
        let mut state = Self::default();
        (0..steps).for_each(|_| state.advance());
        state
    }

    /// Whether the hash is that of so many steps.
    ///
    /// # Errors
    /// It is another one.
    pub fn check(&self) -> Result<()> {
        let right = Self::after(self.step).hash;
        ensure!(self.hash == right, "{self} has not the hash {right:016x}");
        Ok(())
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            step,
            hash,
            ticks,
            clock,
        } = self;
        write!(f, "step {step} {hash:016x} {ticks} {clock}")
    }
}

impl FromStr for State {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> Result<Self> {
        let mut words = line.split_whitespace();
        let mut next = || words.next().with_context(|| format!("{line:?}"));
        ensure!(next()? == "step", "no state: {line:?}");
        let step = next()?.parse()?;
        let hash = u64::from_str_radix(next()?, 16)?;
        let ticks = next()?.parse()?;
        let clock = next()?.parse()?;
        Ok(Self {
            step,
            hash,
            ticks,
            clock,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read_back_and_another_hash_is_noticed() {
        let mut state = State::after(3);
        state.ticks = 5;
        state.clock = 7;
        let again: State = state.to_string().parse().unwrap();
        assert_eq!(again, state);
        again.check().unwrap();
        state.hash ^= 1;
        state.check().unwrap_err();
        "step 1".parse::<State>().unwrap_err();
    }
}
