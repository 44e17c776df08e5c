//! States as the bytes of a section: postcard's wire format, which has a specification
//! (postcard.jamesmunns.com). Most of a state is what the kernel's structures hold, and those are
//! copied.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes that are no such state, or a state that can't be bytes.
#[derive(Debug, thiserror::Error)]
pub enum StateCodeError {
    /// What the format says.
    #[error(transparent)]
    Format(#[from] postcard::Error),
    /// A state was read, and there is more.
    #[error("{0} bytes more than the state has")]
    Longer(usize),
}

/// A state as it goes into a section.
pub(crate) fn encode(state: &impl Serialize) -> Result<Vec<u8>, StateCodeError> {
    Ok(postcard::to_stdvec(state)?)
}

/// The state that is all of `bytes`, which anybody may have written: no more room is made for it
/// than they fill, but for a first MiB of each list (serde's own limit).
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StateCodeError> {
    match postcard::take_from_bytes(bytes)? {
        (state, []) => Ok(state),
        (_, rest) => Err(StateCodeError::Longer(rest.len())),
    }
}
