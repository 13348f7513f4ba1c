//! The client and server that run inside the lab's pods: synchronous, with a time limit on everything; they print what
//! they saw as JSON, one object a line.

#![deny(unsafe_code)]

mod connect;
mod dial;
mod exchange;
mod idle;
mod kernel;
mod load;
mod ping;
mod raw;
mod serve;
mod tls;
mod udp;

use std::io::Write;

use anyhow::Result;
use clap::{Parser, Subcommand};
use serde::Serialize;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Listens until it is killed.
    Serve(serve::Args),
    /// One connection: dial, write, read to the end.
    Connect(connect::Args),
    /// Many connections: concurrent, one after the other, or in closed loops.
    Load(load::Args),
    /// Connections that stay open and are idle.
    Idle(idle::Args),
    /// One connection that stays open, and a small echo again and again.
    Ping(ping::Args),
    /// One raw TCP segment, a SYN with the payload in it, and what comes back.
    Raw(raw::Args),
    /// Echoes datagrams until it is killed.
    UdpServe(udp::ServeArgs),
    /// One datagram, and the answer.
    Udp(udp::Args),
    /// A TLS client with any certificate that trusts everybody: a peer which is not Sealane.
    Tls(tls::Args),
    /// The same as a server, echoing until it is killed.
    TlsServe(tls::ServeArgs),
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Serve(args) => serve::run(&args),
        Command::Connect(args) => tell(&connect::run(&args)),
        Command::Load(args) => tell(&load::run(&args)),
        Command::Idle(args) => idle::run(&args),
        Command::Ping(args) => tell(&ping::run(&args)),
        Command::Raw(args) => tell(&raw::run(&args)),
        Command::UdpServe(args) => udp::serve(&args),
        Command::Udp(args) => tell(&udp::run(&args)),
        Command::Tls(args) => tell(&tls::run(&args)?),
        Command::TlsServe(args) => tls::serve(&args),
    }
}

/// Prints one line, whole.
fn tell(value: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_string(value)?;
    line.push('\n');
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes())?;
    Ok(out.flush()?)
}
