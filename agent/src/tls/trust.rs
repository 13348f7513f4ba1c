//! Whose roots vouch for whom: the path from a leaf to a root of its own trust domain.
//!
//! webpki finds the path and judges signatures, validity times, lengths and name constraints; judged here is that whoever
//! signed was allowed to. No revocation: SPIFFE has none.
//!
//! * A certificate of a trust domain is judged by that trust domain's roots alone.
//! * URI name constraints are not implemented by webpki, which refuses what they apply to: fail closed.
//! * An expired root vouches for nobody, as in Go's verifier and so in SPIRE's.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use rustls::crypto::{WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use sealane_common::reason::Reason;
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeId, KeyPurposeIdIter, KeyUsage, VerifiedPath};
use x509_parser::error::X509Error;

use crate::identity::{SpiffeId, TrustDomain};
use crate::svid::Bundle;
use crate::tls::profile::{is_root, issuer_key_id, key_id, leaf, parse, signs, system_time};

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

/// Of certificates and of handshakes: no SHA-1, no RSA below 2048 bits.
pub(super) static ALGORITHMS: LazyLock<WebPkiSupportedAlgorithms> =
    LazyLock::new(|| aws_lc_rs::default_provider().signature_verification_algorithms);

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
        let certificate = parse(der).filter(|_| is_root(der))?;
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
