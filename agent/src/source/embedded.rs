//! A development CA inside the agent, for demos and tests: it stands in for SPIRE, and protects nothing that matters.
//!
//! The CA of a trust domain lies in `<dir>/<trust domain>/` as `ca.pem` and `ca.key`, which everybody with the rights to
//! read it can forge identities with: the one place where Sealane keeps a key on disk. The agents that share the
//! directory share the CA; the first one makes it, under a lock. Removing both files makes a new one at the next renewal.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::fcntl::{Flock, FlockArg};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::CertificateDer;
use sealane_common::reason::Reason;
use tokio::sync::mpsc;
use tokio::time::sleep;
use zeroize::Zeroizing;

use super::pem::{self, PemError};
use crate::identity::{SpiffeId, TrustDomain};
use crate::source::IdentityUpdate;
use crate::svid::{Bundle, Identity, Svid, SvidError};
use crate::workload::WorkloadKey;

/// How long an SVID of this source is valid.
pub const LIFETIME: Duration = Duration::from_secs(3600);

/// Feeds one workload: an SVID at once, another with a fresh key at half of each one's life, until `updates` is closed.
/// Where the CA cannot be used it is tried again, and what was issued before stays.
pub async fn feed(dir: PathBuf, workload: WorkloadKey, id: SpiffeId, updates: mpsc::Sender<IdentityUpdate>) {
    tracing::warn!(
        %workload, %id, dir = %dir.display(),
        "DEVELOPMENT CA: this identity proves nothing; use the files source, with a real CA, for anything but demos"
    );
    let mut has_one = false;
    loop {
        let (pause, identity) = match issue_apart(dir.clone(), id.clone()).await {
            Ok(identity) => (renewal(), Some(Ok(Arc::new(identity)))),
            Err(error) => {
                tracing::error!(%workload, %error, "the development CA issued nothing");
                (RETRY, (!has_one).then_some(Err(Reason::IdentityPending)))
            }
        };
        if let Some(identity) = identity {
            has_one |= identity.is_ok();
            let update = IdentityUpdate { workload: workload.clone(), identity };
            if updates.send(update).await.is_err() {
                return;
            }
        }
        sleep(pause).await;
    }
}

/// Issues one SVID; makes the CA if there is none.
///
/// # Errors
/// Where the CA's directory cannot be used.
pub fn issue(dir: &Path, id: &SpiffeId) -> Result<Identity, EmbeddedError> {
    let authority = Authority::open(dir, id.trust_domain())?;
    let key = Zeroizing::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?);
    let leaf = svid_params(id)?.signed_by(&*key, &authority.issuer()?)?;
    let svid = Svid::new(vec![leaf.der().clone()], Zeroizing::new(key.serialize_der()))?;
    let trust_domain = id.trust_domain().clone();
    let bundle = Arc::new(Bundle { trust_domain: trust_domain.clone(), roots: vec![authority.certificate] });
    Ok(Identity { svid, bundles: BTreeMap::from([(trust_domain, bundle)]) })
}

/// Why the development CA issued nothing.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// Its directory or a file of it.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of it, as PEM.
    #[error(transparent)]
    Pem(#[from] PemFileError),
    /// One of the two files is missing: a new CA would silently take the place of one that others trust.
    #[error("{}: missing, though the other file of the CA is there; remove both for a new CA", .0.display())]
    Half(PathBuf),
    /// Others than the owner may read the key.
    #[error("{}: readable by others than its owner; make it 0600", .0.display())]
    Exposed(PathBuf),
    /// The key is not the certificate's.
    #[error("{}: not the key of the certificate beside it", .0.display())]
    KeyMismatch(PathBuf),
    /// Making a certificate.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// What was made is no SVID.
    #[error(transparent)]
    Svid(#[from] SvidError),
    /// The runtime is ending.
    #[error("the runtime is ending")]
    Ending,
}

/// An unreadable PEM file, by name.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct PemFileError(PemError);

const RETRY: Duration = Duration::from_secs(5);

/// File work and a lock that another agent may hold, so not on the runtime's own threads.
async fn issue_apart(dir: PathBuf, id: SpiffeId) -> Result<Identity, EmbeddedError> {
    tokio::task::spawn_blocking(move || issue(&dir, &id)).await.map_err(|_| EmbeddedError::Ending)?
}

/// Half of the lifetime, give or take a tenth, so that workloads which began together do not stay together.
fn renewal() -> Duration {
    let mut random = [0; 2];
    // Without randomness there is no handshake either; the middle will do.
    let random =
        default_provider().secure_random.fill(&mut random).map_or(u16::MAX / 2, |()| u16::from_ne_bytes(random));
    (LIFETIME / 2).mul_f64(0.9 + 0.2 * f64::from(random) / f64::from(u16::MAX))
}

fn svid_params(id: &SpiffeId) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Sealane development");
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    valid(&mut params, LIFETIME);
    Ok(params)
}

/// From a little ago, for clocks that are a little behind.
fn valid(params: &mut CertificateParams, lifetime: Duration) {
    params.not_before = (SystemTime::now() - Duration::from_secs(10)).into();
    params.not_after = (SystemTime::now() + lifetime).into();
}

struct Authority {
    certificate: CertificateDer<'static>,
    key: Zeroizing<KeyPair>,
}

impl Authority {
    fn open(dir: &Path, trust_domain: &TrustDomain) -> Result<Self, EmbeddedError> {
        let dir = dir.join(trust_domain.as_str());
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io_error(&dir))?;
        let _lock = lock(&dir.join("lock"))?;
        let (certificate_path, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
        match (certificate_path.exists(), key_path.exists()) {
            (true, true) => Self::load(&certificate_path, &key_path),
            (true, false) => Err(EmbeddedError::Half(key_path)),
            // The certificate is written last: this one was never finished, so nobody trusts it yet.
            (false, _) => Self::make(&certificate_path, &key_path, trust_domain),
        }
    }

    fn load(certificate_path: &Path, key_path: &Path) -> Result<Self, EmbeddedError> {
        let mode = fs::metadata(key_path).map_err(io_error(key_path))?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(EmbeddedError::Exposed(key_path.to_owned()));
        }
        let certificate = pem::certificates(certificate_path).map_err(PemFileError)?.swap_remove(0);
        let der = pem::private_key(key_path).map_err(PemFileError)?;
        let key = Zeroizing::new(KeyPair::try_from(der.as_slice())?);
        let authority = Self { certificate, key };
        match authority.key_fits()? {
            true => Ok(authority),
            false => Err(EmbeddedError::KeyMismatch(key_path.to_owned())),
        }
    }

    fn make(certificate_path: &Path, key_path: &Path, trust_domain: &TrustDomain) -> Result<Self, EmbeddedError> {
        let key = Zeroizing::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?);
        let certificate = ca_params(trust_domain)?.self_signed(&*key)?;
        write(key_path, Zeroizing::new(key.serialize_pem()).as_bytes())?;
        write(certificate_path, certificate.pem().as_bytes())?;
        tracing::warn!(ca = %certificate_path.display(), "made a development CA");
        Ok(Self { certificate: certificate.der().clone(), key })
    }

    fn issuer(&self) -> Result<Issuer<'_, &KeyPair>, rcgen::Error> {
        Issuer::from_ca_cert_der(&self.certificate, &*self.key)
    }

    fn key_fits(&self) -> Result<bool, EmbeddedError> {
        use rcgen::PublicKeyData;
        use x509_parser::prelude::{FromDer, X509Certificate};
        let (_, certificate) =
            X509Certificate::from_der(&self.certificate).map_err(|_| rcgen::Error::CouldNotParseCertificate)?;
        Ok(certificate.public_key().raw == self.key.subject_public_key_info())
    }
}

fn ca_params(trust_domain: &TrustDomain) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Sealane development CA");
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{trust_domain}").try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid(&mut params, Duration::from_secs(365 * 24 * 3600));
    Ok(params)
}

fn lock(path: &Path) -> Result<Flock<File>, EmbeddedError> {
    let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path);
    let file = open.map_err(io_error(path))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| io_error(path)(errno.into()))
}

/// Whole or not at all, and never readable by others, not even for a moment.
fn write(path: &Path, text: &[u8]) -> Result<(), EmbeddedError> {
    let temporary = path.with_extension("new");
    let failed = io_error(&temporary);
    if temporary.exists() {
        fs::remove_file(&temporary).map_err(&failed)?;
    }
    let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&temporary).map_err(&failed)?;
    file.write_all(text).and_then(|()| file.sync_all()).map_err(&failed)?;
    fs::rename(&temporary, path).map_err(io_error(path))
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> EmbeddedError {
    move |source| EmbeddedError::Io { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::WorkloadTls;
    use crate::tls::tests::{ids, meet};
    use crate::workload::Allow;

    fn id(text: &str) -> SpiffeId {
        text.parse().unwrap()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn two_agents_share_one_ca() {
        let dir = tempfile::tempdir().unwrap();
        // At once: whoever comes second must find the CA of the first.
        let (web, api) = tokio::join!(
            issue_apart(dir.path().to_owned(), id("spiffe://td/web")),
            issue_apart(dir.path().to_owned(), id("spiffe://td/api"))
        );
        let (web, api) = (web.unwrap(), api.unwrap());
        assert_eq!(web.bundles, api.bundles);
        let (web, api) = (WorkloadTls::new(Arc::new(web)).unwrap(), WorkloadTls::new(Arc::new(api)).unwrap());
        let own = Allow::TrustDomain("td".parse().unwrap());
        let met = meet(web.client(ids(&["spiffe://td/api"])), api.server(own)).await;
        assert_eq!(met.server.unwrap().peer.unwrap().id, id("spiffe://td/web"));
        met.client.unwrap();
    }

    #[test]
    fn each_trust_domain_has_its_own_ca() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (issue(dir.path(), &id("spiffe://one/a")), issue(dir.path(), &id("spiffe://two/a")));
        assert_ne!(one.unwrap().bundles, two.unwrap().bundles);
    }

    #[test]
    fn only_the_owner_may_read_the_ca() {
        let dir = tempfile::tempdir().unwrap();
        issue(dir.path(), &id("spiffe://td/web")).unwrap();
        let ca = dir.path().join("td");
        assert_eq!((mode(&ca), mode(&ca.join("ca.key"))), (0o700, 0o600));
        assert_eq!(fs::read_dir(&ca).unwrap().count(), 3, "lock, ca.pem, ca.key");

        fs::set_permissions(ca.join("ca.key"), fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(issue(dir.path(), &id("spiffe://td/web")), Err(EmbeddedError::Exposed(_))));
    }

    #[test]
    fn a_ca_is_never_replaced_silently() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("td");
        let first = issue(dir.path(), &id("spiffe://td/web")).unwrap();

        let key = fs::read(ca.join("ca.key")).unwrap();
        fs::remove_file(ca.join("ca.key")).unwrap();
        assert!(matches!(issue(dir.path(), &id("spiffe://td/web")), Err(EmbeddedError::Half(_))));
        let other = Zeroizing::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap());
        write(&ca.join("ca.key"), other.serialize_pem().as_bytes()).unwrap();
        assert!(matches!(issue(dir.path(), &id("spiffe://td/web")), Err(EmbeddedError::KeyMismatch(_))));

        write(&ca.join("ca.key"), &key).unwrap();
        assert_eq!(issue(dir.path(), &id("spiffe://td/web")).unwrap().bundles, first.bundles);
        // What an agent left that died between the two files is not trusted by anybody yet.
        fs::remove_file(ca.join("ca.pem")).unwrap();
        assert_ne!(issue(dir.path(), &id("spiffe://td/web")).unwrap().bundles, first.bundles);
    }

    #[tokio::test(start_paused = true)]
    async fn renews_at_half_life_with_a_fresh_key() {
        let dir = tempfile::tempdir().unwrap();
        let (sender, mut updates) = mpsc::channel(1);
        let key = WorkloadKey { namespace: "shop".into(), name: "web".into() };
        tokio::spawn(feed(dir.path().to_owned(), key, id("spiffe://td/web"), sender));

        let first = updates.recv().await.unwrap().identity.unwrap();
        let begun = tokio::time::Instant::now();
        let second = updates.recv().await.unwrap().identity.unwrap();
        let (earliest, latest) = (LIFETIME.mul_f64(0.45), LIFETIME.mul_f64(0.55) + Duration::from_secs(1));
        assert!((earliest..=latest).contains(&begun.elapsed()), "{:?}", begun.elapsed());

        let public_key = |identity: &Identity| {
            webpki::EndEntityCert::try_from(&identity.svid.chain[0]).unwrap().subject_public_key_info().to_vec()
        };
        assert_ne!(public_key(&first), public_key(&second));
        assert_eq!(first.bundles, second.bundles);
        let lifetime = first.svid.not_after.duration_since(SystemTime::now()).unwrap();
        assert!((LIFETIME - Duration::from_secs(60)..=LIFETIME).contains(&lifetime), "{lifetime:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_unusable_directory_is_pending_and_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let blocked = dir.path().join("blocked");
        fs::write(&blocked, "a file where a directory should be").unwrap();
        let (sender, mut updates) = mpsc::channel(1);
        let key = WorkloadKey { namespace: "shop".into(), name: "web".into() };
        tokio::spawn(feed(blocked.clone(), key, id("spiffe://td/web"), sender));
        assert!(matches!(updates.recv().await.unwrap().identity, Err(Reason::IdentityPending)));
        fs::remove_file(&blocked).unwrap();
        loop {
            if updates.recv().await.unwrap().identity.is_ok() {
                break;
            }
        }
    }
}
