//! Two nodes joined by one wire: `node-a` with the pods 10.9.0.0/24 and fd09:0::/64, `node-b` with 10.9.1.0/24 and
//! fd09:1::/64. Pods hang on routed veths behind the gateway 169.254.1.1 and fe80::1, as with the AWS VPC CNI.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::unistd::geteuid;

use crate::cgroup::{self, Cgroup};
use crate::names;
use crate::netns::{self, Netns};
use crate::pod::Pod;
use crate::report::Outcome;
use crate::testpod::{Running, binary};

/// The interface between the nodes, on both.
pub const WIRE: &str = "wire";

const BPFFS: &str = "/sys/fs/bpf";

/// Two nodes; dropping it kills and removes everything that bears its name.
#[derive(Debug)]
pub struct Lab {
    // First, so that it is dropped first: it ends every process at once.
    remains: Remains,
    /// node-a.
    pub a: Arc<Node>,
    /// node-b.
    pub b: Arc<Node>,
}

/// A node: a network namespace that routes for its pods, and a cgroup.
#[derive(Debug)]
pub struct Node {
    /// `node-a` or `node-b`.
    pub name: &'static str,
    /// Its namespace; the agent runs there.
    pub netns: Netns,
    /// What the agent's `capture.cgroup` names.
    pub pods: PathBuf,
    /// What the agent's `capture.bpffs` names.
    pub bpffs: PathBuf,
    /// Its address on the wire, and its source towards its pods.
    pub v4: Ipv4Addr,
    /// The same, version 6.
    pub v6: Ipv6Addr,
    lab: String,
    index: u8,
    cgroup: Cgroup,
    dir: PathBuf,
}

impl Lab {
    /// A lab of this process; sweeps what killed runs have left. `name` must be unique among this process's labs.
    pub fn new(name: &str) -> Result<Self> {
        ensure!(geteuid().is_root(), "the lab needs root: it makes network namespaces and cgroups");
        sweep()?;
        Self::named(&names::owned(name))
    }

    /// A lab under exactly this name (with [`names::PREFIX`] and no owner): no sweep removes it.
    pub fn named(name: &str) -> Result<Self> {
        remove(name)?;
        let remains = Remains { name: name.to_owned() };
        fs::create_dir_all(dir(name))?;
        mount_bpffs()?;
        let a = Arc::new(Node::new(name, "node-a", 0)?);
        let b = Arc::new(Node::new(name, "node-b", 1)?);
        a.netns.ip(&format!("link add {WIRE} type veth peer name {WIRE} netns {}\n", b.netns.name()))?;
        a.join(&b)?;
        b.join(&a)?;
        Ok(Self { remains, a, b })
    }

    /// The name that everything of it bears.
    pub fn name(&self) -> &str {
        &self.remains.name
    }

    /// A directory for files: configurations, logs, the development CA.
    pub fn dir(&self) -> PathBuf {
        dir(self.name())
    }
}

#[derive(Debug)]
struct Remains {
    name: String,
}

impl Drop for Remains {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.name) {
            eprintln!("cannot remove the lab {}: {error:#}", self.name);
        }
    }
}

impl Node {
    fn new(lab: &str, name: &'static str, index: u8) -> Result<Self> {
        let cgroup = Cgroup::new(cgroup::root()?.join(lab).join(name))?;
        let pods = cgroup.path().join("pods");
        for path in [&pods, &cgroup.path().join("system")] {
            fs::create_dir_all(path)?;
        }
        let netns = Netns::new(&format!("{lab}-{name}"))?;
        netns.run(|| {
            for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                fs::write(format!("/proc/sys/net/{key}"), "1")?;
            }
            Ok(())
        })?;
        Ok(Self {
            name,
            netns,
            pods,
            bpffs: Path::new(BPFFS).join(format!("{lab}-{name}")),
            v4: Ipv4Addr::new(10, 9, 255, index + 1),
            v6: Ipv6Addr::new(0xfd09, 0xff, 0, 0, 0, 0, 0, u16::from(index) + 1),
            lab: lab.to_owned(),
            index,
            cgroup,
            dir: dir(lab),
        })
    }

    /// The lab that it is part of.
    pub fn lab(&self) -> &str {
        &self.lab
    }

    /// Its cgroup, an ancestor of the pods' and of the system's.
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// The lab's directory for files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A pod with the addresses `10.9.<node>.<host>` and `fd09:<node>::<host>` (the same decimal digits).
    pub fn pod(self: &Arc<Self>, name: &str, host: u8) -> Result<Pod> {
        let v6 = format!("fd09:{}::{host}", self.index).parse().context("pod address")?;
        Pod::new(Arc::clone(self), name, Ipv4Addr::new(10, 9, self.index, host), v6)
    }

    /// A command that will run on the node, outside every pod, as the kubelet or the agent does.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        command(&self.cgroup.path().join("system"), &self.netns, program.as_ref())
    }

    /// `testpod connect` from the node, to its end.
    pub fn connect(&self, to: SocketAddr, args: &[&str]) -> Result<Outcome> {
        let to = to.to_string();
        let args = [&["connect", "--to", &to], args].concat();
        Running::start(self.command(binary("testpod")?), &args)?.result()
    }

    /// The node's end of the wire, and the routes to the other's pods.
    fn join(&self, other: &Self) -> Result<()> {
        let (v4, v6, via4, via6, net) = (self.v4, self.v6, other.v4, other.v6, other.index);
        self.netns.ip(&format!(
            "link set {WIRE} mtu 1500 up
             addr add {v4}/30 dev {WIRE}
             addr add {v6}/64 dev {WIRE} nodad
             route add 10.9.{net}.0/24 via {via4}
             route add fd09:{net}::/64 via {via6}\n"
        ))
    }
}

/// A command that will run in a cgroup and a network namespace; its process id is the program's.
pub(crate) fn command(cgroup: &Path, netns: &Netns, program: &Path) -> Command {
    const ENTER: &str = r#"echo 0 >"$1/cgroup.procs" || exit 125; ns=$2; shift 2; exec nsenter --net="$ns" -- "$@""#;
    let mut command = Command::new("sh");
    command.args(["-c", ENTER, "sh"]).arg(cgroup).arg(netns.path()).arg(program);
    command
}

/// Kills and removes everything that bears the name; nothing to do where there is nothing.
pub fn remove(name: &str) -> Result<()> {
    remove_by(&|entry| entry == name || entry.strip_prefix(name).is_some_and(|rest| rest.starts_with('-')))
}

/// Removes the labs whose process has ended.
pub fn sweep() -> Result<()> {
    remove_by(&|entry| names::orphan(entry).is_some())
}

/// Cgroups first: that ends the processes which could hold the rest.
fn remove_by(ours: &dyn Fn(&str) -> bool) -> Result<()> {
    for path in matching(&cgroup::root()?, ours) {
        cgroup::remove(&path)?;
    }
    for path in matching(Path::new(netns::DIR), ours) {
        netns::remove(&path.file_name().unwrap_or_default().to_string_lossy())?;
    }
    for path in matching(Path::new(BPFFS), ours).into_iter().chain(matching(&std::env::temp_dir(), ours)) {
        match fs::remove_dir_all(&path) {
            // Another run may sweep at the same time.
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

fn matching(dir: &Path, ours: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(ours)).map(|entry| entry.path()).collect()
}

fn dir(lab: &str) -> PathBuf {
    std::env::temp_dir().join(lab)
}

fn mount_bpffs() -> Result<()> {
    let mounted = fs::read_to_string("/proc/self/mounts")?.lines().any(|line| line.split(' ').nth(1) == Some(BPFFS));
    if !mounted {
        mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>).context("cannot mount bpffs")?;
    }
    Ok(())
}
