//! What `testpod` prints: one JSON object a line.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// A line of `testpod serve`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// It listens.
    Listening {
        /// Where.
        local: SocketAddr,
    },
    /// It has accepted a connection.
    Accepted {
        /// What accept(2) reported; an IPv4-mapped address is shown as IPv4.
        peer: SocketAddr,
        /// What getpeername(2) reports; `None` where it fails, as after a reset.
        getpeername: Option<SocketAddr>,
        /// What getsockname(2) reports.
        local: SocketAddr,
    },
    /// A connection has ended, or a datagram was received.
    Closed {
        /// As in `Accepted`.
        peer: SocketAddr,
        /// Bytes received.
        received: u64,
        /// Their digest, in hex.
        sha256: String,
        /// How reading ended.
        end: End,
    },
}

/// How a stream of bytes ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// In order.
    Eof,
    /// By a reset.
    Reset,
    /// Not within the time limit.
    Timeout,
    /// The reader had what it wanted.
    Enough,
    /// By another error.
    Error,
    /// The connection was never made.
    Never,
}

/// The result of `testpod connect`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// The handshake of TCP was done.
    pub connected: bool,
    /// The first error, by its name in errno(3); a time limit of the program's own is `TIMEOUT`.
    pub error: Option<String>,
    /// The first error that a socket option gave; the connection went on without it.
    pub option_error: Option<String>,
    /// What getpeername(2) reports.
    pub peer: Option<SocketAddr>,
    /// What getsockname(2) reports.
    pub local: Option<SocketAddr>,
    /// Bytes written.
    pub sent: u64,
    /// Digest of the bytes written, in hex.
    pub sent_sha256: String,
    /// Bytes received.
    pub received: u64,
    /// Their digest, in hex.
    pub sha256: String,
    /// The first 4,096 of them, as text.
    pub text: String,
    /// How reading ended.
    pub end: End,
    /// From before connect(2) to after it.
    pub connect_ms: u64,
}

impl Outcome {
    /// There was no connection.
    pub fn never(error: String) -> Self {
        Self {
            connected: false,
            // What a blocking connect says when SO_SNDTIMEO has passed.
            error: Some(if error == "EINPROGRESS" { "TIMEOUT".into() } else { error }),
            option_error: None,
            peer: None,
            local: None,
            sent: 0,
            sent_sha256: String::new(),
            received: 0,
            sha256: String::new(),
            text: String::new(),
            end: End::Never,
            connect_ms: 0,
        }
    }

    /// Everything sent came back, and the stream ended in order.
    pub fn echoed(&self) -> bool {
        self.connected && self.sent > 0 && self.sha256 == self.sent_sha256 && matches!(self.end, End::Eof | End::Enough)
    }

    /// Nothing came back but a TLS alert (7 bytes, the first 21), if that, and the connection was refused, reset or ended.
    pub fn refused(&self) -> bool {
        let nothing = self.received == 0 || self.received == 7 && self.text.starts_with('\x15');
        nothing && matches!(self.end, End::Reset | End::Never | End::Eof)
    }
}

/// The result of `testpod load`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Connections tried.
    pub attempts: u64,
    /// Those that got back everything they sent, and a stream that ended in order.
    pub ok: u64,
    /// The others, by where and how: `connect ECONNREFUSED`, `exchange ECONNRESET`, `wrong bytes`.
    pub failures: BTreeMap<String, u64>,
    /// How long it took.
    pub seconds: f64,
    /// The slowest connection that was ok, in milliseconds.
    pub slowest_ms: u64,
}

/// The result of `testpod ping`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pings {
    /// The connection was made.
    pub connected: bool,
    /// Echoes that came back whole.
    pub rounds: u64,
    /// Why it stopped before its time.
    pub error: Option<String>,
    /// The longest wait for an echo, in milliseconds.
    pub slowest_ms: u64,
}

/// The result of `testpod tls`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsOutcome {
    /// The handshake was done on this side; in TLS 1.3 the server may still refuse the client's certificate.
    pub handshake: bool,
    /// As in `TLSv1_3`.
    pub version: Option<String>,
    /// The protocol agreed on.
    pub alpn: Option<String>,
    /// The URI names of the server's certificate.
    pub peer_ids: Vec<String>,
    /// Until when it is valid, in seconds since 1970.
    pub peer_not_after: Option<i64>,
    /// What came back.
    pub text: String,
    /// The first error in words; that of an alert names it, as in `AccessDenied`.
    pub error: Option<String>,
}
