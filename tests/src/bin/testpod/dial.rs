//! The many ways to make one TCP connection.

use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use clap::{Args, ValueEnum};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::exchange::{Payload, name};
use crate::kernel;

/// How to dial.
#[derive(Args)]
pub struct Dial {
    /// Which kind of client.
    #[arg(long, value_enum, default_value = "plain")]
    kind: Kind,
    /// `--kind reuse`: where the socket connects first, in this order.
    #[arg(long, required_if_eq("kind", "reuse"))]
    first: Vec<SocketAddr>,
    /// bind(2) to it before connecting.
    #[arg(long)]
    bind: Option<SocketAddr>,
    /// SO_BINDTODEVICE before connecting.
    #[arg(long)]
    device: Option<String>,
    /// SO_BINDTODEVICE after connecting.
    #[arg(long)]
    device_after: Option<String>,
    /// SO_MARK before connecting.
    #[arg(long)]
    mark: Option<u32>,
    /// SO_MARK after connecting.
    #[arg(long)]
    mark_after: Option<u32>,
    /// IP_TRANSPARENT before connecting.
    #[arg(long)]
    transparent: bool,
    /// SO_DONTROUTE before connecting.
    #[arg(long)]
    dontroute: bool,
    /// SO_KEEPALIVE before connecting, as an option value of two pages.
    #[arg(long)]
    long_option: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// socket, connect.
    Plain,
    /// The IPv4 address as IPv4-mapped, on AF_INET6.
    Mapped,
    /// IPPROTO_MPTCP.
    Mptcp,
    /// TCP_FASTOPEN_CONNECT: the SYN leaves with the first write.
    FastopenConnect,
    /// sendto with MSG_FASTOPEN instead of connect.
    MsgFastopen,
    /// O_NONBLOCK and poll.
    Nonblocking,
    /// io_uring.
    Uring,
    /// io_uring with a submission thread of the kernel.
    UringSqpoll,
    /// Connects to each `--first`, disconnects (AF_UNSPEC), and connects again with the same socket.
    Reuse,
}

/// A connection, blocking.
pub struct Dialled {
    pub stream: TcpStream,
    /// Bytes of the payload that have left already.
    pub sent: u64,
    /// The name of the first error that an option gave; the connection goes on without it.
    pub option_error: Option<String>,
}

/// Makes the connection as asked.
pub fn dial(how: &Dial, to: SocketAddr, payload: &Payload, limit: Duration) -> io::Result<Dialled> {
    let to = if how.kind == Kind::Mapped { mapped(to) } else { to };
    let protocol = if how.kind == Kind::Mptcp { Protocol::MPTCP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol))?;
    // Bounds a blocking connect(2) too.
    socket.set_write_timeout(Some(limit))?;
    let mut options = Options::default();
    options.note(how.device.as_ref().map(|device| socket.bind_device(Some(device.as_bytes()))));
    options.note(how.mark.map(|mark| socket.set_mark(mark)));
    options.note(how.transparent.then(|| socket.set_ip_transparent_v4(true)));
    options.note(how.dontroute.then(|| Ok(setsockopt(&socket, sockopt::DontRoute, &true)?)));
    options.note(how.long_option.then(|| kernel::long_option(&socket)));
    if let Some(bind) = how.bind {
        socket.bind(&bind.into())?;
    }
    let sent = connect(how, &socket, to, payload, limit)?;
    options.note(how.device_after.as_ref().map(|device| socket.bind_device(Some(device.as_bytes()))));
    options.note(how.mark_after.map(|mark| socket.set_mark(mark)));
    Ok(Dialled { stream: socket.into(), sent, option_error: options.error })
}

/// Connects; the answer is how many bytes of the payload went along.
fn connect(how: &Dial, socket: &Socket, to: SocketAddr, payload: &Payload, limit: Duration) -> io::Result<u64> {
    match how.kind {
        Kind::Plain | Kind::Mapped | Kind::Mptcp => socket.connect(&to.into()).map(|()| 0),
        Kind::FastopenConnect => {
            setsockopt(socket, sockopt::TcpFastOpenConnect, &true)?;
            socket.connect(&to.into())?;
            socket.send(&payload.head()).map(|n| n as u64)
        }
        Kind::MsgFastopen => {
            let sent = socket.send_to_with_flags(&payload.head(), &to.into(), libc::MSG_FASTOPEN)?;
            Ok(sent as u64)
        }
        Kind::Nonblocking => {
            socket.connect_timeout(&to.into(), limit)?;
            Ok(0)
        }
        Kind::Uring => kernel::uring_connect(socket, to, false).map(|()| 0),
        Kind::UringSqpoll => kernel::uring_connect(socket, to, true).map(|()| 0),
        Kind::Reuse => {
            for first in &how.first {
                socket.connect(&(*first).into())?;
                kernel::disconnect(socket)?;
            }
            socket.connect(&to.into())?;
            Ok(0)
        }
    }
}

#[derive(Default)]
struct Options {
    error: Option<String>,
}

impl Options {
    fn note(&mut self, result: Option<io::Result<()>>) {
        if let (None, Some(Err(error))) = (&self.error, result) {
            self.error = Some(name(&error));
        }
    }
}

fn mapped(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) => (Ipv6Addr::from_bits(v4.ip().to_ipv6_mapped().to_bits()), v4.port()).into(),
        SocketAddr::V6(_) => address,
    }
}
