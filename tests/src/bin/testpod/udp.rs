//! `testpod udp` and `udp-serve`.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::Result;
use clap::Args as ClapArgs;
use sealane_tests::report::{End, Event, Outcome};
use sha2::{Digest, Sha256};

use crate::exchange::{hex, name, plain};
use crate::tell;

#[derive(ClapArgs)]
pub struct ServeArgs {
    /// Address and port.
    #[arg(long)]
    listen: SocketAddr,
}

#[derive(ClapArgs)]
pub struct Args {
    /// Destination.
    #[arg(long)]
    to: SocketAddr,
    /// The datagram.
    #[arg(long)]
    text: String,
    /// connect(2) and send(2) instead of sendto(2).
    #[arg(long)]
    connect: bool,
    /// How long to wait for the answer, in milliseconds.
    #[arg(long, default_value_t = 2_000)]
    limit: u64,
}

/// Echoes each datagram, and tells of it.
pub fn serve(args: &ServeArgs) -> Result<()> {
    let socket = UdpSocket::bind(args.listen)?;
    tell(&Event::Listening { local: plain(socket.local_addr()?) })?;
    let mut buffer = vec![0; 65_536];
    loop {
        let (size, peer) = socket.recv_from(&mut buffer)?;
        let sha256 = hex(&Sha256::digest(&buffer[..size]));
        tell(&Event::Closed { peer: plain(peer), received: size as u64, sha256, end: End::Enough })?;
        socket.send_to(&buffer[..size], peer)?;
    }
}

pub fn run(args: &Args) -> Outcome {
    exchange(args).unwrap_or_else(|error| Outcome::never(name(&error)))
}

fn exchange(args: &Args) -> io::Result<Outcome> {
    let any: SocketAddr = if args.to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(Duration::from_millis(args.limit)))?;
    let sent = if args.connect {
        socket.connect(args.to)?;
        socket.send(args.text.as_bytes())?
    } else {
        socket.send_to(args.text.as_bytes(), args.to)?
    };
    let mut buffer = vec![0; 65_536];
    let (size, end, error) = match socket.recv(&mut buffer) {
        Ok(size) => (size, End::Enough, None),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => (0, End::Timeout, None),
        Err(error) => (0, End::Error, Some(name(&error))),
    };
    Ok(Outcome {
        connected: args.connect,
        error,
        peer: Some(args.to),
        local: socket.local_addr().ok(),
        sent: sent as u64,
        sent_sha256: hex(&Sha256::digest(&args.text.as_bytes()[..sent])),
        received: size as u64,
        sha256: hex(&Sha256::digest(&buffer[..size])),
        text: String::from_utf8_lossy(&buffer[..size]).into_owned(),
        end,
        ..Outcome::never(String::new())
    })
}
