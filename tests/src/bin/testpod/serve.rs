//! `testpod serve`.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args as ClapArgs, ValueEnum};
use sealane_tests::report::{End, Event};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::exchange::{Payload, Received, plain, read_all};
use crate::tell;

#[derive(ClapArgs)]
pub struct Args {
    /// Address and port; `[::]:PORT` takes both families.
    #[arg(long)]
    listen: SocketAddr,
    /// What to do with a connection.
    #[arg(long, value_enum, default_value = "echo")]
    mode: Mode,
    /// `first`: what to say; `http`: the body's first line.
    #[arg(long, default_value = "hello")]
    text: String,
    /// `send`: how many bytes.
    #[arg(long, default_value_t = 1_000_000)]
    bytes: u64,
    /// `send`: of which generator.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long a connection may last, in seconds.
    #[arg(long, default_value_t = 60)]
    limit: u64,
    /// Listen with MPTCP.
    #[arg(long)]
    mptcp: bool,
    /// Say nothing about single connections (for load).
    #[arg(long)]
    quiet: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    /// Send back what comes; close after its end.
    Echo,
    /// Read to the end, answer its SHA-256 in hex.
    Hash,
    /// Speak first, then read to the end.
    First,
    /// One HTTP/1.1 answer that names the client, per request; keeps the connection.
    Http,
    /// Close at once.
    Close,
    /// Reset after the first bytes.
    Reset,
    /// Neither read nor write.
    Hold,
    /// Send bytes, close.
    Send,
}

pub fn run(args: &Args) -> Result<()> {
    let listener = listen(args).with_context(|| format!("cannot listen on {}", args.listen))?;
    tell(&Event::Listening { local: plain(listener.local_addr()?) })?;
    std::thread::scope(|scope| {
        loop {
            let (stream, peer) = listener.accept()?;
            scope.spawn(move || {
                if let Err(error) = serve(args, &stream, plain(peer)) {
                    eprintln!("{peer}: {error:#}");
                }
            });
        }
    })
}

fn listen(args: &Args) -> io::Result<TcpListener> {
    let protocol = if args.mptcp { Protocol::MPTCP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(args.listen), Type::STREAM, Some(protocol))?;
    if args.listen.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&args.listen.into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

fn serve(args: &Args, stream: &TcpStream, peer: SocketAddr) -> Result<()> {
    let (getpeername, local) = (stream.peer_addr().ok().map(plain), plain(stream.local_addr()?));
    if !args.quiet {
        tell(&Event::Accepted { peer, getpeername, local })?;
    }
    let limit = Duration::from_secs(args.limit);
    stream.set_write_timeout(Some(limit))?;
    let Received { bytes: received, sha256, end, .. } = answer(args, stream, peer, limit);
    if !args.quiet {
        tell(&Event::Closed { peer, received, sha256, end })?;
    }
    Ok(())
}

fn answer(args: &Args, stream: &TcpStream, peer: SocketAddr, limit: Duration) -> Received {
    let ignore = |_: &[u8]| Ok(());
    let mut out = stream;
    match args.mode {
        Mode::Echo => {
            let got = read_all(stream, None, limit, |piece| out.write_all(piece));
            let _ = stream.shutdown(Shutdown::Write);
            got
        }
        Mode::Hash => {
            let got = read_all(stream, None, limit, ignore);
            let _ = writeln!(out, "{}", got.sha256);
            got
        }
        Mode::First => {
            let _ = out.write_all(args.text.as_bytes());
            read_all(stream, None, limit, ignore)
        }
        Mode::Http => {
            let mut tail = Vec::new();
            read_all(stream, None, limit, |piece| {
                tail.extend_from_slice(piece);
                while let Some(at) = tail.windows(4).position(|w| w == b"\r\n\r\n") {
                    tail.drain(..at + 4);
                    respond(out, &args.text, peer)?;
                }
                Ok(())
            })
        }
        Mode::Close => read_all(stream, Some(0), limit, ignore),
        Mode::Reset => {
            let got = read_all(stream, Some(1), limit, ignore);
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
            got
        }
        Mode::Hold => {
            // The peek returns at the first byte or at the end; the thread then stays until the time limit.
            let _ = stream.set_read_timeout(Some(limit));
            let _ = stream.peek(&mut [0]);
            std::thread::park_timeout(limit);
            Received { bytes: 0, sha256: String::new(), head: Vec::new(), end: End::Timeout, error: None }
        }
        Mode::Send => {
            let payload = Payload::Seeded { bytes: args.bytes, seed: args.seed };
            payload.write(out, 0);
            let _ = stream.shutdown(Shutdown::Write);
            drain(stream, limit)
        }
    }
}

fn respond(mut out: impl Write, text: &str, peer: SocketAddr) -> io::Result<()> {
    let body = format!("{text}\nclient {peer}\n");
    out.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).as_bytes())
}

/// Reads what the client may still send, so that closing is no reset.
fn drain(stream: &TcpStream, limit: Duration) -> Received {
    let got = read_all(stream, None, limit, |_| Ok(()));
    let _ = (&*stream).read(&mut [0]);
    got
}
