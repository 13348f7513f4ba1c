//! Why a connection failed: a [`Reason`], with what the operating system or TLS said.

use std::io;

use sealane_common::reason::Reason;

use crate::tls;

/// Why a connection was refused or ended before its time.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Failure {
    /// The metric label and the words.
    pub reason: Reason,
    /// The TLS alert that the peer sent.
    pub alert: Option<&'static str>,
    /// What was said underneath.
    pub source: Option<io::Error>,
}

impl From<Reason> for Failure {
    fn from(reason: Reason) -> Self {
        Self { reason, alert: None, source: None }
    }
}

/// A TCP dial failed.
pub(super) fn dial(source: io::Error) -> Failure {
    let reason = match source.raw_os_error() {
        Some(libc::ECONNREFUSED) => Reason::ConnectRefused,
        Some(libc::ETIMEDOUT) => Reason::ConnectTimeout,
        Some(libc::EHOSTUNREACH | libc::ENETUNREACH) => Reason::ConnectUnreachable,
        Some(libc::EADDRNOTAVAIL) => Reason::NoLocalPort,
        _ => Reason::ConnectFailed,
    };
    Failure { reason, alert: None, source: Some(source) }
}

/// A TLS handshake failed.
pub(super) fn handshake(source: io::Error) -> Failure {
    let tls::TlsFailure { reason, alert } = tls::failure(&source);
    Failure { reason, alert, source: Some(source) }
}

/// Reading from or writing to the peer failed on an open connection. A TLS 1.3 server that refuses our certificate does
/// so here, after the client's handshake has ended.
pub(super) fn peer(source: io::Error) -> Failure {
    if source.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) {
        return handshake(source);
    }
    let truncated = source.kind() == io::ErrorKind::UnexpectedEof;
    let reason = if truncated { Reason::PeerTruncated } else { Reason::PeerReset };
    Failure { reason, alert: None, source: Some(source) }
}

/// Reading from or writing to the application failed on an open connection.
pub(super) fn app(source: io::Error) -> Failure {
    Failure { reason: Reason::AppReset, alert: None, source: Some(source) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_what_a_dial_met() {
        let cases = [
            (libc::ECONNREFUSED, Reason::ConnectRefused),
            (libc::ETIMEDOUT, Reason::ConnectTimeout),
            (libc::EHOSTUNREACH, Reason::ConnectUnreachable),
            (libc::ENETUNREACH, Reason::ConnectUnreachable),
            (libc::EADDRNOTAVAIL, Reason::NoLocalPort),
            (libc::EACCES, Reason::ConnectFailed),
        ];
        for (errno, reason) in cases {
            assert_eq!(dial(io::Error::from_raw_os_error(errno)).reason, reason);
        }
    }

    #[test]
    fn tells_truncation_from_reset() {
        assert_eq!(peer(io::ErrorKind::UnexpectedEof.into()).reason, Reason::PeerTruncated);
        assert_eq!(peer(io::ErrorKind::ConnectionReset.into()).reason, Reason::PeerReset);
    }
}
