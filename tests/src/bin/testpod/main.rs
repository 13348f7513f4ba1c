//! The client and server that run inside the lab's pods: synchronous, with a time limit on everything; they print what
//! they saw as JSON, one object a line.

#![deny(unsafe_code)]

mod connect;
mod dial;
mod exchange;
mod serve;

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
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Serve(args) => serve::run(&args),
        Command::Connect(args) => tell(&connect::run(&args)),
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
