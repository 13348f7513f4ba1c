//! The virtual machine's whole file system: the tests, the programs that they run, and an init that runs them.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::kernel::Kernel;
use crate::host::{run, target, which};

/// A line of the console that begins with it (see init.sh) ends with the tests' exit code.
pub const END: &str = "the tests have ended: ";

/// In an order that they can be loaded in. Debian builds them as modules; everything else that the tests need is built in.
const MODULES: [&str; 3] = ["drivers/net/veth", "net/ipv4/inet_diag", "net/ipv4/tcp_diag"];

const INIT: &str = include_str!("init.sh");

/// What we built.
pub struct Programs {
    /// The test harness.
    pub test: PathBuf,
    /// `sealane`.
    pub agent: PathBuf,
    /// `testpod`.
    pub testpod: PathBuf,
}

/// Writes the archive for a kernel; yields its path.
pub fn build(programs: &Programs, kernel: &Kernel) -> Result<PathBuf> {
    let dir = target()?.join("vm/root");
    let _ = fs::remove_dir_all(&dir);
    for mount_point in ["bin", "dev", "modules", "proc", "run", "sys", "tests", "tmp"] {
        fs::create_dir_all(dir.join(mount_point))?;
    }
    for (program, path) in
        [(&programs.test, "tests/vm"), (&programs.agent, "tests/sealane"), (&programs.testpod, "tests/testpod")]
    {
        add(&dir, program, path)?;
    }
    for (program, path) in [("busybox", "busybox"), ("ip", "bin/ip"), ("nsenter", "bin/nsenter")] {
        add(&dir, &which(program).with_context(|| format!("{program} is missing"))?, path)?;
    }
    symlink("../busybox", dir.join("bin/sh"))?;
    for (place, module) in MODULES.iter().enumerate() {
        let file = dir.join(format!("modules/{place}.ko"));
        unpack(&kernel.modules.join("kernel"), module, &file).with_context(|| format!("the module {module}"))?;
    }
    let init = dir.join("init");
    fs::write(&init, INIT)?;
    fs::set_permissions(&init, PermissionsExt::from_mode(0o755))?;
    archive(&dir)
}

/// Copies a program to `path` below `dir`, and the libraries that it needs to where it looks for them.
fn add(dir: &Path, program: &Path, path: &str) -> Result<()> {
    copy(program, &dir.join(path))?;
    // Of a static program ldd says so, and fails.
    let listed = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    for library in listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/'))) {
        copy(Path::new(library), &dir.join(library.trim_start_matches('/')))?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().unwrap_or(to))?;
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

/// Kernels before 6.12 come with plain modules, later ones with compressed ones.
fn unpack(modules: &Path, module: &str, to: &Path) -> Result<()> {
    let plain = modules.join(format!("{module}.ko"));
    if plain.exists() {
        return copy(&plain, to);
    }
    let packed = File::open(modules.join(format!("{module}.ko.xz")))?;
    run(Command::new("busybox").args(["unxz", "-c"]).stdin(packed).stdout(File::create(to)?))
}

fn archive(dir: &Path) -> Result<PathBuf> {
    let path = dir.with_extension("cpio");
    let mut find = Command::new("find").arg(".").current_dir(dir).stdout(Stdio::piped()).spawn().context("find")?;
    let names = find.stdout.take().context("find has no output")?;
    run(Command::new("cpio")
        .args(["--quiet", "--create", "--format=newc"])
        .current_dir(dir)
        .stdin(names)
        .stdout(File::create(&path)?))?;
    ensure!(find.wait()?.success(), "find failed");
    Ok(path)
}
