//! `loadgen rr` and `loadgen crr`: small echoes, each one timed.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;
use sealane_tests::report::{ECHO, Sample};

use crate::{Load, connect, join};

/// Times are kept to one part in a hundred, in nanoseconds, up to a minute.
const DIGITS: u8 = 2;
const LONGEST: u64 = 60_000_000_000;

pub fn on_open_connections(load: &Load) -> Result<Sample> {
    // The first exchange opens what is between: it is not counted.
    let open = |_| {
        let mut stream = connect(load.to)?;
        exchange(&mut stream)?;
        Ok(stream)
    };
    let streams: Vec<TcpStream> = (0..load.connections).map(open).collect::<Result<_>>()?;
    run(load, streams, exchange)
}

pub fn on_new_connections(load: &Load) -> Result<Sample> {
    run(load, vec![load.to; load.connections], |to| exchange(&mut connect(*to)?))
}

/// Does the work again and again, on each of `over` by a thread of its own.
fn run<T: Send>(load: &Load, over: Vec<T>, work: impl Fn(&mut T) -> Result<()> + Sync) -> Result<Sample> {
    let begun = Instant::now();
    let deadline = begun + Duration::from_secs_f64(load.seconds);
    let worker = |mut on: T| -> Result<Histogram<u64>> {
        let mut times = Histogram::new_with_bounds(1, LONGEST, DIGITS)?;
        let mut last = Instant::now();
        loop {
            work(&mut on)?;
            let now = Instant::now();
            times.saturating_record(u64::try_from((now - last).as_nanos())?);
            if now >= deadline {
                return Ok(times);
            }
            last = now;
        }
    };
    let parts = std::thread::scope(|scope| join(over.into_iter().map(|on| scope.spawn(|| worker(on))).collect()))?;
    let seconds = begun.elapsed().as_secs_f64();
    let mut times = Histogram::<u64>::new_with_bounds(1, LONGEST, DIGITS)?;
    for part in parts {
        times.add(part)?;
    }
    let micros = |quantile| times.value_at_quantile(quantile) as f64 / 1000.0;
    let bytes = 2 * ECHO.len() as u64 * times.len();
    Ok(Sample { ops: times.len(), bytes, seconds, p50_us: micros(0.5), p99_us: micros(0.99) })
}

fn exchange(stream: &mut TcpStream) -> Result<()> {
    let mut back = [0; ECHO.len()];
    stream.write_all(&ECHO)?;
    stream.read_exact(&mut back)?;
    ensure!(back == ECHO, "another echo");
    Ok(())
}
