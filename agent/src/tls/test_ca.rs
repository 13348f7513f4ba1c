//! Certificates for tests, good ones and bad ones.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::Zeroizing;

use crate::identity::TrustDomain;
use crate::svid::{Bundle, Identity, Svid};

/// A CA of one trust domain; all have the same name, as SPIRE's do.
pub(crate) struct TestCa {
    pub trust_domain: TrustDomain,
    pub certificate: CertificateDer<'static>,
    /// What it adds to the chains that it issues.
    pub intermediates: Vec<CertificateDer<'static>>,
    issuer: Issuer<'static, KeyPair>,
}

/// A chain, leaf first, and its key.
pub(crate) struct Issued {
    pub chain: Vec<CertificateDer<'static>>,
    key: Zeroizing<Vec<u8>>,
}

impl Issued {
    pub fn key(&self) -> Zeroizing<Vec<u8>> {
        self.key.clone()
    }

    pub fn key_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::try_from(self.key.to_vec()).unwrap()
    }

    pub fn identity(&self, trusts: &[&TestCa]) -> Arc<Identity> {
        let svid = Svid::new(self.chain.clone(), self.key()).unwrap();
        Arc::new(Identity { svid, bundles: bundles(trusts) })
    }
}

/// One bundle for each trust domain, with the roots of the CAs given.
pub(crate) fn bundles(cas: &[&TestCa]) -> BTreeMap<TrustDomain, Arc<Bundle>> {
    let domains = cas.iter().map(|ca| ca.trust_domain.clone());
    domains
        .map(|trust_domain| {
            let of_domain = cas.iter().filter(|ca| ca.trust_domain == trust_domain);
            let roots = of_domain.map(|ca| ca.certificate.clone()).collect();
            (trust_domain.clone(), Arc::new(Bundle { trust_domain, roots }))
        })
        .collect()
}

impl TestCa {
    pub fn new(trust_domain: &str) -> Self {
        Self::with(trust_domain, ca_params(), key(&rcgen::PKCS_ECDSA_P256_SHA256))
    }

    pub fn with(trust_domain: &str, params: CertificateParams, key: KeyPair) -> Self {
        let certificate = params.self_signed(&key).unwrap().der().clone();
        let trust_domain = trust_domain.parse().unwrap();
        Self { trust_domain, certificate, intermediates: Vec::new(), issuer: Issuer::new(params, key) }
    }

    /// A CA below this one, whose chains bring its certificate along.
    pub fn intermediate(&self, params: CertificateParams) -> Self {
        let key = key(&rcgen::PKCS_ECDSA_P256_SHA256);
        let certificate = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        let intermediates = [vec![certificate.clone()], self.intermediates.clone()].concat();
        let trust_domain = self.trust_domain.clone();
        Self { trust_domain, certificate, intermediates, issuer: Issuer::new(params, key) }
    }

    pub fn issue(&self, id: &str) -> Issued {
        self.sign(svid_params(id))
    }

    pub fn sign(&self, params: CertificateParams) -> Issued {
        self.sign_for(params, &key(&rcgen::PKCS_ECDSA_P256_SHA256))
    }

    pub fn sign_for(&self, params: CertificateParams, key: &KeyPair) -> Issued {
        let leaf = params.signed_by(key, &self.issuer).unwrap().der().clone();
        let chain = [vec![leaf], self.intermediates.clone()].concat();
        Issued { chain, key: Zeroizing::new(key.serialize_der()) }
    }
}

/// A certificate that signs itself.
pub(crate) fn self_signed(params: CertificateParams) -> Issued {
    let key = key(&rcgen::PKCS_ECDSA_P256_SHA256);
    let leaf = params.self_signed(&key).unwrap().der().clone();
    Issued { chain: vec![leaf], key: Zeroizing::new(key.serialize_der()) }
}

pub(crate) fn key(algorithm: &'static rcgen::SignatureAlgorithm) -> KeyPair {
    KeyPair::generate_for(algorithm).unwrap()
}

pub(crate) fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "SPIRE");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    valid(&mut params, Duration::from_secs(3600), Duration::from_secs(3600));
    params
}

pub(crate) fn svid_params(id: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![uri(id)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    valid(&mut params, Duration::from_secs(60), Duration::from_secs(3600));
    params
}

pub(crate) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

/// Valid since `ago` before now, for `then` after it.
pub(crate) fn valid(params: &mut CertificateParams, ago: Duration, then: Duration) {
    params.not_before = (SystemTime::now() - ago).into();
    params.not_after = (SystemTime::now() + then).into();
}
