//! CPU time and memory, from /proc and the lab's cgroup.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// USER_HZ: what /proc counts in, whatever the kernel's own clock; see proc_pid_stat(5).
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU time of a process so far, its threads' and what the kernel did for them.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid} is gone"))?;
    let (_, after_command) = stat.rsplit_once(") ").context("/proc/PID/stat")?;
    // utime and stime, fields 14 and 15; the command is the second.
    let ticks = after_command.split(' ').skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / TICKS_PER_SECOND)
}

/// Resident memory of a process, in KiB.
pub fn resident_kib(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// The machine's CPU time at one moment, and one cgroup's part of it.
#[derive(Clone, Debug)]
pub struct Machine {
    all: f64,
    busy: f64,
    cgroup: f64,
}

impl Machine {
    /// As it is.
    pub fn now(cgroup: &Path) -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat")?;
        let cpu = stat.lines().next().and_then(|line| line.strip_prefix("cpu ")).context("/proc/stat")?;
        let ticks = cpu.split_whitespace().take(8).map(str::parse::<f64>).collect::<Result<Vec<_>, _>>()?;
        let [user, nice, system, idle, iowait, irq, softirq, steal] = ticks[..] else { anyhow::bail!("/proc/stat") };
        let busy = user + nice + system + irq + softirq + steal;
        let file: PathBuf = cgroup.join("cpu.stat");
        let stat = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let usage = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("no usage_usec")?;
        let cgroup = usage.parse::<f64>()? / 1e6 * TICKS_PER_SECOND;
        Ok(Self { all: busy + idle + iowait, busy, cgroup })
    }

    /// The part of the machine, between 0 and 1, that was busy with something else than the cgroup since then.
    pub fn others_since(&self, before: &Self) -> f64 {
        let others = (self.busy - before.busy) - (self.cgroup - before.cgroup);
        (others / (self.all - before.all).max(1.0)).max(0.0)
    }
}
