//! Mutual TLS with SPIFFE IDs: one client and one server side per workload, built from its [`Identity`].
//!
//! TLS 1.3 only; key exchange X25519MLKEM768, X25519, P-256, in this order. No session tickets, no resumption, no early
//! data: a resumed session would skip the verifier. No ALPN, so a client may offer what it likes. No SNI: it would name
//! the peer in the clear, and the expected ID says who must answer.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, kx_group};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, CommonState, ConfigBuilder, ServerConfig, WantsVerifier};

use crate::identity::{SpiffeId, TrustDomain};
use crate::svid::{Bundle, Identity};
use crate::tls::trust::Trust;
use crate::tls::verify::{Accept, Verifier};
use crate::workload::Allow;

pub mod profile;
pub mod reasons;
pub mod trust;
pub mod verify;

#[cfg(test)]
pub(crate) mod test_ca;

pub use reasons::{TlsFailure, failure};

/// TLS of one workload with one [`Identity`]; immutable, replaced when the identity is.
pub struct WorkloadTls {
    identity: Arc<Identity>,
    trust: Arc<Trust>,
    certificate: Arc<SingleCertAndKey>,
    client: ClientConfig,
    server: ConfigBuilder<ServerConfig, WantsVerifier>,
}

/// Who is at the other end of a connection whose handshake has ended.
#[derive(Clone)]
pub struct VerifiedPeer {
    /// The ID it proved.
    pub id: SpiffeId,
    /// What it presented, leaf first.
    pub chain: Arc<[CertificateDer<'static>]>,
    /// When the chain was verified; [`still_trusted`] judges validity times at that moment.
    pub verified_at: UnixTime,
}

impl WorkloadTls {
    /// Prepares both sides.
    ///
    /// # Errors
    /// Where the crypto provider lacks what TLS 1.3 needs; never for the sake of the identity.
    pub fn new(identity: Arc<Identity>) -> Result<Self, rustls::Error> {
        let provider = Arc::new(provider());
        let trust = Arc::new(Trust::new(&identity.bundles));
        let certificate = Arc::new(SingleCertAndKey::from(identity.svid.certified_key()));

        // The verifier of the template accepts nobody.
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Verifier::new(trust.clone(), Accept::Expected(Arc::new([]))))
            .with_client_cert_resolver(certificate.clone());
        client.resumption = Resumption::disabled();
        client.enable_early_data = false;
        client.enable_sni = false;

        let server = ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13])?;
        Ok(Self { identity, trust, certificate, client, server })
    }

    /// What it was built from.
    pub fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// The client side towards a server that must prove one of `expected`. That is verified before our certificate is
    /// sent, so any other server does not learn who called. The `ServerName` to connect with is neither sent nor
    /// checked: the peer's address will do. Cheap enough for each connection.
    pub fn client(&self, expected: Arc<[SpiffeId]>) -> Arc<ClientConfig> {
        let verifier = Verifier::new(self.trust.clone(), Accept::Expected(expected));
        let mut config = self.client.clone();
        config.dangerous().set_certificate_verifier(verifier);
        Arc::new(config)
    }

    /// The server side. It demands a certificate and judges its ID by `allow` within the handshake, so that who is
    /// refused learns it. To be built once for each distinct `allow`.
    pub fn server(&self, allow: Allow) -> Arc<ServerConfig> {
        let verifier = Verifier::new(self.trust.clone(), Accept::Allowed(allow));
        let mut config =
            self.server.clone().with_client_cert_verifier(verifier).with_cert_resolver(self.certificate.clone());
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Arc::new(config)
    }
}

impl fmt::Debug for WorkloadTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WorkloadTls").field(&self.identity.svid).finish()
    }
}

impl fmt::Debug for VerifiedPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("VerifiedPeer").field(&self.id.as_str()).finish()
    }
}

/// Who answered or called, once the handshake has ended; `None` before.
pub fn peer(conn: &CommonState) -> Option<VerifiedPeer> {
    let chain = conn.peer_certificates()?;
    let id = profile::leaf(chain.first()?).ok()?.id;
    let chain = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
    Some(VerifiedPeer { id, chain, verified_at: UnixTime::now() })
}

/// True while the peer's chain leads to a root of today's bundle for its trust domain. Validity times are judged at
/// [`VerifiedPeer::verified_at`]: a long connection outlives the certificates of its handshake, but not the trust in
/// who signed them.
pub fn still_trusted(peer: &VerifiedPeer, bundles: &BTreeMap<TrustDomain, Arc<Bundle>>) -> bool {
    let Some((leaf, intermediates)) = peer.chain.split_first() else { return false };
    Trust::of(peer.id.trust_domain(), bundles)
        .verify(leaf, intermediates, peer.verified_at)
        .is_ok_and(|id| id == peer.id)
}

/// AWS-LC, cut to TLS 1.3 and the groups of this module; handed to rustls explicitly, never as the process's default.
fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1],
        ..default_provider()
    }
}

#[cfg(test)]
pub(crate) mod tests;
