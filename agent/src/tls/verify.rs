//! The SPIFFE verifier, the same for both sides of a connection.
//!
//! Parsed and judged here: the X.509-SVID profile of the leaf ([`leaf`]), whose trust domain's bundle may vouch for it,
//! and that whoever signed was allowed to sign. Left to webpki: the path, its signatures, validity times, lengths and
//! name constraints. There is no check of a DNS name, and no revocation: SPIFFE has neither.
//!
//! * A certificate of a trust domain is judged by that trust domain's roots alone.
//! * URI name constraints are not implemented by webpki, which refuses what they apply to: fail closed.
//! * An expired root vouches for nobody, as in Go's verifier and so in SPIRE's.
//! * keyUsage need not be marked critical: what the key may do is the same without.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, SignatureScheme};
use sealane_common::reason::Reason;
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeId, KeyPurposeIdIter, KeyUsage, VerifiedPath};
use x509_parser::certificate::X509Certificate;
use x509_parser::error::X509Error;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::{OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER, OID_X509_EXT_SUBJECT_KEY_IDENTIFIER};
use x509_parser::prelude::FromDer;
use x509_parser::time::ASN1Time;

use crate::identity::{SpiffeId, TrustDomain};
use crate::svid::Bundle;
use crate::tls::reasons;
use crate::workload::Allow;

/// What a leaf with the X.509-SVID profile says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Its one URI SAN.
    pub id: SpiffeId,
    /// Since when it is valid.
    pub not_before: SystemTime,
    /// Until when it is valid.
    pub not_after: SystemTime,
}

/// Checks one certificate against the X.509-SVID profile of a leaf; not who signed it, nor when.
///
/// # Errors
/// The first line of the profile that it breaks.
pub fn leaf(der: &CertificateDer<'_>) -> Result<Leaf, Reason> {
    let certificate = parse(der).ok_or(Reason::CertificateMalformed)?;
    let usage = certificate.key_usage().map_err(malformed)?.map(|extension| extension.value);
    let constraints = certificate.basic_constraints().map_err(malformed)?.ok_or(Reason::CertificateNotLeaf)?;
    if constraints.value.ca || usage.is_some_and(|usage| usage.key_cert_sign() || usage.crl_sign()) {
        return Err(Reason::CertificateIsCa);
    }
    let id = spiffe_id(&certificate)?;
    if !usage.is_some_and(|usage| usage.digital_signature()) {
        return Err(Reason::CertificateKeyUsage);
    }
    let purposes = certificate.extended_key_usage().map_err(malformed)?;
    if purposes.is_some_and(|purposes| !(purposes.value.client_auth && purposes.value.server_auth)) {
        return Err(Reason::CertificateExtendedUsage);
    }
    let validity = certificate.validity();
    Ok(Leaf { id, not_before: system_time(validity.not_before), not_after: system_time(validity.not_after) })
}

/// True where the bytes are one certificate and nothing else.
pub fn parses(der: &CertificateDer<'_>) -> bool {
    parse(der).is_some()
}

/// True where a certificate may be a root: a CA, and its keyUsage, where it has one, lets it sign certificates.
pub fn is_root(der: &CertificateDer<'_>) -> bool {
    Root::new(der).is_some()
}

/// The roots of every trust domain that a workload trusts, apart.
#[derive(Debug)]
pub struct Trust(BTreeMap<TrustDomain, Vec<Root>>);

impl Trust {
    /// Takes the bundles; a certificate in them that may not sign certificates is left out, and logged.
    pub fn new(bundles: &BTreeMap<TrustDomain, Arc<Bundle>>) -> Self {
        Self(bundles.iter().map(|(domain, bundle)| (domain.clone(), roots(bundle))).collect())
    }

    /// The same, of one trust domain only.
    pub fn of(domain: &TrustDomain, bundles: &BTreeMap<TrustDomain, Arc<Bundle>>) -> Self {
        Self(bundles.get(domain).map(|bundle| (domain.clone(), roots(bundle))).into_iter().collect())
    }

    /// Whose certificate it is, if it has the profile of an SVID and leads to a root of its own trust domain at `at`.
    ///
    /// # Errors
    /// The first thing wrong with it.
    pub fn verify(
        &self,
        end: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        at: UnixTime,
    ) -> Result<SpiffeId, Reason> {
        let id = leaf(end)?.id;
        let roots = self.0.get(id.trust_domain()).ok_or(Reason::TrustDomainUnknown)?;
        let anchors: Vec<_> = roots.iter().filter(|root| root.valid_at(at)).map(|root| root.anchor.clone()).collect();
        EndEntityCert::try_from(end)
            .map_err(|_| Reason::CertificateMalformed)?
            .verify_for_usage(ALGORITHMS.all, &anchors, rest, at, BothWays, None, Some(&only_signers_signed))
            .map(|_| id)
            .map_err(|error| path_reason(&error, || forged(roots, end, rest)))
    }
}

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

/// Of certificates and of handshakes: no SHA-1, no RSA below 2048 bits.
static ALGORITHMS: LazyLock<WebPkiSupportedAlgorithms> =
    LazyLock::new(|| aws_lc_rs::default_provider().signature_verification_algorithms);

/// uniformResourceIdentifier of GeneralName, RFC 5280.
const URI_TAG: u32 = 6;

/// One root, with what webpki's anchor does not keep.
#[derive(Debug)]
struct Root {
    anchor: TrustAnchor<'static>,
    not_before: SystemTime,
    not_after: SystemTime,
    der: CertificateDer<'static>,
}

impl Root {
    fn new(der: &CertificateDer<'_>) -> Option<Self> {
        let certificate = parse(der)?;
        let ca = certificate.basic_constraints().ok()?.is_some_and(|constraints| constraints.value.ca);
        let signs = certificate.key_usage().ok()?.is_none_or(|usage| usage.value.key_cert_sign());
        if !(ca && signs) {
            return None;
        }
        let validity = certificate.validity();
        Some(Self {
            anchor: webpki::anchor_from_trusted_cert(der).ok()?.to_owned(),
            not_before: system_time(validity.not_before),
            not_after: system_time(validity.not_after),
            der: der.clone().into_owned(),
        })
    }

    fn valid_at(&self, at: UnixTime) -> bool {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(at.as_secs());
        self.not_before <= at && at <= self.not_after
    }
}

fn roots(bundle: &Bundle) -> Vec<Root> {
    let roots: Vec<_> = bundle.roots.iter().filter_map(Root::new).collect();
    if roots.len() < bundle.roots.len() {
        let left_out = bundle.roots.len() - roots.len();
        tracing::warn!(trust_domain = %bundle.trust_domain, left_out, "the bundle holds what is no signing certificate");
    }
    roots
}

/// An SVID serves both roles, so every extendedKeyUsage on its path, where there is one, must name both.
#[derive(Clone, Copy)]
struct BothWays;

impl ExtendedKeyUsageValidator for BothWays {
    fn validate(&self, purposes: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        const CLIENT: KeyPurposeId<'_> = KeyPurposeId::new(&[0x2b, 6, 1, 5, 5, 7, 3, 2]);
        const SERVER: KeyPurposeId<'_> = KeyPurposeId::new(&[0x2b, 6, 1, 5, 5, 7, 3, 1]);
        let purposes = purposes.collect::<Result<Vec<_>, _>>()?;
        if purposes.is_empty() || purposes.contains(&CLIENT) && purposes.contains(&SERVER) {
            return Ok(());
        }
        let present = purposes.iter().map(KeyPurposeId::to_decoded_oid).collect();
        let required = KeyUsage::client_auth();
        Err(webpki::Error::RequiredEkuNotFoundContext(webpki::RequiredEkuNotFoundContext { required, present }))
    }
}

/// webpki asks an intermediate for cA alone; X.509-SVID demands keyCertSign of it as well.
fn only_signers_signed(path: &VerifiedPath<'_>) -> Result<(), webpki::Error> {
    let signs = |der: &CertificateDer<'_>| {
        parse(der).is_some_and(|c| c.key_usage().is_ok_and(|usage| usage.is_some_and(|u| u.value.key_cert_sign())))
    };
    match path.intermediate_certificates().all(|certificate| signs(&certificate.der())) {
        true => Ok(()),
        false => Err(webpki::Error::EndEntityUsedAsCa),
    }
}

/// To webpki a signature is wrong as well where a CA has only the name of one that we trust, and all of SPIRE's have the
/// same name: a root that was rotated away, an intermediate below it. `forged` tells which it is.
#[expect(clippy::wildcard_enum_match_arm, reason = "a foreign, non-exhaustive enum: what is left is no trusted path")]
fn path_reason(error: &webpki::Error, forged: impl FnOnce() -> bool) -> Reason {
    use webpki::Error as E;
    match error {
        E::CertExpired { .. } => Reason::CertificateExpired,
        E::CertNotValidYet { .. } => Reason::CertificateNotYetValid,
        E::CaUsedAsEndEntity => Reason::CertificateIsCa,
        E::EmptyEkuExtension | E::RequiredEkuNotFoundContext(_) => Reason::CertificateExtendedUsage,
        E::InvalidSignatureForPublicKey if forged() => Reason::CertificateSignature,
        E::UnsupportedSignatureAlgorithmContext(_) | E::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => {
            Reason::CertificateSignature
        }
        E::BadDer
        | E::BadDerTime
        | E::TrailingData(_)
        | E::InvalidCertValidity
        | E::MalformedExtensions
        | E::ExtensionValueInvalid
        | E::SignatureAlgorithmMismatch
        | E::UnsupportedCertVersion
        | E::UnsupportedCriticalExtension => Reason::CertificateMalformed,
        _ => Reason::CertificateUntrusted,
    }
}

/// True where a certificate names as its issuer's key one that is at hand, and is not signed with it.
fn forged(roots: &[Root], end: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> bool {
    // As many as webpki would follow.
    let chain: Vec<_> = std::iter::once(end).chain(rest).take(7).filter_map(parse).collect();
    let roots: Vec<_> = roots.iter().filter_map(|root| parse(&root.der)).collect();
    chain.iter().any(|certificate| {
        let Some(id) = issuer_key_id(certificate) else { return false };
        let issuer = chain.iter().chain(&roots).find(|issuer| key_id(issuer) == Some(id));
        issuer.is_some_and(|issuer| {
            certificate.verify_signature(Some(issuer.public_key())) == Err(X509Error::SignatureVerificationError)
        })
    })
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Option<X509Certificate<'a>> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Some(certificate),
        Ok(_) | Err(_) => None,
    }
}

fn spiffe_id(certificate: &X509Certificate<'_>) -> Result<SpiffeId, Reason> {
    let names = certificate.subject_alternative_name().map_err(malformed)?;
    let names = names.as_ref().map_or(&[][..], |names| &names.value.general_names);
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        // Not text, so no SPIFFE ID either, but a URI all the same.
        GeneralName::Invalid(tag, _) if tag.0 == URI_TAG => Some(""),
        GeneralName::OtherName(..)
        | GeneralName::RFC822Name(_)
        | GeneralName::DNSName(_)
        | GeneralName::X400Address(_)
        | GeneralName::DirectoryName(_)
        | GeneralName::EDIPartyName(_)
        | GeneralName::IPAddress(_)
        | GeneralName::RegisteredID(_)
        | GeneralName::Invalid(..) => None,
    });
    match (uris.next(), uris.next()) {
        (None, _) => Err(Reason::SpiffeIdMissing),
        (Some(_), Some(_)) => Err(Reason::SpiffeIdAmbiguous),
        (Some(uri), None) => uri.parse().map_err(|_| Reason::SpiffeIdMalformed),
    }
}

fn key_id<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a [u8]> {
    let extension = certificate.get_extension_unique(&OID_X509_EXT_SUBJECT_KEY_IDENTIFIER).ok()??;
    let ParsedExtension::SubjectKeyIdentifier(id) = extension.parsed_extension() else { return None };
    Some(id.0)
}

fn issuer_key_id<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a [u8]> {
    let extension = certificate.get_extension_unique(&OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER).ok()??;
    let ParsedExtension::AuthorityKeyIdentifier(id) = extension.parsed_extension() else { return None };
    id.key_identifier.as_ref().map(|id| id.0)
}

fn malformed<E>(_: E) -> Reason {
    Reason::CertificateMalformed
}

/// Before 1970 is 1970: nothing of ours is as old, and only validity depends on it.
fn system_time(time: ASN1Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
}

#[cfg(test)]
mod tests;
