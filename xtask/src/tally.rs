//! Counting what Rust's test harness reports.

use std::io::{BufRead, BufReader, Write};
use std::ops::AddAssign;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result};

/// Tests by their end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Passed.
    pub passed: u32,
    /// Failed.
    pub failed: u32,
    /// Ignored.
    pub ignored: u32,
    /// The run failed, although perhaps no test did: something does not build, or a test process died.
    pub broken: bool,
}

impl Tally {
    /// A run that failed has a failed test: a test binary that does not build or dies by a signal reports none of its own.
    pub fn or_broken(mut self, success: bool) -> Self {
        self.broken = !success;
        if self.broken && self.failed == 0 {
            self.failed = 1;
        }
        self
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.broken |= other.broken;
    }
}

/// Runs to the end, passes the output on and adds up the harness's result lines.
pub fn count(test: &mut Command) -> Result<(ExitStatus, Tally)> {
    let mut child = test.stdout(Stdio::piped()).spawn().context("cannot run cargo")?;
    let mut tally = Tally::default();
    for line in BufReader::new(child.stdout.take().context("no stdout")?).lines() {
        let line = line?;
        writeln!(std::io::stdout(), "{line}")?;
        tally += result(&line).unwrap_or_default();
    }
    Ok((child.wait()?, tally))
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; ...`
pub fn result(line: &str) -> Option<Tally> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut tally = Tally::default();
    for (number, word) in counts.split("; ").filter_map(|part| part.split_once(' ')) {
        match (word, number.parse()) {
            ("passed", Ok(n)) => tally.passed = n,
            ("failed", Ok(n)) => tally.failed = n,
            ("ignored", Ok(n)) => tally.ignored = n,
            _ => {}
        }
    }
    Some(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_harness() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.12s";
        assert_eq!(result(line), Some(Tally { passed: 12, failed: 3, ignored: 1, broken: false }));
        assert_eq!(result("test lab::x ... ok"), None);
    }

    #[test]
    fn a_run_that_broke_has_failed() {
        assert_eq!(Tally::default().or_broken(false), Tally { failed: 1, broken: true, ..Tally::default() });
        assert_eq!(Tally { failed: 2, ..Tally::default() }.or_broken(false).failed, 2);
        assert_eq!(Tally::default().or_broken(true), Tally::default());
    }
}
