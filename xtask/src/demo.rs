//! `cargo xtask demo`.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Result, bail, ensure};
use clap::Args as ClapArgs;

use crate::host::{is_root, need};
use crate::{build, ebpf};

/// What `demo` takes.
#[derive(ClapArgs)]
pub struct Args {
    /// Leave everything up, and say how to look around
    #[arg(long)]
    keep: bool,
    /// Take down what --keep has left
    #[arg(long, conflicts_with = "keep")]
    down: bool,
}

/// Builds what the demo needs and becomes it.
pub fn run(args: &Args) -> Result<()> {
    ensure!(is_root(), "the demo needs root: it makes network namespaces, cgroups and eBPF programs");
    need(&[("ip", "iproute2"), ("nsenter", "util-linux"), ("curl", "curl"), ("nginx", "nginx-light")])?;
    ebpf::build()?;
    let binaries = build::agent(true, &["sealane", "sealane-tests"])?;
    let mut demo = Command::new(binaries.join("lab-demo"));
    if args.keep {
        demo.arg("--keep");
    }
    if args.down {
        demo.arg("--down");
    }
    bail!("cannot run the demo: {}", demo.exec())
}
