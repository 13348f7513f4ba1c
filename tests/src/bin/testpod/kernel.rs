//! What has no safe interface: disconnecting a socket, and connecting by io_uring.

#![expect(unsafe_code, reason = "no crate at hand wraps connect(AF_UNSPEC), and io_uring's queue takes raw addresses")]

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
