//! The agent's only unsafe code: system calls that no crate wraps, each a few lines.
#![expect(unsafe_code, reason = "the one place for system calls without a safe wrapper; each block says why it holds")]

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const SOL_SOCKET: i32 = libc::SOL_SOCKET;
const SO_COOKIE: i32 = 57;
const SO_NETNS_COOKIE: i32 = 71;

/// The kernel's number for a socket, which its programs see too. `SO_COOKIE`, socket(7).
pub fn socket_cookie(socket: impl AsFd) -> io::Result<u64> {
    getsockopt_u64(socket.as_fd(), SO_COOKIE)
}

/// The kernel's number for the socket's network namespace; never reused while the kernel runs. Since Linux 5.14.
pub fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    getsockopt_u64(socket.as_fd(), SO_NETNS_COOKIE)
}

/// `IP_TRANSPARENT` for a dual-stack socket: it may then own connections to addresses that are not local.
pub fn set_transparent_v6(socket: impl AsFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is borrowed for the call, and the option's value is an int that outlives it.
    let ret = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_IPV6,
            libc::IPV6_TRANSPARENT,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if ret == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn getsockopt_u64(socket: BorrowedFd<'_>, option: i32) -> io::Result<u64> {
    let mut value = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the descriptor is borrowed for the call; the kernel writes at most `len` bytes, the size of `value`.
    let ret =
        unsafe { libc::getsockopt(socket.as_raw_fd(), SOL_SOCKET, option, (&raw mut value).cast(), &raw mut len) };
    if ret == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

// --- bpf(2): links. aya lacks a pinnable link for setsockopt programs and the in-place update of cgroup and netns links. ---

const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;

/// Where a program attaches: numbers of `enum bpf_attach_type` in linux/bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Attach {
    /// BPF_CGROUP_SOCK_OPS.
    SockOps = 3,
    /// BPF_CGROUP_INET4_CONNECT.
    Connect4 = 10,
    /// BPF_CGROUP_INET6_CONNECT.
    Connect6 = 11,
    /// BPF_CGROUP_SETSOCKOPT.
    Setsockopt = 22,
    /// BPF_CGROUP_INET4_GETPEERNAME.
    Getpeername4 = 29,
    /// BPF_CGROUP_INET6_GETPEERNAME.
    Getpeername6 = 30,
    /// BPF_SK_LOOKUP.
    SkLookup = 36,
}

/// Attaches a program to a cgroup or a network namespace. The link ends when its last descriptor and pin are gone.
pub fn link_create(program: BorrowedFd<'_>, target: BorrowedFd<'_>, attach: Attach) -> io::Result<OwnedFd> {
    let attr = [program.as_raw_fd() as u32, target.as_raw_fd() as u32, attach as u32, 0];
    let fd = bpf(BPF_LINK_CREATE, &mut words(&attr))?;
    // SAFETY: the kernel just returned this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Replaces the link's program without a gap. ENOLINK where the target is gone.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf(BPF_LINK_UPDATE, &mut words(&[link.as_raw_fd() as u32, program.as_raw_fd() as u32, 0, 0])).map(drop)
}

/// Makes a link outlive this process.
pub fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = words(&[0, 0, fd.as_raw_fd() as u32, 0]);
    attr[..8].copy_from_slice(&(path.as_ptr() as u64).to_ne_bytes());
    bpf(BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Opens a pinned link.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = [0; ATTR];
    attr[..8].copy_from_slice(&(path.as_ptr() as u64).to_ne_bytes());
    let fd = bpf(BPF_OBJ_GET, &mut attr)?;
    // SAFETY: the kernel just returned this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a cgroup or netns link is attached to: the cgroup's id or the netns' inode, 0 where the target is gone.
/// `struct bpf_link_info` in linux/bpf.h.
pub fn link_target(link: BorrowedFd<'_>) -> io::Result<u64> {
    const LINK_TYPE_CGROUP: u32 = 3;
    let mut info = [0u8; 128];
    let mut attr = words(&[link.as_raw_fd() as u32, info.len() as u32, 0, 0]);
    attr[8..16].copy_from_slice(&(info.as_mut_ptr() as u64).to_ne_bytes());
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    let word = |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
    let low = u64::from(word(16));
    Ok(if word(0) == LINK_TYPE_CGROUP { low | u64::from(word(20)) << 32 } else { low })
}

/// `union bpf_attr` is larger, but the kernel takes what the caller gives and treats the rest as zero.
const ATTR: usize = 64;

fn words(values: &[u32; 4]) -> [u8; ATTR] {
    let mut attr = [0; ATTR];
    for (chunk, value) in attr.chunks_exact_mut(4).zip(values) {
        chunk.copy_from_slice(&value.to_ne_bytes());
    }
    attr
}

fn bpf(command: libc::c_long, attr: &mut [u8; ATTR]) -> io::Result<i32> {
    // SAFETY: `attr` is writable for its whole length; the pointers in it are to buffers that outlive the call.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), ATTR) };
    if ret >= 0 { Ok(ret as i32) } else { Err(io::Error::last_os_error()) }
}
