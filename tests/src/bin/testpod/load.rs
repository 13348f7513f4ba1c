//! `testpod load`: many connections to an echo.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Args as ClapArgs;
use sealane_tests::report::{End, Load};

use crate::dial::{self, Dial};
use crate::exchange::{Payload, both_ways, name};

#[derive(ClapArgs)]
pub struct Args {
    /// Destination, an echo.
    #[arg(long)]
    to: SocketAddr,
    #[command(flatten)]
    dial: Dial,
    /// Connections at a time.
    #[arg(long, default_value_t = 1)]
    workers: u64,
    /// Stop after so many connections in all.
    #[arg(long, default_value_t = u64::MAX)]
    count: u64,
    /// Stop after so many milliseconds.
    #[arg(long, default_value_t = 60_000)]
    millis: u64,
    /// Stop when this file exists.
    #[arg(long)]
    until: Option<PathBuf>,
    /// Each worker's pause between two connections, in milliseconds.
    #[arg(long, default_value_t = 0)]
    every: u64,
    /// Send these bytes, each time.
    #[arg(long, conflicts_with = "bytes")]
    text: Option<String>,
    /// Bytes each way.
    #[arg(long, default_value_t = 100)]
    bytes: u64,
    /// Every worker makes one connection, and none sends before all are connected.
    #[arg(long)]
    together: bool,
    /// Time limit for connecting, and again for the exchange, in milliseconds.
    #[arg(long, default_value_t = 10_000)]
    limit: u64,
}

pub fn run(args: &Args) -> Load {
    let start = Instant::now();
    let deadline = start + Duration::from_millis(args.millis);
    let started = AtomicU64::new(0);
    let barrier = args.together.then(|| Barrier::new(usize::try_from(args.workers).unwrap_or(1)));
    let count = if args.together { args.workers } else { args.count };
    let worker = || {
        let mut load = Load::default();
        loop {
            let number = started.fetch_add(1, Ordering::Relaxed);
            let told = args.until.as_ref().is_some_and(|file| file.exists());
            if number >= count || told || Instant::now() >= deadline {
                return load;
            }
            let begun = Instant::now();
            let result = exchange(args, number, barrier.as_ref());
            note(&mut load, result, begun.elapsed());
            if args.together {
                return load;
            }
            // Parking alone returns at once where a thread of the exchange has just ended.
            let next = Instant::now() + Duration::from_millis(args.every);
            while let Some(left) = next.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
                std::thread::park_timeout(left);
            }
        }
    };
    let loads: Vec<_> = std::thread::scope(|scope| {
        let thread = |_| match std::thread::Builder::new().stack_size(256 * 1024).spawn_scoped(scope, worker) {
            Ok(thread) => thread,
            // The others would wait for it at the barrier.
            Err(error) => {
                eprintln!("cannot start a thread: {error}");
                std::process::exit(1)
            }
        };
        let workers: Vec<_> = (0..args.workers).map(thread).collect();
        workers.into_iter().filter_map(|worker| worker.join().ok()).collect()
    });
    Load { seconds: start.elapsed().as_secs_f64(), ..loads.into_iter().fold(Load::default(), add) }
}

fn exchange(args: &Args, seed: u64, barrier: Option<&Barrier>) -> Result<(), String> {
    let limit = Duration::from_millis(args.limit);
    let payload = match &args.text {
        Some(text) => Payload::Text(text.clone().into_bytes()),
        None => Payload::Seeded { bytes: args.bytes, seed },
    };
    let dialled = dial::dial(&args.dial, args.to, &payload, limit);
    if let Some(barrier) = barrier {
        barrier.wait();
    }
    let dialled = dialled.map_err(|error| format!("connect {}", name(&error)))?;
    let (sent, received) = both_ways(&dialled.stream, &payload, dialled.sent, true, None, limit);
    if let Some(error) = received.error.or(sent.error) {
        return Err(format!("exchange {error}"));
    }
    match received.end {
        End::Eof if received.sha256 == sent.sha256 => Ok(()),
        End::Eof if received.bytes < sent.bytes => Err("cut short".into()),
        End::Eof => Err("wrong bytes".into()),
        other @ (End::Reset | End::Timeout | End::Enough | End::Error | End::Never) => {
            Err(format!("exchange {other:?}"))
        }
    }
}

fn note(load: &mut Load, result: Result<(), String>, took: Duration) {
    load.attempts += 1;
    match result {
        Ok(()) => {
            load.ok += 1;
            load.slowest_ms = load.slowest_ms.max(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
        }
        Err(failure) => *load.failures.entry(failure).or_default() += 1,
    }
}

fn add(sum: Load, part: Load) -> Load {
    let mut failures: BTreeMap<String, u64> = sum.failures;
    for (failure, count) in part.failures {
        *failures.entry(failure).or_default() += count;
    }
    Load {
        attempts: sum.attempts + part.attempts,
        ok: sum.ok + part.ok,
        failures,
        seconds: 0.0,
        slowest_ms: sum.slowest_ms.max(part.slowest_ms),
    }
}
