//! What has no safe interface: disconnecting a socket, options longer than their value, and connecting by io_uring.

#![expect(
    unsafe_code,
    reason = "no crate at hand wraps connect(AF_UNSPEC) or long options, and io_uring's queue takes raw addresses"
)]

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};
use socket2::{SockAddr, Socket};

/// connect(2) with AF_UNSPEC: the socket is unconnected again and may connect elsewhere.
pub fn disconnect(socket: &Socket) -> io::Result<()> {
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let size = size_of_val(&nowhere) as libc::socklen_t;
    // SAFETY: `nowhere` is a sockaddr of `size` bytes and outlives the call.
    let done = unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, size) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// SO_KEEPALIVE, its int at the head of more than a page: the kernel reads the int alone.
pub fn long_option(socket: &Socket) -> io::Result<()> {
    let mut value = [0_u8; 8192];
    value[..4].copy_from_slice(&1_i32.to_ne_bytes());
    let size = size_of_val(&value) as libc::socklen_t;
    // SAFETY: `value` has `size` bytes and outlives the call.
    let done = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE, value.as_ptr().cast(), size)
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    if socket.keepalive()? { Ok(()) } else { Err(io::Error::other("the option has no effect")) }
}

/// IORING_OP_CONNECT; with `poll`, by the kernel's own submission thread (SQPOLL).
pub fn uring_connect(socket: &Socket, to: SocketAddr, poll: bool) -> io::Result<()> {
    let address = SockAddr::from(to);
    let mut ring = if poll { IoUring::builder().setup_sqpoll(100).build(2)? } else { IoUring::new(2)? };
    let connect = opcode::Connect::new(types::Fd(socket.as_raw_fd()), address.as_ptr().cast(), address.len()).build();
    // SAFETY: `address` and the descriptor outlive the completion, which is waited for before either is dropped.
    unsafe { ring.submission().push(&connect).map_err(io::Error::other)? };
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().map_or(-libc::EIO, |done| done.result());
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
}
