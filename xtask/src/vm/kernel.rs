//! Debian's cloud kernels, as packages, unpacked below target/vm.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::host::{apt, output, run, say, target};

/// A kernel that can be booted.
pub struct Kernel {
    /// As in `6.1.0-50-cloud-amd64`.
    pub release: String,
    /// For QEMU's -kernel.
    pub image: PathBuf,
    /// Where its modules lie.
    pub modules: PathBuf,
}

/// The newest kernel of a series such as `6.1`; downloaded once.
pub fn fetch(series: &str) -> Result<Kernel> {
    let mut found = newest(series)?;
    if found.is_none() {
        run(&mut apt(&["update"]))?;
        found = newest(series)?;
    }
    let package = found.context("no package linux-image-*-cloud-amd64 of this series; Debian has them")?;
    let dir = target()?.join("vm").join(&package);
    if !dir.exists() {
        say(&format!("downloading {package}"));
        download(&package, &dir).or_else(|_| {
            // The lists may be older than the mirror.
            run(&mut apt(&["update"]))?;
            download(&package, &dir)
        })?;
    }
    let release = package.trim_start_matches(PREFIX).to_owned();
    let image = dir.join("boot").join(format!("vmlinuz-{release}"));
    ensure!(image.exists(), "no {}", image.display());
    let modules = ["lib/modules", "usr/lib/modules"].map(|modules| dir.join(modules).join(&release));
    let modules = modules.into_iter().find(|modules| modules.exists()).context("the package has no modules")?;
    Ok(Kernel { release, image, modules })
}

const PREFIX: &str = "linux-image-";

fn newest(series: &str) -> Result<Option<String>> {
    let pattern = format!("^{PREFIX}{}\\.[0-9].*-cloud-amd64$", series.replace('.', "\\."));
    let found = output(Command::new("apt-cache").args(["search", "--names-only", &pattern]))?;
    let packages = found.lines().filter_map(|line| line.split(' ').next());
    Ok(packages.max_by_key(|package| numbers(package)).map(str::to_owned))
}

/// Versions sort by their numbers: 6.1.0-9 comes before 6.1.0-50.
fn numbers(package: &str) -> Vec<u32> {
    package.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// Whole or not at all: `dir` appears when everything is in it.
fn download(package: &str, dir: &Path) -> Result<()> {
    let part = dir.with_file_name("part");
    let _ = fs::remove_dir_all(&part);
    fs::create_dir_all(&part)?;
    run(apt(&["download", package]).args(["-o", "APT::Sandbox::User=root"]).current_dir(&part))?;
    let archive = fs::read_dir(&part)?.next().context("nothing was downloaded")??.path();
    let unpacked = part.join("unpacked");
    run(Command::new("dpkg").arg("-x").arg(&archive).arg(&unpacked))?;
    fs::rename(unpacked, dir)?;
    Ok(fs::remove_dir_all(part)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_sort_by_their_numbers() {
        let sorted =
            ["6.1.0-9-cloud-amd64", "6.1.0-50-cloud-amd64", "6.12.9-cloud-amd64", "6.12.117+deb12-cloud-amd64"];
        assert!(sorted.is_sorted_by_key(|release| numbers(release)));
    }
}
