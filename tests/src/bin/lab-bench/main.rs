//! The bench: raw TCP, a pair of Envoy sidecars and a pair of Sealane agents, each between two pods on two nodes, under the
//! same load in turns. `cargo xtask bench` builds and runs it.

#![forbid(unsafe_code)]

mod envoy;
mod results;
mod site;
mod subject;
mod table;
mod usage;
mod workload;

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;

use crate::results::{Memory, Results, Run};
use crate::subject::Subject;
use crate::usage::Machine;
use crate::workload::Workload;

/// A run before the counted ones: caches, pools and allocators are then as they stay.
const WARM_UP: f64 = 0.3;

#[derive(Parser)]
struct Args {
    /// Fewer and shorter runs, and no 8 streams
    #[arg(long)]
    quick: bool,
    /// One subject alone: raw, envoy or sealane
    #[arg(long)]
    only: Option<String>,
    /// Loads whose name begins so: bulk, rr, crr
    #[arg(long, default_value = "")]
    load: String,
    /// Envoy's binary
    #[arg(long)]
    envoy: PathBuf,
    /// Where the numbers go, as JSON
    #[arg(long)]
    out: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (repeats, seconds) = if args.quick { (2, 2.0) } else { (3, 4.0) };
    let wanted = |workload: &Workload| (!args.quick || workload.quick) && workload.name.starts_with(&args.load);
    let workloads: Vec<_> = Workload::ALL.into_iter().filter(wanted).collect();

    eprintln!("==> nodes, pods and proxies");
    let subjects = subjects(&args)?;
    for subject in &subjects {
        eprintln!("    {}: {} between the nodes", subject.name, subject.on_the_wire()?);
    }
    let at_start = subjects.iter().map(Subject::memory).collect::<Result<Vec<_>>>()?;
    let mut results = Results::new(seconds, repeats);
    for workload in &workloads {
        for subject in &subjects {
            subject.load(workload, WARM_UP)?;
        }
    }
    for repeat in 1..=repeats {
        for workload in &workloads {
            eprint!("==> {repeat}/{repeats} {}:", workload.name);
            for subject in &subjects {
                let run = measure(subject, workload, seconds)?;
                eprint!("  {} {}", subject.name, table::headline(&run));
                std::io::stderr().flush()?;
                results.runs.push(run);
            }
            eprintln!();
        }
    }
    for (subject, at_start) in subjects.iter().zip(at_start) {
        results.memory.push(Memory { subject: subject.name, at_start, at_end: subject.memory()? });
    }

    println!("{}", table::render(&results, &workloads));
    if let Some(dir) = args.out.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(&args.out, serde_json::to_string_pretty(&results)?)?;
    println!("The raw numbers: {}", args.out.display());
    Ok(())
}

fn subjects(args: &Args) -> Result<Vec<Subject>> {
    let makers: [(&str, &dyn Fn() -> Result<Subject>); 3] =
        [("raw", &Subject::raw), ("envoy", &|| Subject::envoy(&args.envoy)), ("sealane", &Subject::sealane)];
    let wanted = |name: &str| args.only.as_deref().is_none_or(|only| only == name);
    let subjects: Vec<_> =
        makers.iter().filter(|(name, _)| wanted(name)).map(|(_, make)| make()).collect::<Result<_>>()?;
    ensure!(!subjects.is_empty(), "--only takes raw, envoy or sealane");
    Ok(subjects)
}

fn measure(subject: &Subject, workload: &Workload, seconds: f64) -> Result<Run> {
    let (machine, proxies) = (Machine::now(&subject.cgroup())?, subject.cpu_seconds()?);
    let sample = subject.load(workload, seconds)?;
    Ok(Run {
        subject: subject.name,
        workload: workload.name,
        sample,
        proxies_cpu_seconds: subject.cpu_seconds()? - proxies,
        others: Machine::now(&subject.cgroup())?.others_since(&machine),
    })
}
