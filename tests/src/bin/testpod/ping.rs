//! `testpod ping`: does an open connection stay open?

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args as ClapArgs;
use sealane_tests::report::Pings;

use crate::exchange::name;

#[derive(ClapArgs)]
pub struct Args {
    /// Destination, an echo.
    #[arg(long)]
    to: SocketAddr,
    /// What each round sends; else its number.
    #[arg(long)]
    text: Option<String>,
    /// Pause between two rounds, in milliseconds.
    #[arg(long, default_value_t = 20)]
    every: u64,
    /// How long in all, in milliseconds.
    #[arg(long, default_value_t = 3_000)]
    millis: u64,
    /// Until standard input ends, instead of for so long.
    #[arg(long, conflicts_with = "millis")]
    until_stdin: bool,
    /// Stop when this file exists.
    #[arg(long)]
    until: Option<PathBuf>,
    /// Time limit for connecting and for each echo, in milliseconds.
    #[arg(long, default_value_t = 5_000)]
    limit: u64,
}

pub fn run(args: &Args) -> Pings {
    let mut pings = Pings { connected: false, rounds: 0, error: None, slowest_ms: 0 };
    let limit = Duration::from_millis(args.limit);
    let stream = match TcpStream::connect_timeout(&args.to, limit) {
        Ok(stream) => stream,
        Err(error) => return Pings { error: Some(name(&error)), ..pings },
    };
    pings.connected = true;
    let is_over = over(args);
    while pings.error.is_none() && !is_over() {
        let begun = Instant::now();
        let number = pings.rounds.to_be_bytes();
        match round(&stream, args.text.as_ref().map_or(&number, |text| text.as_bytes()), limit) {
            Ok(()) => pings.rounds += 1,
            Err(error) => pings.error = Some(name(&error)),
        }
        pings.slowest_ms = pings.slowest_ms.max(u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX));
        thread::park_timeout(Duration::from_millis(args.every));
    }
    pings
}

/// Tells when to stop.
fn over(args: &Args) -> Box<dyn Fn() -> bool> {
    if args.until_stdin {
        let end = thread::spawn(|| io::copy(&mut io::stdin(), &mut io::sink()));
        return Box::new(move || end.is_finished());
    }
    let deadline = Instant::now() + Duration::from_millis(args.millis);
    let told = args.until.clone();
    Box::new(move || Instant::now() >= deadline || told.as_ref().is_some_and(|file| file.exists()))
}

fn round(mut stream: &TcpStream, payload: &[u8], limit: Duration) -> io::Result<()> {
    let mut back = vec![0; payload.len()];
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(payload)?;
    stream.read_exact(&mut back)?;
    if payload == back { Ok(()) } else { Err(io::Error::other("wrong bytes")) }
}
