//! A pod's network namespace, held open.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Protocol, Socket, Type};

use crate::sys;

/// An open network namespace. Holding it does not keep the pod's processes, but keeps the namespace: drop it with the pod.
#[derive(Debug)]
pub struct NetNs {
    file: File,
    cookie: u64,
    inode: u64,
}

impl NetNs {
    /// Opens the namespace mounted at `path`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let inode = file.metadata()?.ino();
        let mut netns = Self { file, cookie: 0, inode };
        netns.cookie = netns.enter(|| {
            let probe = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
            sys::netns_cookie(&probe)
        })??;
        Ok(netns)
    }

    /// The kernel's number for it, never reused.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Its inode, as in /proc/PID/ns/net.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// True for the agent's own.
    pub fn is_home(&self) -> io::Result<bool> {
        Ok(home()?.metadata()?.ino() == self.inode)
    }

    /// Its file, to attach programs to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Runs `f` with this thread inside the namespace. `f` must not block for long: the thread serves connections. Two
    /// system calls; nothing is awaited inside, so no other task ever runs in the pod's namespace.
    pub fn enter<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let home = home()?;
        setns(&self.file, CloneFlags::CLONE_NEWNET)?;
        let back = Return(home);
        let value = f();
        drop(back);
        Ok(value)
    }
}

struct Return(&'static File);

impl Drop for Return {
    fn drop(&mut self) {
        if setns(self.0, CloneFlags::CLONE_NEWNET).is_err() {
            // Going on would serve other pods' connections from inside this one.
            std::process::abort();
        }
    }
}

/// The agent's own namespace, opened once before any thread has moved.
fn home() -> io::Result<&'static File> {
    static HOME: OnceLock<File> = OnceLock::new();
    if let Some(home) = HOME.get() {
        return Ok(home);
    }
    let file = File::open("/proc/self/ns/net")?;
    Ok(HOME.get_or_init(|| file))
}
