//! `cargo xtask`: builds, tests and demonstrates Sealane. Thin: what takes thought is in the crates.

#![forbid(unsafe_code)]

mod bench;
mod build;
mod demo;
mod ebpf;
mod host;
mod test;

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
    /// Build the kernel programs, then the agent: target/<profile>/sealane
    Build {
        /// With optimisations
        #[arg(long)]
        release: bool,
    },
    /// Run the unit tests, then the privileged tests (as root) that make nodes and pods
    Test {
        /// Only tests whose name contains it
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
        Command::Demo(args) => demo::run(&args),
        Command::Bench(args) => bench::run(&args),
    }
}
