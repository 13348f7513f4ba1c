//! The kernel's side of the capture: programs, maps, and each pod's listeners, rule, routes and settings. Everything here
//! runs in the one control task; another agent's takeover is noticed at every write.

pub mod cgroup;
pub mod diag;
pub mod links;
pub mod maps;
pub mod netns;
pub mod pod;
pub mod route;
pub mod sysctl;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use sealane_common::keys::{Generation, MESH_NO, MESH_YES, MeshKey};
use sealane_common::names::LAYOUT;

use self::cgroup::Leaf;
use self::maps::Maps;
use crate::config::Capture;
use crate::snapshot::Snapshot;
use crate::workload::Mode;

/// Why the kernel's side does not work.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each variant's words are its documentation")]
pub enum KernelError {
    #[error("cgroup {}: {source}", path.display())]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("capture.cgroup {} is not a cgroup2 directory", path.display())]
    NotACgroup { path: PathBuf },
    #[error("the agent's own cgroup was not found below {}", root.display())]
    OwnCgroup { root: PathBuf },
    #[error("capture.bpffs {}: {source}", path.display())]
    Bpffs { path: PathBuf, source: io::Error },
    #[error("capture.bpffs {} is not on a bpf file system (mount -t bpf bpf /sys/fs/bpf)", path.display())]
    NotBpffs { path: PathBuf },
    #[error("kernel programs: {source}")]
    Object { source: Box<aya::EbpfError> },
    #[error("program {name}: {source}")]
    Load { name: &'static str, source: aya::programs::ProgramError },
    #[error("attaching {name}: {source}")]
    Attach { name: &'static str, source: io::Error },
    #[error("map {name}: {source}")]
    Map { name: &'static str, source: aya::maps::MapError },
    #[error("network namespace {}: {source}", path.display())]
    Netns { path: PathBuf, source: io::Error },
    #[error("network namespace {}: the path is longer than 255 bytes", path.display())]
    NetnsPath { path: PathBuf },
    #[error("{path}: {source}")]
    Sysctl { path: &'static str, source: io::Error },
    #[error("net.ipv4.tcp_fastopen has bit 0x200: servers that take data without a cookie cannot be captured safely")]
    FastOpenWithoutCookie,
    #[error("netlink {what}: {source}")]
    Netlink { what: &'static str, source: io::Error },
    #[error("netlink {what}: {source}")]
    Route { what: &'static str, source: rtnetlink::Error },
    #[error("sock_diag: {source}")]
    Diag { source: io::Error },
    #[error("no free port among {}-{} for the agent's listeners: {source}", ports.start(), ports.end())]
    Listener { ports: RangeInclusive<u16>, source: io::Error },
    #[error("the pod has none of the addresses that the configuration gives it")]
    NoAddress,
    #[error("it is the agent's own network namespace")]
    OwnNetns,
    #[error("too many pods on this node")]
    TooManyPods,
    #[error("capture.bpffs {} is the root of a file system that others use too: give it a directory of its own", path.display())]
    SharedBpffs { path: PathBuf },
    #[error("{sockets} captured sockets do not end: the pod stays guarded")]
    StillCaptured { sockets: usize },
    #[error("another agent has taken over")]
    Superseded,
}

/// The programs and maps, as this process holds them.
pub struct Kernel {
    capture: Capture,
    dir: PathBuf,
    ebpf: aya::Ebpf,
    maps: Maps,
    generation: u64,
    adopting: bool,
    /// Its link follows the agent's dials where the agent lives outside the pods' cgroup.
    _own_dials: Option<OwnedFd>,
    leaf: Leaf,
}

/// Held while maps, rules and objects are written: one agent at a time.
pub struct Writer {
    _lock: Flock<File>,
}

impl Kernel {
    /// Loads the programs. On a node without pins it attaches them too; where another agent's stand, that waits for
    /// [`Self::finish_takeover`], so that no SYN meets a program whose maps are not filled yet.
    pub fn open(capture: Capture, leaf: Leaf) -> Result<Self, KernelError> {
        let dir = pin_dir(&capture.bpffs)?;
        let lock = lock(&dir)?;
        let adopting = links::link_path(&dir, sealane_common::names::programs::CONNECT4).exists();
        let ebpf = links::load(&dir)?;
        let mut maps = Maps::open(&dir)?;
        exempt(&mut maps, &leaf, &capture.cgroup)?;
        let own_dials = if leaf.below_pods() { None } else { Some(links::attach_own_dials(&ebpf, leaf.path())?) };
        if !adopting {
            links::attach_cgroup(&ebpf, &capture.cgroup, &dir)?;
        }
        // Last: an agent that cannot start must not silence the one that runs.
        let generation = maps.generation.get(&0, 0).map_err(map_error("GENERATION"))?.number + 1;
        maps.generation.set(0, Generation { number: generation }, 0).map_err(map_error("GENERATION"))?;
        drop(lock);
        Ok(Self { capture, dir, ebpf, maps, generation, adopting, _own_dials: own_dials, leaf })
    }

    /// False once an uninstall has removed every pin, this layout's and any other's.
    pub fn is_installed(&self) -> bool {
        fs::read_dir(&self.capture.bpffs).is_ok_and(|mut entries| entries.next().is_some())
    }

    /// The right to write, or [`KernelError::Superseded`], also where an uninstall has removed every pin.
    pub fn writer(&self) -> Result<Writer, KernelError> {
        if !self.dir.exists() {
            return Err(KernelError::Superseded);
        }
        let writer = lock(&self.dir)?;
        match self.maps.generation.get(&0, 0) {
            Ok(Generation { number }) if number == self.generation => Ok(writer),
            Ok(_) => Err(KernelError::Superseded),
            Err(source) => Err(map_error("GENERATION")(source)),
        }
    }

    /// Counts up with every agent on this node.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// After the pods' maps and listeners are this agent's: replaces the cgroup programs of the agent before, and removes
    /// what agents with another layout left.
    pub fn finish_takeover(&mut self, _writer: &Writer) -> Result<(), KernelError> {
        if self.adopting {
            links::attach_cgroup(&self.ebpf, &self.capture.cgroup, &self.dir)?;
            self.adopting = false;
        }
        retire_other_layouts(&self.capture.bpffs)
    }

    /// Writes the mesh's destinations.
    pub fn sync_mesh(&mut self, _writer: &Writer, snapshot: &Snapshot) -> Result<(), KernelError> {
        maps::converge(&mut self.maps.mesh, &mesh(snapshot), |_| true).map_err(map_error("MESH"))
    }

    /// Attaches the cgroup programs anew where the pods' cgroup was removed and made again; true where that was so.
    pub fn reattach(&mut self, _writer: &Writer) -> Result<bool, KernelError> {
        if self.adopting || links::are_attached(&self.capture.cgroup, &self.dir) {
            return Ok(false);
        }
        links::attach_cgroup(&self.ebpf, &self.capture.cgroup, &self.dir).map(|()| true)
    }
}

/// Removes every pin below `bpffs`: after the pods have been un-enrolled.
pub fn remove_pins(bpffs: &Path) -> io::Result<()> {
    match fs::remove_dir_all(bpffs) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Where this layout's pins lie.
pub fn layout_dir(bpffs: &Path) -> PathBuf {
    bpffs.join(LAYOUT)
}

/// True where an agent has pinned something.
pub fn has_pins(bpffs: &Path) -> bool {
    links::link_path(&layout_dir(bpffs), sealane_common::names::programs::CONNECT4).exists()
}

fn lock(dir: &Path) -> Result<Writer, KernelError> {
    let failed = |source| KernelError::Bpffs { path: dir.into(), source };
    let file = File::open(dir).map_err(failed)?;
    let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| failed(errno.into()))?;
    Ok(Writer { _lock: lock })
}

fn pin_dir(bpffs: &Path) -> Result<PathBuf, KernelError> {
    const DEFAULT: &str = "/sys/fs/bpf";
    let failed = |source| KernelError::Bpffs { path: bpffs.into(), source };
    if bpffs.starts_with(DEFAULT) && !is_bpffs(Path::new(DEFAULT)) {
        mount(Some("bpf"), DEFAULT, Some("bpf"), MsFlags::empty(), None::<&str>).map_err(|e| failed(e.into()))?;
    }
    let dir = layout_dir(bpffs);
    fs::create_dir_all(&dir).map_err(failed)?;
    if !is_bpffs(&dir) {
        return Err(KernelError::NotBpffs { path: bpffs.into() });
    }
    // Uninstalling removes the directory whole.
    if !bpffs.parent().is_some_and(is_bpffs) {
        return Err(KernelError::SharedBpffs { path: bpffs.into() });
    }
    Ok(dir)
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC)
}

/// Adds this agent and forgets those whose cgroup is gone. The agent before is still draining, so its entry stays.
fn exempt(maps: &mut Maps, leaf: &Leaf, pods: &Path) -> Result<(), KernelError> {
    let alive = cgroup::ids_below(pods);
    let listed: Vec<u64> = maps.exempt.keys().flatten().collect();
    for id in listed.iter().filter(|id| !alive.contains(id)) {
        maps::remove(&mut maps.exempt, id).map_err(map_error("EXEMPT"))?;
    }
    if leaf.below_pods() {
        maps.exempt.insert(leaf.id(), 1, 0).map_err(map_error("EXEMPT"))?;
    }
    Ok(())
}

/// Drops the pins of other layout versions: their links go with them. Called when ours already serve every pod.
fn retire_other_layouts(bpffs: &Path) -> Result<(), KernelError> {
    let failed = |source| KernelError::Bpffs { path: bpffs.into(), source };
    for entry in fs::read_dir(bpffs).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if is_layout(&entry.file_name()) && entry.file_name() != LAYOUT {
            fs::remove_dir_all(entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

/// `v` and a number.
fn is_layout(name: &OsStr) -> bool {
    name.to_str().and_then(|name| name.strip_prefix('v')).is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Pod addresses with all ports but the DISABLED ones; VIP ports with an enrolled endpoint; addresses claimed twice or without a
/// known ID, which the agent refuses by name rather than letting them go in plaintext.
fn mesh(snapshot: &Snapshot) -> HashMap<MeshKey, u32> {
    let key = |ip: std::net::IpAddr, port| MeshKey { pod_id: 0, addr: ip.into(), port, pad: 0 };
    let mut mesh = HashMap::new();
    for (ip, peer) in &snapshot.peers {
        if peer.mode != Mode::Disabled {
            mesh.insert(key(*ip, 0), MESH_YES);
        }
        for (port, mode) in &peer.ports {
            mesh.insert(key(*ip, *port), if *mode == Mode::Disabled { MESH_NO } else { MESH_YES });
        }
    }
    for ((vip, port), service) in &snapshot.services {
        if snapshot.is_mesh(service) {
            mesh.insert(key(*vip, *port), MESH_YES);
        }
    }
    mesh.extend(snapshot.conflicts.iter().chain(&snapshot.pending).map(|ip| (key(*ip, 0), MESH_YES)));
    mesh
}

pub(crate) fn map_error(name: &'static str) -> impl Fn(aya::maps::MapError) -> KernelError {
    move |source| KernelError::Map { name, source }
}
