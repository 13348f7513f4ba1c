//! `cargo xtask test`: the unit tier, the privileged tier, and its part that runs on other kernels. The last line is
//! `N passed, N failed`.

use anyhow::{Result, ensure};

use crate::host::{cargo, is_root, need, say};
use crate::tally::{Tally, count};
use crate::{build, ebpf, vm};

/// Labs at once: each starts two agents, and timing suffers where they crowd the machine.
const LABS: &str = "--test-threads=2";

/// Runs every tier, also where one fails, and fails where anything did or a tier after the first ran nothing.
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

    let emulated = vm::tier(&vm::SERIES, filter).unwrap_or_else(|error| {
        say(&format!("FAILED, not run: {error:#}"));
        Tally::default().or_broken(false)
    });
    if filter.is_none() {
        ensure!(emulated.passed + emulated.failed > 0, "the tier on other kernels ran no test");
    }

    let mut all = unit;
    all += privileged;
    all += emulated;
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

fn tier(command: &[&str], harness: &[&str], filter: Option<&str>) -> Result<Tally> {
    let mut test = cargo();
    test.args(command).arg("--no-fail-fast").arg("--").args(harness).args(filter);
    let (status, tally) = count(&mut test)?;
    Ok(tally.or_broken(status.success()))
}
