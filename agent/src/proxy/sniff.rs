//! PERMISSIVE tells mTLS from plaintext by a connection's first bytes, which are taken from the socket and replayed.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::stream::Replay;

/// Enough for the usual first segment, so that a plaintext request reaches the application in one piece.
const FIRST_READ: usize = 4096;

/// What a connection's first bytes say.
pub(super) enum Opening {
    /// A ClientHello begins.
    Tls(Replay),
    /// Anything else, or an end before it could be told.
    Plaintext(Replay),
    /// Nothing yet: the application may be the one to speak first.
    Silent(TcpStream),
}

/// Reads until the bytes can be told apart. `silence`: how long to wait for the first one. `begun`: how long for the rest of a
/// header whose first bytes look like TLS; a peer that then stalls is served in plaintext, as PERMISSIVE promises.
pub(super) async fn first(tcp: TcpStream, silence: Duration, begun: Duration) -> io::Result<Opening> {
    let mut taken = BytesMut::new();
    let tls = match timeout(silence, read_some(&tcp, &mut taken)).await {
        Ok(read) => {
            read?;
            finish_header(&tcp, &mut taken, begun).await?
        }
        Err(_) => return Ok(Opening::Silent(tcp)),
    };
    Ok(opening(tcp, taken, tls))
}

/// The same for a silent connection whose application has been dialled. As long as the application has not sent its first
/// byte (or ended), a ClientHello is still one.
pub(super) async fn late(tcp: TcpStream, app: &TcpStream, begun: Duration) -> io::Result<Opening> {
    let mut taken = BytesMut::new();
    let header = async {
        read_some(&tcp, &mut taken).await?;
        finish_header(&tcp, &mut taken, begun).await
    };
    let mut byte = [0];
    let tls = tokio::select! {
        biased;
        tls = header => tls?,
        // An error of the application's is not ours to judge: the copy will meet it.
        _ = app.peek(&mut byte) => false,
    };
    Ok(opening(tcp, taken, tls))
}

fn opening(tcp: TcpStream, taken: BytesMut, tls: bool) -> Opening {
    let stream = Replay::new(tcp, taken.freeze());
    if tls { Opening::Tls(stream) } else { Opening::Plaintext(stream) }
}

/// True once the bytes are a ClientHello's; false once they are not, or the stream has ended, or the time is up.
async fn finish_header(tcp: &TcpStream, taken: &mut BytesMut, begun: Duration) -> io::Result<bool> {
    let header = async {
        let mut ended = taken.is_empty();
        loop {
            match is_client_hello(taken) {
                Some(tls) => return Ok(tls),
                None if ended => return Ok(false),
                None => ended = read_some(tcp, taken).await? == 0,
            }
        }
    };
    timeout(begun, header).await.unwrap_or(Ok(false))
}

/// Zero at the end of the stream. While it waits for the first byte it holds no buffer: silence may last.
async fn read_some(tcp: &TcpStream, taken: &mut BytesMut) -> io::Result<usize> {
    loop {
        tcp.readable().await?;
        taken.reserve(FIRST_READ);
        match tcp.try_read_buf(taken) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if taken.is_empty() {
                    *taken = BytesMut::new();
                }
            }
            read => return read,
        }
    }
}

/// A record of type handshake (22), version 3.0 to 3.4, at most 2^14 bytes, with a ClientHello (1). `None`: too short to tell.
fn is_client_hello(bytes: &[u8]) -> Option<bool> {
    let expected: [fn(u8) -> bool; 6] = [|b| b == 22, |b| b == 3, |b| b <= 4, |b| b <= 0x40, |_| true, |b| b == 1];
    if !bytes.iter().zip(expected).all(|(byte, fits)| fits(*byte)) {
        return Some(false);
    }
    (bytes.len() >= expected.len()).then_some(true)
}

#[cfg(test)]
mod tests;
