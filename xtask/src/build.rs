//! `cargo xtask build`.

use std::path::PathBuf;

use anyhow::Result;

use crate::ebpf;
use crate::host::{self, cargo, say, target};

/// Builds the agent and says where it lies.
pub fn run(release: bool) -> Result<()> {
    ebpf::build()?;
    let binary = agent(release, &["sealane"])?.join("sealane");
    say(&format!("built {}", binary.display()));
    Ok(())
}

/// Builds these packages' binaries in one go; yields their directory.
pub fn agent(release: bool, packages: &[&str]) -> Result<PathBuf> {
    say(&format!("building {}", packages.join(" and ")));
    let mut build = cargo();
    build.args(["build", "--bins"]).args(packages.iter().flat_map(|package| ["--package", package]));
    if release {
        build.arg("--release");
    }
    host::run(&mut build)?;
    Ok(target()?.join(if release { "release" } else { "debug" }))
}
