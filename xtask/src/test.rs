//! `cargo xtask test`: the unit tier, then the privileged tier. The last line is `N passed, N failed`.

use std::io::{BufRead, BufReader, Write};
use std::ops::AddAssign;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, ensure};

use crate::host::{cargo, is_root, need, say};
use crate::{build, ebpf};

/// Labs at once: each starts two agents, and timing suffers where they crowd the machine.
const LABS: &str = "--test-threads=2";

/// Runs both tiers, also where the first fails, and fails where anything did or the second ran nothing.
pub fn run(filter: Option<&str>) -> Result<()> {
    ensure!(is_root(), "the privileged tests need root: they make network namespaces, cgroups and eBPF programs");
    need(&[("ip", "iproute2"), ("nsenter", "util-linux")])?;
    ebpf::build()?;
    // Optimised: the privileged tier carries gibibytes and thousands of handshakes.
    build::agent(true, &["sealane"])?;

    say("unit tests");
    let crates: &[&str] = &["test", "--workspace", "--exclude", "sealane-ebpf", "--exclude", "sealane-tests"];
    let fixtures: &[&str] = &["test", "--package", "sealane-tests", "--lib", "--bins"];
    let mut unit = tier(crates, &[], filter)?;
    unit += tier(fixtures, &[], filter)?;

    say("privileged tests");
    let privileged = tier(&["test", "--release", "--package", "sealane-tests", "--test", "*"], &[LABS], filter)?;
    if filter.is_none() {
        ensure!(privileged.passed + privileged.failed > 0, "the privileged tier ran no test");
    }

    let mut all = unit;
    all += privileged;
    ensure!(all.passed + all.failed > 0, "no test has run");
    if all.ignored > 0 {
        println!("{} ignored", all.ignored);
    }
    println!("{} passed, {} failed", all.passed, all.failed);
    if all.failed > 0 || all.broken {
        std::process::exit(1);
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u32,
    failed: u32,
    ignored: u32,
    /// Cargo failed, although perhaps no test did: something does not build, or a test process died.
    broken: bool,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.broken |= other.broken;
    }
}

fn tier(command: &[&str], harness: &[&str], filter: Option<&str>) -> Result<Tally> {
    let mut test = cargo();
    test.args(command).arg("--no-fail-fast").arg("--").args(harness).args(filter);
    let (status, mut tally) = count(&mut test)?;
    tally.broken = !status.success();
    if tally.broken && tally.failed == 0 {
        // A test binary that does not build or dies by a signal reports no failed test of its own.
        tally.failed = 1;
    }
    Ok(tally)
}

/// Passes the output on and adds up the harness's result lines.
fn count(test: &mut Command) -> Result<(ExitStatus, Tally)> {
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
fn result(line: &str) -> Option<Tally> {
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
}
