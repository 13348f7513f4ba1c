//! Loading the programs and attaching them by pinned links, replaced in place on an upgrade.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::programs::{CgroupSockAddr, CgroupSockopt, ProgramFd, SkLookup, SockOps};
use aya::{Ebpf, EbpfLoader};
use sealane_common::names::{POD_ID_GLOBAL, maps, programs};

use super::KernelError;
use super::netns::NetNs;
use crate::sys::{self, Attach};

/// The object that `cargo xtask build` made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/capture"));

/// The cgroup programs: name, attach point.
pub const CGROUP_PROGRAMS: [(&str, Attach); 6] = [
    (programs::SOCK_OPS, Attach::SockOps),
    (programs::GETPEERNAME4, Attach::Getpeername4),
    (programs::GETPEERNAME6, Attach::Getpeername6),
    (programs::SETSOCKOPT, Attach::Setsockopt),
    (programs::CONNECT4, Attach::Connect4),
    (programs::CONNECT6, Attach::Connect6),
];

/// Creates the maps, or takes those already pinned in `dir`, and loads the cgroup programs.
pub fn load(dir: &Path) -> Result<Ebpf, KernelError> {
    let mut ebpf = object(dir, 0)?;
    for (name, attach) in CGROUP_PROGRAMS {
        load_program(&mut ebpf, name, attach).map_err(|source| KernelError::Load { name, source })?;
    }
    Ok(ebpf)
}

/// Attaches the cgroup programs, or replaces what an earlier agent attached.
pub fn attach_cgroup(ebpf: &Ebpf, cgroup: &Path, dir: &Path) -> Result<(), KernelError> {
    let target = File::open(cgroup).map_err(|source| KernelError::Cgroup { path: cgroup.into(), source })?;
    let id = target.metadata().map_err(|source| KernelError::Cgroup { path: cgroup.into(), source })?.ino();
    for (name, attach) in CGROUP_PROGRAMS {
        let attached = |source| KernelError::Attach { name, source };
        let program = program_fd(ebpf, name).map_err(|source| KernelError::Load { name, source })?;
        attach_or_update(program.as_fd(), target.as_fd(), id, attach, &link_path(dir, name)).map_err(attached)?;
    }
    Ok(())
}

/// True where every cgroup program's link is there and leads to today's cgroup.
pub fn are_attached(cgroup: &Path, dir: &Path) -> bool {
    let Ok(id) = std::fs::metadata(cgroup).map(|meta| meta.ino()) else { return false };
    let attached = |name| sys::open_pin(&link_path(dir, name)).and_then(|link| sys::link_target(link.as_fd()));
    CGROUP_PROGRAMS.iter().all(|(name, _)| attached(name).is_ok_and(|target| target == id))
}

/// True where a pod's sk_lookup link still has a netns to serve.
pub fn serves_a_netns(dir: &Path, pod_id: u32) -> bool {
    let target = sys::open_pin(&lookup_path(dir, pod_id)).and_then(|link| sys::link_target(link.as_fd()));
    target.is_ok_and(|inode| inode != 0)
}

/// Attaches sock_ops to the agent's own cgroup, which lies outside the pods': it has to follow the agent's dials. Ends with
/// the returned link, as the dials do.
pub fn attach_own_dials(ebpf: &Ebpf, cgroup: &Path) -> Result<std::os::fd::OwnedFd, KernelError> {
    let name = programs::SOCK_OPS;
    let target = File::open(cgroup).map_err(|source| KernelError::Cgroup { path: cgroup.into(), source })?;
    let program = program_fd(ebpf, name).map_err(|source| KernelError::Load { name, source })?;
    sys::link_create(program.as_fd(), target.as_fd(), Attach::SockOps)
        .map_err(|source| KernelError::Attach { name, source })
}

/// Loads an instance of the sk_lookup program for one pod and attaches it to the pod's netns.
pub fn attach_lookup(netns: &NetNs, pod_id: u32, dir: &Path) -> Result<(), KernelError> {
    let name = programs::SK_LOOKUP;
    let mut ebpf = object(dir, pod_id)?;
    load_program(&mut ebpf, name, Attach::SkLookup).map_err(|source| KernelError::Load { name, source })?;
    let program = program_fd(&ebpf, name).map_err(|source| KernelError::Load { name, source })?;
    let path = lookup_path(dir, pod_id);
    attach_or_update(program.as_fd(), netns.file().as_fd(), netns.inode(), Attach::SkLookup, &path)
        .map_err(|source| KernelError::Attach { name, source })
}

/// Where a pod's sk_lookup link is pinned.
pub fn lookup_path(dir: &Path, pod_id: u32) -> PathBuf {
    dir.join(format!("lookup-{pod_id}"))
}

/// Where a cgroup program's link is pinned.
pub fn link_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("link-{name}"))
}

/// What the verifier walked for each program, for the budget in tests.
pub fn instruction_counts(dir: &Path) -> Result<Vec<(String, u32)>, KernelError> {
    let mut ebpf = load(dir)?;
    let name = programs::SK_LOOKUP;
    load_program(&mut ebpf, name, Attach::SkLookup).map_err(|source| KernelError::Load { name, source })?;
    let count = |(name, program): (&str, &aya::programs::Program)| {
        let info = program.info().map_err(|source| KernelError::Load { name: "info", source })?;
        Ok((name.to_owned(), info.verified_instruction_count().unwrap_or(0)))
    };
    ebpf.programs().map(count).collect()
}

fn object(dir: &Path, pod_id: u32) -> Result<Ebpf, KernelError> {
    EbpfLoader::new()
        .default_map_pin_directory(dir)
        .map_pin_path(maps::DECISION, dir.join(maps::DECISION))
        .map_pin_path(maps::CLIENT, dir.join(maps::CLIENT))
        .override_global(POD_ID_GLOBAL, &pod_id, true)
        .load(OBJECT)
        .map_err(|source| KernelError::Object { source: Box::new(source) })
}

fn load_program(ebpf: &mut Ebpf, name: &'static str, attach: Attach) -> Result<(), aya::programs::ProgramError> {
    let program = ebpf.program_mut(name).ok_or(aya::programs::ProgramError::NotLoaded)?;
    match attach {
        Attach::SockOps => <&mut SockOps>::try_from(program)?.load(),
        Attach::Setsockopt => <&mut CgroupSockopt>::try_from(program)?.load(),
        Attach::SkLookup => <&mut SkLookup>::try_from(program)?.load(),
        Attach::Connect4 | Attach::Connect6 | Attach::Getpeername4 | Attach::Getpeername6 => {
            <&mut CgroupSockAddr>::try_from(program)?.load()
        }
    }
}

fn program_fd<'a>(ebpf: &'a Ebpf, name: &'static str) -> Result<&'a ProgramFd, aya::programs::ProgramError> {
    ebpf.program(name).ok_or(aya::programs::ProgramError::NotLoaded)?.fd()
}

/// Two links at once would let the old program overrule a stricter new one (a selection beats a drop), so an existing link to
/// the same target is updated. A link whose target is gone or another is replaced.
fn attach_or_update(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    target_id: u64,
    attach: Attach,
    path: &Path,
) -> io::Result<()> {
    match sys::open_pin(path) {
        Ok(link) if sys::link_target(link.as_fd())? == target_id => return sys::link_update(link.as_fd(), program),
        Ok(_) => fs::remove_file(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let link = sys::link_create(program, target, attach)?;
    sys::pin(link.as_fd(), path)
}
