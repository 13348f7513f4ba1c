//! What a workload proves itself with, and what it trusts: its X.509-SVID, and one bundle per trust domain.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SigningKey};
use sealane_common::reason::Reason;
use zeroize::Zeroizing;

use crate::identity::{SpiffeId, TrustDomain};
use crate::tls::profile;

/// A workload's X.509-SVID with its private key.
pub struct Svid {
    /// The leaf's SPIFFE ID.
    pub id: SpiffeId,
    /// The leaf first, then the intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// Since when the leaf is valid.
    pub not_before: SystemTime,
    /// Until when the leaf is valid.
    pub not_after: SystemTime,
    key: Arc<dyn SigningKey>,
}

/// The roots of one trust domain: a full set, never merged with another's. Empty means that nobody of it is trusted.
#[derive(PartialEq, Eq)]
pub struct Bundle {
    /// Whose roots.
    pub trust_domain: TrustDomain,
    /// Signing certificates; what is none of them is never trusted.
    pub roots: Vec<CertificateDer<'static>>,
}

/// All that one workload's TLS rests on, replaced as a whole.
#[derive(Debug)]
pub struct Identity {
    /// Its SVID.
    pub svid: Svid,
    /// Its own trust domain's bundle and the federated ones.
    pub bundles: BTreeMap<TrustDomain, Arc<Bundle>>,
}

/// Why a certificate chain and a key are not an SVID.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    /// No certificate at all.
    #[error("the chain is empty")]
    Empty,
    /// The leaf breaks the X.509-SVID profile; a peer would refuse it for the same reason.
    #[error("the leaf is no X.509-SVID: {}", .0.label())]
    Profile(Reason),
    /// An intermediate, counted from 1, cannot be parsed.
    #[error("intermediate {0} of the chain cannot be parsed")]
    Intermediate(usize),
    /// Not PKCS#8, SEC1 or PKCS#1, or of a kind that TLS 1.3 has no signature for.
    #[error("the private key is not a PKCS#8, SEC1 or PKCS#1 key that TLS can sign with")]
    Key,
    /// The key belongs to another certificate: often two files of a rotation read at different moments.
    #[error("the private key is not the leaf's")]
    KeyMismatch,
}

impl Svid {
    /// Takes a chain, leaf first, and the leaf's key as DER (PKCS#8, SEC1 or PKCS#1).
    ///
    /// # Errors
    /// Where the leaf does not have the X.509-SVID profile or the key is not the leaf's. An SVID that has expired is
    /// one all the same.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: Zeroizing<Vec<u8>>) -> Result<Self, SvidError> {
        let leaf = profile::leaf(chain.first().ok_or(SvidError::Empty)?).map_err(SvidError::Profile)?;
        if let Some(at) = chain.iter().position(|certificate| !profile::parses(certificate)) {
            return Err(SvidError::Intermediate(at));
        }
        // Not through KeyProvider::load_private_key: that takes an owned copy, which nobody would zeroise. AWS-LC
        // cleanses its own memory when it frees the key.
        let der = PrivateKeyDer::try_from(key.as_slice()).map_err(|_| SvidError::Key)?;
        let key = any_supported_type(&der).map_err(|_| SvidError::Key)?;
        let svid = Self { id: leaf.id, chain, not_before: leaf.not_before, not_after: leaf.not_after, key };
        svid.certified_key().keys_match().map_err(|_| SvidError::KeyMismatch)?;
        Ok(svid)
    }

    /// As rustls takes it.
    pub(crate) fn certified_key(&self) -> CertifiedKey {
        CertifiedKey::new(self.chain.clone(), self.key.clone())
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id.as_str())
            .field("not_before", &self.not_before)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Bundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bundle({}, {} roots)", self.trust_domain, self.roots.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::test_ca::{TestCa, svid_params};

    #[test]
    fn takes_a_leaf_with_its_own_key_only() {
        let ca = TestCa::new("td");
        let (web, api) = (ca.issue("spiffe://td/web"), ca.issue("spiffe://td/api"));
        let svid = Svid::new(web.chain.clone(), web.key()).unwrap();
        assert_eq!(svid.id.as_str(), "spiffe://td/web");
        assert!(svid.not_before < SystemTime::now() && SystemTime::now() < svid.not_after);
        assert!(matches!(Svid::new(web.chain.clone(), api.key()), Err(SvidError::KeyMismatch)));
        assert!(matches!(Svid::new(Vec::new(), web.key()), Err(SvidError::Empty)));
        assert!(matches!(Svid::new(web.chain, Zeroizing::new(b"nonsense".to_vec())), Err(SvidError::Key)));
    }

    #[test]
    fn refuses_what_a_peer_would_refuse() {
        let ca = TestCa::new("td");
        let mut params = svid_params("spiffe://td/web");
        params.key_usages.clear();
        let bad = ca.sign(params);
        let refused = Svid::new(bad.chain.clone(), bad.key());
        assert!(matches!(refused, Err(SvidError::Profile(Reason::CertificateKeyUsage))));

        let mut good = ca.issue("spiffe://td/web");
        good.chain.push(CertificateDer::from(b"not a certificate".to_vec()));
        assert!(matches!(Svid::new(good.chain.clone(), good.key()), Err(SvidError::Intermediate(1))));
    }

    #[test]
    fn shows_no_key() {
        let issued = TestCa::new("td").issue("spiffe://td/web");
        let shown = format!("{:?}", Svid::new(issued.chain.clone(), issued.key()).unwrap());
        assert!(shown.contains("spiffe://td/web") && !shown.contains("key"), "{shown}");
    }
}
