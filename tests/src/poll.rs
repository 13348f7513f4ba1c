//! Waiting for a condition, with a deadline.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const PAUSE: Duration = Duration::from_millis(10);

/// Calls `check` until it yields a value; fails, naming `what`, when `within` has passed.
pub fn until<T>(what: &str, within: Duration, mut check: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = check() {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("not within {within:?}: {what}");
        }
        pause(PAUSE);
    }
}

/// Waits for a condition that is true or not.
pub fn until_true(what: &str, within: Duration, mut check: impl FnMut() -> bool) -> Result<()> {
    until(what, within, || check().then_some(()))
}

#[expect(clippy::disallowed_methods, reason = "the one place that polls")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}
