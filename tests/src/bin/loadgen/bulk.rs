//! `loadgen bulk`.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sealane_tests::report::Sample;

use crate::{CHUNK, Load, SINK, connect, join};

/// Counts what the server has received, over the time until it said so.
pub fn run(load: &Load) -> Result<Sample> {
    let streams: Vec<_> = (0..load.connections).map(|_| connect(load.to)).collect::<Result<_>>()?;
    let begun = Instant::now();
    let deadline = begun + Duration::from_secs_f64(load.seconds);
    let sent: Vec<u64> = std::thread::scope(|scope| {
        join(streams.into_iter().map(|stream| scope.spawn(move || pour(stream, deadline))).collect())
    })?;
    let seconds = begun.elapsed().as_secs_f64();
    Ok(Sample { ops: load.connections as u64, bytes: sent.iter().sum(), seconds, p50_us: 0.0, p99_us: 0.0 })
}

fn pour(mut stream: TcpStream, deadline: Instant) -> Result<u64> {
    let chunk = vec![SINK; CHUNK];
    let mut sent = 0;
    loop {
        stream.write_all(&chunk)?;
        sent += CHUNK as u64;
        if Instant::now() >= deadline {
            break;
        }
    }
    stream.shutdown(Shutdown::Write)?;
    let mut received = [0; 8];
    stream.read_exact(&mut received)?;
    let received = u64::from_be_bytes(received);
    ensure!(received == sent, "{sent} bytes sent, {received} received");
    Ok(sent)
}
