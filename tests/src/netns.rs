//! Named network namespaces in `/run/netns`, as `ip netns add` makes them.
//!
//! Never `ip netns exec`: it remounts `/sys` and hides cgroup2 and bpffs.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::poll;

/// Where namespaces are mounted.
pub const DIR: &str = "/run/netns";

const NO_DATA: Option<&str> = None;

/// A named network namespace; dropping it kills what runs inside and removes the name.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes it, with `lo` up and duplicate address detection off.
    pub fn new(name: &str) -> Result<Self> {
        share_dir()?;
        let netns = Self { name: name.to_owned() };
        let path = netns.path();
        File::create_new(&path).with_context(|| format!("cannot make {}", path.display()))?;
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(Some("/proc/thread-self/ns/net"), &path, NO_DATA, MsFlags::MS_BIND, NO_DATA)?;
            for link in ["all", "default"] {
                fs::write(format!("/proc/sys/net/ipv6/conf/{link}/accept_dad"), "0")?;
            }
            Ok(())
        })
        .with_context(|| format!("cannot make the network namespace {name}"))?;
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Its name in [`DIR`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        Path::new(DIR).join(&self.name)
    }

    /// Runs `work` on a thread inside the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = File::open(self.path())?;
        on_thread(move || {
            setns(&file, CloneFlags::CLONE_NEWNET)?;
            work()
        })
    }

    /// Sets `/proc/sys/<key>`, the key with slashes.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.run(|| fs::write(format!("/proc/sys/{key}"), value).with_context(|| format!("cannot set {key}")))
    }

    /// Runs lines of `ip` (iproute2's batch form) inside the namespace.
    pub fn ip(&self, batch: &str) -> Result<()> {
        let mut ip = self.command("ip");
        ip.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = ip.spawn().context("cannot run nsenter")?;
        child.stdin.take().context("no stdin")?.write_all(batch.as_bytes())?;
        let out = child.wait_with_output()?;
        ensure!(out.status.success(), "ip in {}: {}\n{batch}", self.name, String::from_utf8_lossy(&out.stderr).trim());
        Ok(())
    }

    /// What `ip` with these arguments prints inside the namespace.
    pub fn ip_show(&self, args: &str) -> Result<String> {
        let out = self.command("ip").args(args.split(' ')).output()?;
        ensure!(out.status.success(), "ip {args} in {}: {}", self.name, String::from_utf8_lossy(&out.stderr).trim());
        Ok(String::from_utf8(out.stdout)?)
    }

    /// A command that will run inside the namespace, in the caller's cgroup.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.name) {
            eprintln!("cannot remove the network namespace {}: {error:#}", self.name);
        }
    }
}

/// Kills what runs inside the namespace and removes its name; nothing to do where it does not exist.
pub fn remove(name: &str) -> Result<()> {
    let path = Path::new(DIR).join(name);
    let Ok(meta) = fs::metadata(&path) else { return Ok(()) };
    poll::until_true("all processes of the namespace have ended", Duration::from_secs(5), || {
        let inside = processes(meta.ino());
        for pid in &inside {
            let _ = kill(*pid, Signal::SIGKILL);
        }
        inside.is_empty()
    })?;
    let _ = umount2(&path, MntFlags::MNT_DETACH);
    match fs::remove_file(&path) {
        // Another run may sweep at the same time.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Processes whose network namespace has this inode, without zombies (which have none).
fn processes(inode: u64) -> Vec<Pid> {
    let Ok(proc) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = proc.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let inside = |pid: &i32| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|ns| ns.ino() == inode);
    pids.filter(inside).map(Pid::from_raw).collect()
}

/// Makes [`DIR`] a shared mount, as `ip netns add` does: a later one would otherwise cover ours.
fn share_dir() -> Result<()> {
    fs::create_dir_all(DIR)?;
    let share = || mount(NO_DATA, DIR, NO_DATA, MsFlags::MS_SHARED | MsFlags::MS_REC, NO_DATA);
    if share().is_err() {
        mount(Some(DIR), DIR, NO_DATA, MsFlags::MS_BIND | MsFlags::MS_REC, NO_DATA)?;
        share()?;
    }
    Ok(())
}

/// A thread of its own: the namespace of a thread that ends is gone with it.
fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join().map_err(|_| anyhow!("a panic inside the namespace"))?)
}
