use std::fs;
use std::os::unix::fs::symlink;

use rustls::pki_types::CertificateDer;
use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::tls::test_ca::{Issued, TestCa};
use crate::workload::SourceKind;

/// Well below [`RESCAN`]: what arrives in time was seen as an event.
const SOON: Duration = Duration::from_secs(15);

struct Bench {
    dir: TempDir,
    ca: TestCa,
    files: Files,
    updates: mpsc::Receiver<IdentityUpdate>,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (sender, updates) = mpsc::channel(8);
        let files = Files::start(dir.path().to_owned(), sender).unwrap();
        Self { dir, ca: TestCa::new("td"), files, updates }
    }

    fn set(&self, name: &str) -> PathBuf {
        self.dir.path().join("shop").join(name)
    }

    fn watch(&self) {
        self.files.watch(&workload("web-0", "web"));
    }

    async fn next(&mut self) -> Result<Arc<Identity>, Reason> {
        timeout(SOON, self.updates.recv()).await.expect("no update in time").unwrap().identity
    }

    async fn pending(&mut self) {
        self.watch();
        assert_eq!(self.next().await.unwrap_err(), Reason::IdentityPending);
    }

    /// Reads a set until it is the one of `issued`; each on the way must be an older one or none.
    async fn until(&mut self, issued: &Issued) {
        while self.next().await.ok().is_none_or(|identity| identity.svid.chain != issued.chain) {}
    }
}

fn workload(name: &str, service_account: &str) -> Workload {
    Workload {
        key: WorkloadKey { namespace: "shop".into(), name: name.into() },
        service_account: service_account.into(),
        labels: BTreeMap::new(),
        netns: PathBuf::new(),
        ips: Vec::new(),
        spiffe_id: None,
        source: SourceKind::Files,
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    ::pem::encode(&::pem::Pem::new(label, der))
}

fn put(set: &Path, issued: &Issued, roots: &[CertificateDer<'_>]) {
    fs::create_dir_all(set).unwrap();
    let certificates = |all: &[CertificateDer<'_>]| all.iter().map(|der| pem("CERTIFICATE", der)).collect::<String>();
    fs::write(set.join(BUNDLE), certificates(roots)).unwrap();
    fs::write(set.join(SVID), certificates(&issued.chain)).unwrap();
    fs::write(set.join(KEY), pem("PRIVATE KEY", &issued.key())).unwrap();
}

#[tokio::test]
async fn a_set_that_comes_later_is_taken() {
    let mut bench = Bench::new();
    bench.pending().await;
    let issued = bench.ca.issue("spiffe://td/web");
    put(&bench.set("web"), &issued, &[bench.ca.certificate.clone()]);
    let identity = bench.next().await.unwrap();
    assert_eq!(identity.svid.id.as_str(), "spiffe://td/web");
    assert_eq!(identity.bundles.len(), 1);
    assert_eq!(identity.bundles[&bench.ca.trust_domain].roots, [bench.ca.certificate.clone()]);
}

#[tokio::test]
async fn a_set_by_workload_name_goes_before_one_by_service_account() {
    let mut bench = Bench::new();
    let roots = [bench.ca.certificate.clone()];
    put(&bench.set("web"), &bench.ca.issue("spiffe://td/account"), &roots);
    put(&bench.set("web-0"), &bench.ca.issue("spiffe://td/name"), &roots);
    bench.watch();
    assert_eq!(bench.next().await.unwrap().svid.id.as_str(), "spiffe://td/name");
}

#[tokio::test]
async fn a_rotation_is_picked_up_and_an_unchanged_set_says_nothing() {
    let mut bench = Bench::new();
    let (roots, set) = ([bench.ca.certificate.clone()], bench.set("web"));
    let first = bench.ca.issue("spiffe://td/web");
    put(&set, &first, &roots);
    bench.watch();
    bench.until(&first).await;

    // The same again, then another: the next update is the other.
    put(&set, &first, &roots);
    let second = bench.ca.issue("spiffe://td/web");
    put(&set, &second, &roots);
    assert_eq!(bench.next().await.unwrap().svid.chain, second.chain);

    // A new root alone is news, too.
    let root = TestCa::new("td").certificate;
    put(&set, &second, &[roots[0].clone(), root.clone()]);
    assert_eq!(bench.next().await.unwrap().bundles[&bench.ca.trust_domain].roots, [roots[0].clone(), root]);
}

#[tokio::test]
async fn a_bad_set_changes_nothing() {
    let mut bench = Bench::new();
    let (roots, set) = ([bench.ca.certificate.clone()], bench.set("web"));
    let good = bench.ca.issue("spiffe://td/web");
    put(&set, &good, &roots);
    bench.watch();
    bench.until(&good).await;

    for file in [SVID, KEY, BUNDLE] {
        for spoil in [Some(""), Some("-----BEGIN CERTIFICATE-----\nMIIB"), None] {
            match spoil {
                Some(text) => fs::write(set.join(file), text).unwrap(),
                None => fs::remove_file(set.join(file)).unwrap(),
            }
            let error = read(&set).err().unwrap().to_string();
            assert!(error.contains(set.join(file).to_str().unwrap()), "{error}");
            put(&set, &good, &roots);
        }
    }
    let other = bench.ca.issue("spiffe://td/web");
    fs::write(set.join(KEY), pem("PRIVATE KEY", &other.key())).unwrap();
    assert!(read(&set).err().unwrap().to_string().contains("key.pem: the private key is not the leaf's"));
    put(&set, &good, &[good.chain[0].clone()]);
    assert!(read(&set).err().unwrap().to_string().contains("bundle.pem: certificate 1"));

    // Let the follower see it, as the complaint of a fresh look shows, and stay with what it had.
    let mut followed = Followed::new(bench.dir.path(), &workload("web-0", "web").key, "web");
    followed.said = Some(Ok(good.identity(&[&bench.ca])));
    let (sender, mut updates) = mpsc::channel(1);
    let key = workload("web-0", "web").key;
    let mut followed = tokio::task::spawn_blocking(move || {
        assert!(followed.look(&key, &sender).is_ok());
        followed
    })
    .await
    .unwrap();
    assert!(followed.complaint.take().unwrap().contains("bundle.pem"));
    assert!(updates.try_recv().is_err());

    // What comes next is the next good set, with nothing in between.
    let next = bench.ca.issue("spiffe://td/web");
    put(&set, &next, &roots);
    assert_eq!(bench.next().await.unwrap().svid.chain, next.chain);
}

#[tokio::test]
async fn a_removed_set_withdraws_and_a_new_one_comes_back() {
    let mut bench = Bench::new();
    let (roots, set) = ([bench.ca.certificate.clone()], bench.set("web"));
    let issued = bench.ca.issue("spiffe://td/web");
    put(&set, &issued, &roots);
    bench.watch();
    bench.until(&issued).await;
    fs::remove_dir_all(&set).unwrap();
    assert_eq!(bench.next().await.unwrap_err(), Reason::IdentityWithdrawn);
    put(&set, &issued, &roots);
    assert_eq!(bench.next().await.unwrap().svid.chain, issued.chain);

    // The bundle alone is no identity.
    fs::remove_file(set.join(SVID)).unwrap();
    fs::remove_file(set.join(KEY)).unwrap();
    assert_eq!(bench.next().await.unwrap_err(), Reason::IdentityWithdrawn);
}

/// As the kubelet writes volumes: files are links through `..data`, which is replaced by a rename.
#[tokio::test]
async fn a_swapped_symlink_is_followed() {
    let mut bench = Bench::new();
    let (roots, set) = ([bench.ca.certificate.clone()], bench.set("web"));
    let generations: Vec<_> = (0..3).map(|_| bench.ca.issue("spiffe://td/web")).collect();
    let swap = |at: usize| {
        let data = format!("..{at}");
        put(&set.join(&data), &generations[at], &roots);
        symlink(&data, set.join("..data_tmp")).unwrap();
        fs::rename(set.join("..data_tmp"), set.join("..data")).unwrap();
    };
    swap(0);
    for file in [SVID, KEY, BUNDLE] {
        symlink(Path::new("..data").join(file), set.join(file)).unwrap();
    }
    bench.watch();
    bench.until(&generations[0]).await;
    for at in [1, 2] {
        swap(at);
        fs::remove_dir_all(set.join(format!("..{}", at - 1))).unwrap();
        assert_eq!(bench.next().await.unwrap().svid.chain, generations[at].chain);
    }
}

/// The whole set is a symlink to somewhere else; what is behind the new one is watched, too.
#[tokio::test]
async fn a_swapped_directory_is_followed() {
    let mut bench = Bench::new();
    let roots = [bench.ca.certificate.clone()];
    let elsewhere = tempfile::tempdir().unwrap();
    let [first, second, third] = [0, 1, 2].map(|_| bench.ca.issue("spiffe://td/web"));
    let (one, two) = (elsewhere.path().join("1"), elsewhere.path().join("2"));
    put(&one, &first, &roots);
    put(&two, &second, &roots);
    fs::create_dir_all(bench.dir.path().join("shop")).unwrap();
    symlink(&one, bench.set("web")).unwrap();
    bench.watch();
    bench.until(&first).await;
    symlink(&two, bench.set("new")).unwrap();
    fs::rename(bench.set("new"), bench.set("web")).unwrap();
    assert_eq!(bench.next().await.unwrap().svid.chain, second.chain);
    put(&two, &third, &roots);
    assert_eq!(bench.next().await.unwrap().svid.chain, third.chain);
}

#[tokio::test]
async fn federated_bundles_stay_apart() {
    let mut bench = Bench::new();
    let (set, other) = (bench.set("web"), TestCa::new("other"));
    let issued = bench.ca.issue("spiffe://td/web");
    put(&set, &issued, &[bench.ca.certificate.clone()]);
    fs::write(set.join("bundle.other.pem"), pem("CERTIFICATE", &other.certificate)).unwrap();
    bench.watch();
    let identity = bench.next().await.unwrap();
    assert_eq!(identity.bundles[&bench.ca.trust_domain].roots, [bench.ca.certificate.clone()]);
    assert_eq!(identity.bundles[&other.trust_domain].roots, std::slice::from_ref(&other.certificate));

    for name in ["bundle.td.pem", "bundle.Other.pem", "bundle..pem"] {
        fs::write(set.join(name), pem("CERTIFICATE", &other.certificate)).unwrap();
        let error = read(&set).err();
        fs::remove_file(set.join(name)).unwrap();
        assert!(matches!(error, Some(FilesError::BundleName { .. })), "{name}: {error:?}");
    }
}

#[test]
fn a_name_leads_nowhere_else() {
    for name in ["", ".", "..", "a/b", "/etc", "a/..", "a/"] {
        assert!(!is_file_name(name), "{name}");
    }
    assert!(is_file_name("web-0") && is_file_name("..data"));
}
