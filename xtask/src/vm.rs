//! `cargo xtask vm`: tests/tests/vm.rs on other kernels, each in a virtual machine that has nothing but an initramfs. By
//! emulation (TCG), since not every machine that runs the tests lets its guests use KVM.

mod initramfs;
mod kernel;

use std::env::consts::ARCH;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use self::initramfs::Programs;
use self::kernel::Kernel;
use crate::host::{cargo, is_root, need, output, say};
use crate::tally::{self, Tally};
use crate::{build, ebpf};

/// The kernels of EKS that the machine at hand does not run already.
pub const SERIES: [&str; 2] = ["6.1", "6.12"];

/// From power on to power off; a slow machine takes two minutes.
const LIMIT: Duration = Duration::from_secs(15 * 60);

/// `cargo xtask vm`: builds what it needs; fails where a test did, or none ran.
pub fn run(series: &[impl AsRef<str>], filter: Option<&str>) -> Result<()> {
    ensure!(is_root(), "the virtual machines' file system needs root");
    ebpf::build()?;
    let tally = tier(series, filter)?;
    println!("{} passed, {} failed", tally.passed, tally.failed);
    ensure!(tally.passed + tally.failed > 0, "no test has run");
    if tally.failed > 0 {
        std::process::exit(1);
    }
    Ok(())
}

/// Runs the tests on every kernel, also where they fail on one; nothing where the filter leaves none.
pub fn tier(series: &[impl AsRef<str>], filter: Option<&str>) -> Result<Tally> {
    let test = test_binary()?;
    if output(Command::new(&test).args(filter).args(["--list", "--format", "terse"]))?.is_empty() {
        return Ok(Tally::default());
    }
    ensure!(ARCH == "x86_64", "tests on other kernels are not prepared for {ARCH}");
    need(&[("qemu-system-x86_64", "qemu-system-x86"), ("cpio", "cpio"), ("busybox", "busybox-static")])
        .context("tests on other kernels need a virtual machine")?;
    // Optimised, as emulation is slow enough.
    let binaries = build::agent(true, &["sealane", "sealane-tests"])?;
    let programs = Programs { test, agent: binaries.join("sealane"), testpod: binaries.join("testpod") };
    let mut all = Tally::default();
    for series in series.iter().map(AsRef::as_ref) {
        let kernel = kernel::fetch(series).with_context(|| format!("Linux {series}"))?;
        let initramfs = initramfs::build(&programs, &kernel)?;
        say(&format!("tests on Linux {} (emulated)", kernel.release));
        all += boot(&kernel, &initramfs, filter)?;
    }
    Ok(all)
}

/// Builds tests/tests/vm.rs; yields the program.
fn test_binary() -> Result<PathBuf> {
    let mut build = cargo();
    build.args(["test", "--quiet", "--release", "--package", "sealane-tests", "--test", "vm", "--no-run"]);
    let messages = output(build.arg("--message-format=json"))?;
    let mut messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let built = messages.find_map(|message| {
        let ours = message["target"]["name"] == "vm" && message["profile"]["test"] == true;
        ours.then(|| message["executable"].as_str().map(Into::into)).flatten()
    });
    built.context("cargo names no test program")
}

/// Boots, passes the console on, and counts; a machine that does not reach the tests' end, or that none passes on, has
/// failed.
fn boot(kernel: &Kernel, initramfs: &Path, filter: Option<&str>) -> Result<Tally> {
    let mut machine = Machine(
        Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(initramfs)
            .arg("-append")
            .arg(format!("console=ttyS0 quiet panic=-1 -- {}", filter.unwrap_or_default()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run qemu-system-x86_64")?,
    );
    let console = console(&mut machine)?;
    let (deadline, mut tally, mut ended) = (Instant::now() + LIMIT, Tally::default(), None);
    loop {
        match console.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                writeln!(std::io::stdout(), "{line}")?;
                tally += tally::result(&line).unwrap_or_default();
                ended = line.strip_prefix(initramfs::END).map(|code| code == "0").or(ended);
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                say(&format!("stopped: the tests on Linux {} have not ended within {LIMIT:?}", kernel.release));
                return Ok(tally.or_broken(false));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    if ended.is_none() {
        say(&format!("Linux {} went down before the tests had ended", kernel.release));
    }
    Ok(tally.or_broken(ended == Some(true) && tally.passed > 0))
}

/// A virtual machine; dropping it turns it off.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The serial console, line by line, to the machine's end.
fn console(machine: &mut Machine) -> Result<Receiver<String>> {
    let Some(out) = machine.0.stdout.take() else { bail!("no console") };
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(out).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}
