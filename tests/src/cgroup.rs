//! Directories of the unified cgroup hierarchy.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::poll;

/// Where cgroup2 is mounted: `/sys/fs/cgroup`, or beside version 1.
pub fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mount = fields.find_map(|f| (f.get(2) == Some(&"cgroup2")).then(|| f.get(1).copied()).flatten());
    Ok(mount.context("cgroup2 is not mounted")?.into())
}

/// A cgroup; dropping it kills its members and removes the tree.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes it, and its ancestors where they are missing.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        fs::create_dir_all(&path).with_context(|| format!("cannot make the cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            eprintln!("cannot remove the cgroup {}: {error:#}", self.path.display());
        }
    }
}

/// Kills every member of the tree and removes it; nothing to do where it does not exist.
pub fn remove(path: &Path) -> Result<()> {
    poll::until_true(&format!("the cgroup {} is empty", path.display()), Duration::from_secs(5), || {
        let _ = fs::write(path.join("cgroup.kill"), "1");
        remove_tree(path).is_ok()
    })
}

fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}
