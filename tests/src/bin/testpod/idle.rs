//! `testpod idle`: many open connections, and nothing on them.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args as ClapArgs;

#[derive(ClapArgs)]
pub struct Args {
    /// Destination, an echo.
    #[arg(long)]
    to: SocketAddr,
    /// How many.
    #[arg(long)]
    count: usize,
    /// Time limit for connecting and for the one echo of each, in milliseconds.
    #[arg(long, default_value_t = 10_000)]
    limit: u64,
}

/// Opens one after the other, each with one echo, and holds them until it is killed.
pub fn run(args: &Args) -> Result<()> {
    let limit = Duration::from_millis(args.limit);
    let open = |number: usize| {
        let mut stream = TcpStream::connect_timeout(&args.to, limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.write_all(b"idle")?;
        stream.read_exact(&mut [0; 4]).with_context(|| format!("connection {number}"))?;
        Ok(stream)
    };
    let held: Vec<TcpStream> = (0..args.count).map(open).collect::<Result<_>>()?;
    while !held.is_empty() {
        std::thread::park();
    }
    Ok(())
}
