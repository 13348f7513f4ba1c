//! `testpod raw`: a hand-made segment, past every socket hook but the one for raw sockets. IPv4 alone.

use std::io::{self, Read};
use std::net::{SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use clap::Args as ClapArgs;
use etherparse::{IpNumber, Ipv4Slice, TcpHeader, TcpSlice};
use sealane_tests::report::{End, Outcome};
use socket2::{Domain, Protocol, Socket, Type};

use crate::exchange::name;

#[derive(ClapArgs)]
pub struct Args {
    /// Destination.
    #[arg(long)]
    to: SocketAddrV4,
    /// Source; its port should be one that nothing uses.
    #[arg(long)]
    from: SocketAddrV4,
    /// Payload of the SYN.
    #[arg(long)]
    text: String,
    /// How long to wait for an answer, in milliseconds.
    #[arg(long, default_value_t = 1_000)]
    limit: u64,
}

/// `connected` says that a SYN-ACK came back; our kernel, which knows no such connection, then resets it.
pub fn run(args: &Args) -> Outcome {
    match send(args) {
        Ok(end) => Outcome {
            connected: end == End::Enough,
            error: None,
            peer: Some(SocketAddr::V4(args.to)),
            local: Some(SocketAddr::V4(args.from)),
            sent: args.text.len() as u64,
            end,
            ..Outcome::never(String::new())
        },
        Err(error) => Outcome::never(name(&error)),
    }
}

fn send(args: &Args) -> io::Result<End> {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP))?;
    let mut syn = TcpHeader::new(args.from.port(), args.to.port(), 1_000, 65_000);
    syn.syn = true;
    let checksum = syn.calc_checksum_ipv4_raw(args.from.ip().octets(), args.to.ip().octets(), args.text.as_bytes());
    syn.checksum = checksum.map_err(io::Error::other)?;
    let segment = [&syn.to_bytes(), args.text.as_bytes()].concat();
    // Raw sockets take no port.
    socket.bind(&SocketAddrV4::new(*args.from.ip(), 0).into())?;
    socket.send_to(&segment, &SocketAddrV4::new(*args.to.ip(), 0).into())?;
    let deadline = Instant::now() + Duration::from_millis(args.limit);
    let mut buffer = [0; 2048];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(End::Timeout);
        }
        socket.set_read_timeout(Some(left))?;
        let size = match (&socket).read(&mut buffer) {
            Ok(size) => size,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(End::Timeout),
            Err(error) => return Err(error),
        };
        if let Some(end) = answer(args, &buffer[..size]) {
            return Ok(end);
        }
    }
}

/// What a segment of the peer says: RST, or SYN-ACK.
fn answer(args: &Args, packet: &[u8]) -> Option<End> {
    let ip = Ipv4Slice::from_slice(packet).ok()?;
    let tcp = TcpSlice::from_slice(ip.payload().payload).ok()?;
    let ours = ip.payload().ip_number == IpNumber::TCP
        && ip.header().source_addr() == *args.to.ip()
        && (tcp.source_port(), tcp.destination_port()) == (args.to.port(), args.from.port());
    match (ours, tcp.rst(), tcp.syn()) {
        (true, true, _) => Some(End::Reset),
        (true, false, true) => Some(End::Enough),
        _ => None,
    }
}
