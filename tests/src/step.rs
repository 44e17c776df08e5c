//! Named, timed steps on a terminal.

use std::time::Instant;

use anyhow::{Context, Result};

/// Says what is done, does it, and says how long it took.
///
/// # Errors
/// Those of `work`, with the step's name.
pub fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    say(&format!("==> {name}"));
    let begin = Instant::now();
    let done = work().with_context(|| format!("step `{name}`"))?;
    say(&format!(
        "    done in {:.1} s\n",
        begin.elapsed().as_secs_f64()
    ));
    Ok(done)
}

/// A line for the person who watches.
#[expect(
    clippy::print_stdout,
    reason = "this is what the demo and the bench are for"
)]
pub fn say(line: &str) {
    println!("{line}");
}
