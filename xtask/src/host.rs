//! The machine: running programs, and installing what is missing where that is ours to do.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::geteuid;

/// Tells what is being done.
pub fn say(what: &str) {
    eprintln!("==> {what}");
}

/// The workspace's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// The cargo that runs us, in the workspace's root.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// Where cargo puts what it builds.
pub fn target() -> Result<PathBuf> {
    let out = output(cargo().args(["metadata", "--format-version", "1", "--no-deps"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&out)?;
    Ok(metadata["target_directory"].as_str().context("cargo metadata names no target directory")?.into())
}

/// Runs to the end; fails where the program does.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", name(command)))?;
    ensure!(status.success(), "{} failed: {status}", name(command));
    Ok(())
}

/// What the program prints; fails where it does.
pub fn output(command: &mut Command) -> Result<String> {
    let out = command.output().with_context(|| format!("cannot run {}", name(command)))?;
    ensure!(out.status.success(), "{} failed: {}", name(command), String::from_utf8_lossy(&out.stderr).trim());
    Ok(String::from_utf8(out.stdout)?)
}

/// True for root.
pub fn is_root() -> bool {
    geteuid().is_root()
}

/// Where a program lies: in PATH, or where system programs and cargo's lie although PATH may not name them.
pub fn which(program: &str) -> Option<PathBuf> {
    search_path().into_iter().map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// PATH with cargo's and the system's directories.
pub fn search_path() -> Vec<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let own = env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect::<Vec<_>>();
    own.into_iter().chain(home.map(|home| home.join("bin"))).chain(["/usr/sbin".into(), "/sbin".into()]).collect()
}

/// Sees to it that each program is there; the second of a pair is the Debian package that has it.
pub fn need(programs: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<_> = programs.iter().filter(|(program, _)| which(program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    if !can_install() {
        let names: Vec<_> = missing.iter().map(|(program, _)| *program).collect();
        bail!(
            "missing: {}; install them (on Debian as root: apt-get install {})",
            names.join(", "),
            packages.join(" ")
        );
    }
    install(&packages)
}

/// True as root on a Debian.
pub fn can_install() -> bool {
    is_root() && Path::new("/usr/bin/apt-get").exists()
}

/// apt-get, quiet and without questions.
pub fn apt(args: &[&str]) -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive").args(["-qq", "-o=Dpkg::Use-Pty=0"]).args(args);
    apt
}

/// Installs Debian packages.
pub fn install(packages: &[&str]) -> Result<()> {
    say(&format!("installing {}", packages.join(", ")));
    run(&mut apt(&["update"]))?;
    run(apt(&["install", "-y", "--no-install-recommends"]).args(packages))
}

fn name(command: &Command) -> String {
    let args = command.get_args().map(OsStr::to_string_lossy);
    [command.get_program().to_string_lossy()].into_iter().chain(args).collect::<Vec<_>>().join(" ")
}
