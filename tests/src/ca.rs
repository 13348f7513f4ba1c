//! A certificate authority of the tests' own: SVIDs for the agent's `files` source, and certificates that no verifier may
//! accept, for peers that are not Sealane.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};

const HOUR: Duration = Duration::from_secs(3600);

/// The root of one trust domain.
#[derive(Debug)]
pub struct Ca {
    trust_domain: String,
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate, its key and the bundle that shall come with it, in PEM.
#[derive(Clone)]
pub struct Svid {
    /// Leaf first.
    pub chain: String,
    /// PKCS#8.
    pub key: String,
    /// Roots.
    pub bundle: String,
}

/// What is wrong with a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// Its time is over.
    Expired,
    /// Its time has not come.
    NotYetValid,
    /// No URI name.
    NoId,
    /// Two URI names, the first one the one wanted.
    TwoIds,
    /// A URI name that is a trust domain's, without a path.
    IdWithoutPath,
    /// A signing certificate.
    IsCa,
    /// May sign certificates, by its key usage.
    SignsCertificates,
    /// No digital signature in its key usage.
    KeyUsage,
    /// For servers alone.
    ServerOnly,
    /// For clients alone.
    ClientOnly,
    /// Signed by itself.
    SelfSigned,
}

impl Flaw {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Expired,
        Self::NotYetValid,
        Self::NoId,
        Self::TwoIds,
        Self::IdWithoutPath,
        Self::IsCa,
        Self::SignsCertificates,
        Self::KeyUsage,
        Self::ServerOnly,
        Self::ClientOnly,
        Self::SelfSigned,
    ];
}

impl Ca {
    /// A fresh root, P-256. Another one of the same trust domain is one that nobody trusts.
    pub fn new(trust_domain: &str) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("{trust_domain} test CA"));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?];
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { trust_domain: trust_domain.to_owned(), issuer: Issuer::new(params, key), pem })
    }

    /// Its trust domain.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// Its root, PEM.
    pub fn bundle(&self) -> &str {
        &self.pem
    }

    /// A sound SVID for `spiffe://<trust domain>/<path>`, good for an hour.
    pub fn svid(&self, path: &str) -> Result<Svid> {
        self.svid_with(path, |_| Ok(()))
    }

    /// One that is good for so long from now.
    pub fn short_svid(&self, path: &str, lifetime: Duration) -> Result<Svid> {
        self.svid_with(path, |params| {
            params.not_after = (SystemTime::now() + lifetime).into();
            Ok(())
        })
    }

    /// One with something wrong.
    pub fn flawed(&self, path: &str, flaw: Flaw) -> Result<Svid> {
        if flaw == Flaw::SelfSigned {
            let (params, key) = (self.params(path)?, KeyPair::generate()?);
            let chain = params.self_signed(&key)?.pem();
            return Ok(Svid { chain, key: key.serialize_pem(), bundle: self.pem.clone() });
        }
        self.svid_with(path, |params| spoil(params, flaw, &self.trust_domain))
    }

    /// One whose parameters `edit` has changed.
    pub fn svid_with(&self, path: &str, edit: impl FnOnce(&mut CertificateParams) -> Result<()>) -> Result<Svid> {
        let (mut params, key) = (self.params(path)?, KeyPair::generate()?);
        edit(&mut params)?;
        let chain = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Svid { chain, key: key.serialize_pem(), bundle: self.pem.clone() })
    }

    /// As SPIRE's default template.
    fn params(&self, path: &str) -> Result<CertificateParams> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, path);
        params.subject_alt_names = vec![uri(&format!("spiffe://{}/{path}", self.trust_domain))?];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment, KeyUsagePurpose::KeyAgreement];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let now = SystemTime::now();
        params.not_before = (now - Duration::from_secs(10)).into();
        params.not_after = (now + HOUR).into();
        Ok(params)
    }
}

impl Svid {
    /// Writes `svid.pem`, `key.pem` and `bundle.pem` for the `files` source; each file is replaced whole, the key last.
    pub fn write(&self, source: &Path, namespace: &str, name: &str) -> Result<()> {
        let dir = source.join(namespace).join(name);
        fs::create_dir_all(&dir)?;
        replace(&dir, "bundle.pem", &self.bundle)?;
        replace(&dir, "svid.pem", &self.chain)?;
        replace(&dir, "key.pem", &self.key)
    }

    /// Writes chain and key for `testpod tls` as `<name>.crt` and `<name>.key`.
    pub fn write_pair(&self, dir: &Path, name: &str) -> Result<(PathBuf, PathBuf)> {
        let (cert, key) = (format!("{name}.crt"), format!("{name}.key"));
        replace(dir, &cert, &self.chain)?;
        replace(dir, &key, &self.key)?;
        Ok((dir.join(cert), dir.join(key)))
    }
}

fn spoil(params: &mut CertificateParams, flaw: Flaw, trust_domain: &str) -> Result<()> {
    let now = SystemTime::now();
    match flaw {
        Flaw::Expired => {
            params.not_before = (now - 2 * HOUR).into();
            params.not_after = (now - HOUR).into();
        }
        Flaw::NotYetValid => {
            params.not_before = (now + HOUR).into();
            params.not_after = (now + 2 * HOUR).into();
        }
        Flaw::NoId => params.subject_alt_names = vec![SanType::DnsName("web.lab.example".try_into()?)],
        Flaw::TwoIds => params.subject_alt_names.push(uri(&format!("spiffe://{trust_domain}/another"))?),
        Flaw::IdWithoutPath => params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?],
        Flaw::IsCa => params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained),
        Flaw::SignsCertificates => params.key_usages.push(KeyUsagePurpose::KeyCertSign),
        Flaw::KeyUsage => params.key_usages = vec![KeyUsagePurpose::KeyAgreement],
        Flaw::ServerOnly => params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth],
        Flaw::ClientOnly => params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth],
        Flaw::SelfSigned => {}
    }
    Ok(())
}

fn uri(text: &str) -> Result<SanType> {
    Ok(SanType::URI(text.try_into()?))
}

fn replace(dir: &Path, name: &str, text: &str) -> Result<()> {
    let fresh = dir.join(format!(".{name}.new"));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.write_all(text.as_bytes())?;
    Ok(fs::rename(fresh, dir.join(name))?)
}
