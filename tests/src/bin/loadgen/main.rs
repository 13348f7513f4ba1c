//! The load of `cargo xtask bench`: one server and three clients, the same for whatever is between them. Blocking calls and a
//! thread for each connection; memory does not grow with time.

#![forbid(unsafe_code)]

mod bulk;
mod exchange;
mod serve;

use std::net::{SocketAddr, TcpStream};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::{Args, Parser, Subcommand};

/// What one write sends and one read takes at most, in bulk.
const CHUNK: usize = 128 * 1024;
/// A connection that stands still for so long is broken.
const LIMIT: Duration = Duration::from_secs(10);
/// A connection's first byte where everything is for the sink; else it comes back.
const SINK: u8 = b'S';

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Echo and sink, until it is killed
    Serve {
        /// Address and port
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Streams of bytes, towards the server
    Bulk(Load),
    /// Open connections, each with a small echo again and again
    Rr(Load),
    /// New connections: connect, one small echo, close
    Crr(Load),
}

/// What every client takes.
#[derive(Args)]
struct Load {
    /// The server, or what stands for it
    #[arg(long)]
    to: SocketAddr,
    /// Connections at a time
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// How long; each connection does its work at least once
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
}

fn main() -> Result<()> {
    let sample = match Cli::parse().command {
        Command::Serve { listen } => return serve::run(listen),
        Command::Bulk(load) => bulk::run(&load)?,
        Command::Rr(load) => exchange::on_open_connections(&load)?,
        Command::Crr(load) => exchange::on_new_connections(&load)?,
    };
    println!("{}", serde_json::to_string(&sample)?);
    Ok(())
}

/// A connection to the server.
fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(to).with_context(|| format!("cannot connect to {to}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// What every thread yields; the first failure is the failure of all.
fn join<T>(threads: Vec<ScopedJoinHandle<'_, Result<T>>>) -> Result<Vec<T>> {
    threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?).collect()
}
