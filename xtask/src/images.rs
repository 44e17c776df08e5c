//! placeholder
use anyhow::Result;
pub(crate) fn ensure() -> Result<std::path::PathBuf> { anyhow::bail!("not yet") }
