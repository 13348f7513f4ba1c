//! The numbers, as they are written to the file.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use sealane_tests::report::Sample;
use serde::Serialize;

/// Everything measured.
#[derive(Debug, Serialize)]
pub struct Results {
    /// Seconds since 1970.
    pub begun: u64,
    /// The kernel's release.
    pub kernel: String,
    /// The processor.
    pub cpu: String,
    /// How many of them.
    pub cpus: usize,
    /// Processes that wanted to run, on average over the minute before.
    pub load_before: f64,
    /// Length of a run.
    pub seconds: f64,
    /// Runs of each.
    pub repeats: usize,
    /// In the order of their time.
    pub runs: Vec<Run>,
    /// One for each subject.
    pub memory: Vec<Memory>,
}

/// One run.
#[derive(Debug, Serialize)]
pub struct Run {
    /// Whose.
    pub subject: &'static str,
    /// Under what.
    pub workload: &'static str,
    /// What the clients saw.
    #[serde(flatten)]
    pub sample: Sample,
    /// Both proxies' CPU time.
    pub proxies_cpu_seconds: f64,
    /// The part of the machine, between 0 and 1, that was busy with something else.
    pub others: f64,
}

/// Resident memory, KiB, each proxy, client's side first.
#[derive(Debug, Serialize)]
pub struct Memory {
    /// Whose.
    pub subject: &'static str,
    /// After one connection.
    pub at_start: Vec<u64>,
    /// After all.
    pub at_end: Vec<u64>,
}

impl Results {
    /// Nothing measured yet.
    pub fn new(seconds: f64, repeats: usize) -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let load = read("/proc/loadavg").split(' ').next().and_then(|load| load.parse().ok());
        let cpu = read("/proc/cpuinfo").lines().find_map(|line| Some(line.strip_prefix("model name")?.to_owned()));
        Self {
            begun: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: cpu.unwrap_or_default().trim_start_matches(['\t', ' ', ':']).to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            load_before: load.unwrap_or_default(),
            seconds,
            repeats,
            runs: Vec::new(),
            memory: Vec::new(),
        }
    }
}
