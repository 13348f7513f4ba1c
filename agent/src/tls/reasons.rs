//! Between our [`Reason`]s and what rustls says: a refusal of the verifier on its way through rustls, and every error
//! of a handshake back to a reason.
//!
//! Where rustls has a word of the same meaning it is used, because the alert that the peer gets follows from it; the
//! other reasons travel in `CertificateError::Other`. So the side that is refused sees:
//!
//! | alert | reason at the side that refuses |
//! |---|---|
//! | `access_denied` | `not_allowed` |
//! | `bad_certificate` | `peer_id_mismatch` (clients only), `certificate_malformed` |
//! | `certificate_expired` | `certificate_expired`, `certificate_not_yet_valid` |
//! | `unknown_ca` | `certificate_untrusted` |
//! | `unsupported_certificate` | `certificate_extended_usage` |
//! | `certificate_required` | `certificate_missing` |
//! | `certificate_unknown` | `certificate_is_ca`, `certificate_not_leaf`, `certificate_key_usage`, `certificate_signature`, `spiffe_id_missing`, `spiffe_id_ambiguous`, `spiffe_id_malformed`, `trust_domain_unknown` |
//! | `decrypt_error` | `tls_misbehaved`: the peer does not hold the key of its certificate |
//! | `protocol_version` | `tls_version` |
//! | `handshake_failure` | `tls_parameters` |
//! | `decode_error`, `unexpected_message`, ... | `not_tls`, `tls_misbehaved` |
//!
//! A TLS 1.3 client learns it after its own handshake has ended, with its first read.

use std::io;
use std::sync::Arc;

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage, OtherError, PeerIncompatible};
use sealane_common::reason::Reason;

/// Why a handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsFailure {
    /// Our reason.
    pub reason: Reason,
    /// The TLS alert that the peer sent, as RFC 8446 writes it, where the reason is [`Reason::RefusedByPeer`].
    pub alert: Option<&'static str>,
}

/// The reason behind what tokio-rustls returned from a handshake, or from a read after it.
pub fn failure(error: &io::Error) -> TlsFailure {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(Error::AlertReceived(alert)) => {
            TlsFailure { reason: Reason::RefusedByPeer, alert: Some(alert_name(*alert)) }
        }
        Some(error) => TlsFailure { reason: tls_reason(error), alert: None },
        None => TlsFailure { reason: io_reason(error.kind()), alert: None },
    }
}

/// The verifier's refusal as rustls carries it; [`failure`] turns it back.
pub(crate) fn refusal(reason: Reason) -> Error {
    Error::InvalidCertificate(match NAMED.iter().find(|(named, _)| *named == reason) {
        Some((_, error)) => error.clone(),
        None => CertificateError::Other(OtherError(Arc::new(Refusal(reason)))),
    })
}

/// The reasons that rustls has a word for.
const NAMED: &[(Reason, CertificateError)] = &[
    (Reason::NotAllowed, CertificateError::ApplicationVerificationFailure),
    (Reason::PeerIdMismatch, CertificateError::NotValidForName),
    (Reason::CertificateMalformed, CertificateError::BadEncoding),
    (Reason::CertificateExpired, CertificateError::Expired),
    (Reason::CertificateNotYetValid, CertificateError::NotValidYet),
    (Reason::CertificateUntrusted, CertificateError::UnknownIssuer),
    (Reason::CertificateExtendedUsage, CertificateError::InvalidPurpose),
    // Never of the verifier: rustls checks the signature of the handshake.
    (Reason::TlsMisbehaved, CertificateError::BadSignature),
];

/// The reasons that it has none for.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(Reason);

#[expect(clippy::wildcard_enum_match_arm, reason = "a foreign, non-exhaustive enum: what is left is our own side's")]
fn tls_reason(error: &Error) -> Reason {
    match error {
        Error::InvalidCertificate(error) => certificate_reason(error),
        Error::NoCertificatesPresented => Reason::CertificateMissing,
        Error::PeerIncompatible(how) => incompatible_reason(how),
        Error::NoApplicationProtocol => Reason::TlsParameters,
        // What a record of another protocol looks like.
        Error::InvalidMessage(
            InvalidMessage::InvalidContentType
            | InvalidMessage::UnknownProtocolVersion
            | InvalidMessage::MessageTooLarge
            | InvalidMessage::InvalidEmptyPayload,
        ) => Reason::NotTls,
        Error::InvalidMessage(_)
        | Error::InappropriateMessage { .. }
        | Error::InappropriateHandshakeMessage { .. }
        | Error::PeerMisbehaved(_)
        | Error::PeerSentOversizedRecord
        | Error::DecryptError => Reason::TlsMisbehaved,
        Error::AlertReceived(_) => Reason::RefusedByPeer,
        _ => Reason::Aborted,
    }
}

fn certificate_reason(error: &CertificateError) -> Reason {
    if let CertificateError::Other(OtherError(inner)) = error
        && let Some(Refusal(reason)) = inner.downcast_ref()
    {
        return *reason;
    }
    let named = NAMED.iter().find(|(_, named)| named == error);
    // The rest is the signature of the handshake, by a key or in a way that does not fit the certificate.
    named.map_or(Reason::TlsMisbehaved, |(reason, _)| *reason)
}

#[expect(clippy::wildcard_enum_match_arm, reason = "a foreign, non-exhaustive enum: what is left is no version")]
fn incompatible_reason(how: &PeerIncompatible) -> Reason {
    match how {
        PeerIncompatible::ServerDoesNotSupportTls12Or13
        | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
        | PeerIncompatible::SupportedVersionsExtensionRequired
        | PeerIncompatible::Tls12NotOffered
        | PeerIncompatible::Tls12NotOfferedOrEnabled
        | PeerIncompatible::Tls13RequiredForQuic => Reason::TlsVersion,
        _ => Reason::TlsParameters,
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "a foreign, non-exhaustive enum: however it ended, it is closed")]
fn io_reason(kind: io::ErrorKind) -> Reason {
    match kind {
        io::ErrorKind::TimedOut => Reason::HandshakeTimeout,
        _ => Reason::HandshakeClosed,
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "a foreign, non-exhaustive enum")]
fn alert_name(alert: AlertDescription) -> &'static str {
    match alert {
        AlertDescription::CloseNotify => "close_notify",
        AlertDescription::UnexpectedMessage => "unexpected_message",
        AlertDescription::BadRecordMac => "bad_record_mac",
        AlertDescription::DecryptionFailed => "decryption_failed",
        AlertDescription::RecordOverflow => "record_overflow",
        AlertDescription::DecompressionFailure => "decompression_failure",
        AlertDescription::HandshakeFailure => "handshake_failure",
        AlertDescription::NoCertificate => "no_certificate",
        AlertDescription::BadCertificate => "bad_certificate",
        AlertDescription::UnsupportedCertificate => "unsupported_certificate",
        AlertDescription::CertificateRevoked => "certificate_revoked",
        AlertDescription::CertificateExpired => "certificate_expired",
        AlertDescription::CertificateUnknown => "certificate_unknown",
        AlertDescription::IllegalParameter => "illegal_parameter",
        AlertDescription::UnknownCA => "unknown_ca",
        AlertDescription::AccessDenied => "access_denied",
        AlertDescription::DecodeError => "decode_error",
        AlertDescription::DecryptError => "decrypt_error",
        AlertDescription::ExportRestriction => "export_restriction",
        AlertDescription::ProtocolVersion => "protocol_version",
        AlertDescription::InsufficientSecurity => "insufficient_security",
        AlertDescription::InternalError => "internal_error",
        AlertDescription::InappropriateFallback => "inappropriate_fallback",
        AlertDescription::UserCanceled => "user_canceled",
        AlertDescription::NoRenegotiation => "no_renegotiation",
        AlertDescription::MissingExtension => "missing_extension",
        AlertDescription::UnsupportedExtension => "unsupported_extension",
        AlertDescription::CertificateUnobtainable => "certificate_unobtainable",
        AlertDescription::UnrecognisedName => "unrecognized_name",
        AlertDescription::BadCertificateStatusResponse => "bad_certificate_status_response",
        AlertDescription::BadCertificateHashValue => "bad_certificate_hash_value",
        AlertDescription::UnknownPSKIdentity => "unknown_psk_identity",
        AlertDescription::CertificateRequired => "certificate_required",
        AlertDescription::NoApplicationProtocol => "no_application_protocol",
        AlertDescription::EncryptedClientHelloRequired => "ech_required",
        _ => "unknown_alert",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrapped(error: Error) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, error)
    }

    #[test]
    fn every_reason_comes_back_through_rustls() {
        for reason in Reason::ALL {
            assert_eq!(failure(&wrapped(refusal(*reason))), TlsFailure { reason: *reason, alert: None });
        }
    }

    #[test]
    fn errors_without_tls_are_a_closed_or_a_late_handshake() {
        for (kind, reason) in [
            (io::ErrorKind::UnexpectedEof, Reason::HandshakeClosed),
            (io::ErrorKind::ConnectionReset, Reason::HandshakeClosed),
            (io::ErrorKind::BrokenPipe, Reason::HandshakeClosed),
            (io::ErrorKind::TimedOut, Reason::HandshakeTimeout),
        ] {
            assert_eq!(failure(&kind.into()).reason, reason);
        }
    }

    #[test]
    fn an_alert_has_the_name_of_the_standard() {
        let got = failure(&wrapped(Error::AlertReceived(AlertDescription::UnknownCA)));
        assert_eq!(got, TlsFailure { reason: Reason::RefusedByPeer, alert: Some("unknown_ca") });
        let got = failure(&wrapped(Error::AlertReceived(AlertDescription::from(200))));
        assert_eq!(got.alert, Some("unknown_alert"));
    }
}
