//! The agent's own cgroup: a leaf of its own that is no ancestor of the pods', so that exempting it exempts nobody else.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process;

use super::KernelError;

const PREFIX: &str = "sealane-agent-";

/// The cgroup that the agent runs in. Dropping it leaves the cgroup again, where the agent made it.
#[derive(Debug)]
pub struct Leaf {
    path: PathBuf,
    id: u64,
    below_pods: bool,
    /// Where to go back to before the cgroup can be removed.
    home: Option<PathBuf>,
}

impl Leaf {
    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its id, as the kernel programs see it.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// True where the pods' programs run for the agent too.
    pub fn below_pods(&self) -> bool {
        self.below_pods
    }
}

impl Drop for Leaf {
    fn drop(&mut self) {
        if let Some(home) = &self.home
            && fs::write(home.join("cgroup.procs"), "0").is_ok()
        {
            // A failure leaves an empty cgroup, which the next agent's sweep removes.
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Finds the agent's cgroup, or makes one and moves in. Call before any other thread or socket exists.
pub fn enter_leaf(pods: &Path) -> Result<Leaf, KernelError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| KernelError::Cgroup { path, source }
    };
    let pods = pods.canonicalize().map_err(failed(pods))?;
    if !pods.join("cgroup.procs").exists() {
        return Err(KernelError::NotACgroup { path: pods });
    }
    let root = mount_root(&pods);
    let current = own_cgroup(&root).ok_or(KernelError::OwnCgroup { root: root.clone() })?;
    let shared = pods.starts_with(&current) || !is_alone(&current).map_err(failed(&current))?;
    let (path, home) = if shared {
        let parent = if pods.starts_with(&current) { &root } else { &current };
        sweep(parent);
        let path = parent.join(format!("{PREFIX}{}", process::id()));
        fs::create_dir(&path).map_err(failed(&path))?;
        fs::write(path.join("cgroup.procs"), "0").map_err(failed(&path))?;
        (path, Some(current))
    } else {
        (current, None)
    };
    let id = fs::metadata(&path).map_err(failed(&path))?.ino();
    Ok(Leaf { below_pods: path.starts_with(&pods), path, id, home })
}

/// Ids of all cgroups from `path` down.
pub fn ids_below(path: &Path) -> Vec<u64> {
    let mut ids = Vec::new();
    walk(path, &mut |dir| {
        ids.extend(fs::metadata(dir).map(|meta| meta.ino()));
        false
    });
    ids
}

/// The topmost ancestor that is still a cgroup2 directory: the root has no cgroup.type, but cgroup.procs.
fn mount_root(cgroup: &Path) -> PathBuf {
    let is_cgroup = |dir: &&Path| dir.join("cgroup.procs").exists() && dir.join("cgroup.controllers").exists();
    cgroup.ancestors().take_while(is_cgroup).last().unwrap_or(cgroup).to_owned()
}

/// By the path in /proc/self/cgroup; in a cgroup namespace of its own that path means nothing here, so by looking for the
/// directory that lists this process.
fn own_cgroup(root: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let relative = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let direct = root.join(relative);
    if lists_us(&direct) {
        return Some(direct);
    }
    let mut found = None;
    walk(root, &mut |dir| {
        if lists_us(dir) {
            found = Some(dir.to_owned());
        }
        found.is_some()
    });
    found
}

fn lists_us(cgroup: &Path) -> bool {
    let us = process::id().to_string();
    fs::read_to_string(cgroup.join("cgroup.procs")).is_ok_and(|procs| procs.lines().any(|pid| pid == us))
}

fn is_alone(cgroup: &Path) -> io::Result<bool> {
    let us = process::id().to_string();
    let alone = fs::read_to_string(cgroup.join("cgroup.procs"))?.lines().all(|pid| pid == us);
    Ok(alone && children(cgroup).is_empty())
}

/// Removes what killed agents left; a cgroup that is in use refuses.
fn sweep(parent: &Path) {
    for child in children(parent) {
        if child.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX)) {
            let _ = fs::remove_dir(&child);
        }
    }
}

fn children(cgroup: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cgroup).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

/// Calls `visit` for `dir` and everything below until it returns true.
fn walk(dir: &Path, visit: &mut impl FnMut(&Path) -> bool) -> bool {
    visit(dir) || children(dir).iter().any(|child| walk(child, visit))
}
