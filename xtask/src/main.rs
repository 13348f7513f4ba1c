//! `cargo xtask`: builds, tests and demonstrates Sealane. Thin: what takes thought is in the crates.

#![forbid(unsafe_code)]

mod bench;
mod build;
mod demo;
mod ebpf;
mod host;
mod tally;
mod test;
mod vm;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the kernel programs, then the agent: target/{debug,release}/sealane
    Build {
        /// With optimisations
        #[arg(long)]
        release: bool,
    },
    /// Run the unit tests, the privileged tests (as root) that make nodes and pods, and those on other kernels
    Test {
        /// Only tests whose name contains it
        filter: Option<String>,
    },
    /// Run the tests of what hangs on the kernel on other kernels, in virtual machines (as root, on Debian)
    Vm {
        /// Series of Debian's cloud kernel, as in 6.1
        #[arg(default_values = vm::SERIES)]
        series: Vec<String>,
        /// Only tests whose name contains it
        #[arg(long)]
        filter: Option<String>,
    },
    /// Two nodes, their agents, a web server and curl: mutual TLS without either of them knowing (as root)
    Demo(demo::Args),
    /// Raw TCP, Envoy sidecars and Sealane under the same load, in turns: throughput, latency, new connections (as root)
    Bench(bench::Args),
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Build { release } => build::run(release),
        Command::Test { filter } => test::run(filter.as_deref()),
        Command::Vm { series, filter } => vm::run(&series, filter.as_deref()),
        Command::Demo(args) => demo::run(&args),
        Command::Bench(args) => bench::run(&args),
    }
}
