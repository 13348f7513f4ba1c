//! Bytes both ways over one connection: payloads that a seed makes, digests, how it ended.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use sealane_tests::report::End;
use sha2::{Digest, Sha256};

const CHUNK: usize = 64 * 1024;

/// What to send.
#[derive(Clone, Debug)]
pub enum Payload {
    /// These bytes.
    Text(Vec<u8>),
    /// So many bytes of a generator.
    Seeded { bytes: u64, seed: u64 },
}

/// What was read.
pub struct Received {
    pub bytes: u64,
    pub sha256: String,
    pub head: Vec<u8>,
    pub end: End,
    pub error: Option<String>,
}

/// What was written.
pub struct Sent {
    pub bytes: u64,
    pub sha256: String,
    pub error: Option<String>,
}

impl Payload {
    /// Writes all of it, from offset `skip` on (already sent by other means), until an error.
    pub fn write(&self, mut out: impl Write, skip: u64) -> Sent {
        let (mut hash, mut at, mut error) = (Sha256::new(), 0_u64, None);
        for chunk in self.chunks() {
            let fresh = chunk.get(usize::try_from(skip.saturating_sub(at)).unwrap_or(usize::MAX)..).unwrap_or_default();
            if let Err(failed) = out.write_all(fresh) {
                error = Some(name(&failed));
                break;
            }
            hash.update(&chunk);
            at += chunk.len() as u64;
        }
        Sent { bytes: at, sha256: hex(&hash.finalize()), error }
    }

    /// At most the first [`CHUNK`] bytes.
    pub fn head(&self) -> Vec<u8> {
        self.chunks().next().unwrap_or_default()
    }

    fn chunks(&self) -> Box<dyn Iterator<Item = Vec<u8>> + '_> {
        match self {
            Self::Text(text) => Box::new(text.chunks(CHUNK).map(<[u8]>::to_vec)),
            Self::Seeded { bytes, seed } => {
                let (mut left, mut state) = (*bytes, seed.wrapping_mul(2).wrapping_add(1));
                Box::new(std::iter::from_fn(move || {
                    let size = usize::try_from(left.min(CHUNK as u64)).unwrap_or(CHUNK);
                    left -= size as u64;
                    (size > 0).then(|| random(&mut state, size))
                }))
            }
        }
    }
}

/// Xorshift: enough to make every block of a stream different.
fn random(state: &mut u64, size: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// Reads until the end, an error, `enough` bytes or the deadline; `each` sees every piece.
pub fn read_all(
    stream: &TcpStream,
    enough: Option<u64>,
    limit: Duration,
    mut each: impl FnMut(&[u8]) -> io::Result<()>,
) -> Received {
    let (mut hash, mut head, mut bytes, mut error) = (Sha256::new(), Vec::new(), 0_u64, None);
    let deadline = Instant::now() + limit;
    let mut buffer = vec![0; CHUNK];
    let end = loop {
        if enough.is_some_and(|enough| bytes >= enough) {
            break End::Enough;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || stream.set_read_timeout(Some(left)).is_err() {
            break End::Timeout;
        }
        match (&*stream).read(&mut buffer) {
            Ok(0) => break End::Eof,
            Ok(n) => {
                let piece = &buffer[..n];
                bytes += n as u64;
                hash.update(piece);
                head.extend_from_slice(&piece[..n.min(4096_usize.saturating_sub(head.len()))]);
                if let Err(failed) = each(piece) {
                    error = Some(name(&failed));
                    break End::Error;
                }
            }
            Err(failed) if failed.kind() == io::ErrorKind::Interrupted => {}
            Err(failed) => {
                error = Some(name(&failed));
                break end_of(&failed);
            }
        }
    };
    Received { bytes, sha256: hex(&hash.finalize()), head, end, error }
}

/// Writes and reads at once, as a client must that talks to an echo.
pub fn both_ways(
    stream: &TcpStream,
    payload: &Payload,
    skip: u64,
    half_close: bool,
    enough: Option<u64>,
    limit: Duration,
) -> (Sent, Received) {
    let _ = stream.set_write_timeout(Some(limit));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let sent = payload.write(stream, skip);
            if half_close && sent.error.is_none() {
                let _ = stream.shutdown(Shutdown::Write);
            }
            sent
        });
        let received = read_all(stream, enough, limit, |_| Ok(()));
        let lost = |_| Sent { bytes: 0, sha256: String::new(), error: Some("PANIC".into()) };
        (writer.join().unwrap_or_else(lost), received)
    })
}

/// How a read error ends a stream.
pub fn end_of(error: &io::Error) -> End {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ECONNRESET | Errno::EPIPE) => End::Reset,
        Some(Errno::EAGAIN) => End::Timeout,
        _ => End::Error,
    }
}

/// The error's name in errno(3).
pub fn name(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), |code| format!("{:?}", Errno::from_raw(code)))
}

/// IPv4-mapped addresses as IPv4.
pub fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_makes_the_same_bytes_and_skipping_leaves_the_digest() {
        let payload = Payload::Seeded { bytes: 150_000, seed: 7 };
        let (mut whole, mut rest) = (Vec::new(), Vec::new());
        let sent = payload.write(&mut whole, 0);
        let again = payload.write(&mut rest, 70_000);
        assert_eq!((sent.bytes, whole.len()), (150_000, 150_000));
        assert_eq!(sent.sha256, again.sha256);
        assert_eq!(rest, whole[70_000..]);
        assert_ne!(whole[..65_536], whole[65_536..131_072]);
    }
}
