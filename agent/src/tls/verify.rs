//! The SPIFFE verifier, the same for both sides of a connection: the profile of the leaf ([`profile`](super::profile)),
//! the path to a root of its trust domain ([`trust`](super::trust)), then whether it is one to accept. There is no check
//! of a DNS name: SPIFFE has none.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::verify_tls13_signature;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, SignatureScheme};
use sealane_common::reason::Reason;

use crate::identity::SpiffeId;
use crate::tls::reasons;
use crate::tls::trust::{ALGORITHMS, Trust};
use crate::workload::Allow;

/// Whom to accept once the certificate holds.
#[derive(Clone, Debug)]
pub enum Accept {
    /// A client's: the server must be one of these.
    Expected(Arc<[SpiffeId]>),
    /// A server's: the rule of the port.
    Allowed(Allow),
}

/// rustls' verifier of either side.
#[derive(Debug)]
pub struct Verifier {
    trust: Arc<Trust>,
    accept: Accept,
}

impl Verifier {
    /// A verifier that trusts `trust` and accepts `accept`.
    pub fn new(trust: Arc<Trust>, accept: Accept) -> Arc<Self> {
        Arc::new(Self { trust, accept })
    }

    fn judge(&self, end: &CertificateDer<'_>, rest: &[CertificateDer<'_>], now: UnixTime) -> Result<(), Error> {
        let id = self.trust.verify(end, rest, now).map_err(reasons::refusal)?;
        match &self.accept {
            Accept::Expected(ids) if !ids.contains(&id) => Err(reasons::refusal(Reason::PeerIdMismatch)),
            Accept::Allowed(allow) if !allow.permits(&id) => Err(reasons::refusal(Reason::NotAllowed)),
            Accept::Expected(_) | Accept::Allowed(_) => Ok(()),
        }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.judge(end_entity, intermediates, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &ALGORITHMS)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ALGORITHMS.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    /// None: the names of our roots are nobody's business, and a SPIFFE peer has but one certificate to choose from.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.judge(end_entity, intermediates, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(self)
    }
}

#[cfg(test)]
mod tests;
