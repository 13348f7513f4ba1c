use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::timeout;

use super::*;

fn workload(source: SourceKind, spiffe_id: Option<&str>) -> Workload {
    Workload {
        key: WorkloadKey { namespace: "shop".into(), name: "web".into() },
        service_account: String::new(),
        labels: BTreeMap::new(),
        netns: PathBuf::new(),
        ips: Vec::new(),
        spiffe_id: spiffe_id.map(|id| id.parse().unwrap()),
        source,
    }
}

fn sources(embedded_dir: Option<PathBuf>) -> (Sources, mpsc::Receiver<IdentityUpdate>) {
    let (sender, updates) = mpsc::channel(8);
    let config = SourcesConfig { trust_domain: "td".parse().unwrap(), embedded_dir, files_dir: None };
    (Sources::new(config, sender), updates)
}

async fn next(updates: &mut mpsc::Receiver<IdentityUpdate>) -> Result<String, Reason> {
    let update = timeout(Duration::from_secs(15), updates.recv()).await.expect("no update in time").unwrap();
    update.identity.map(|identity| identity.svid.id.to_string())
}

#[tokio::test]
async fn what_cannot_begin_is_pending() {
    let dir = tempfile::tempdir().unwrap();
    let (mut sources, mut updates) = sources(Some(dir.path().to_owned()));
    for workload in [
        workload(SourceKind::Embedded, None),
        workload(SourceKind::Embedded, Some("spiffe://other/web")),
        workload(SourceKind::Files, None),
    ] {
        sources.watch(&workload);
        assert_eq!(next(&mut updates).await, Err(Reason::IdentityPending));
    }
}

#[tokio::test]
async fn a_workload_is_begun_again_only_where_it_changed() {
    let dir = tempfile::tempdir().unwrap();
    let (mut sources, mut updates) = sources(Some(dir.path().to_owned()));
    let first = workload(SourceKind::Embedded, Some("spiffe://td/web"));
    sources.watch(&first);
    assert_eq!(next(&mut updates).await.as_deref(), Ok("spiffe://td/web"));

    let relabelled = Workload { labels: BTreeMap::from([("app".into(), "web".into())]), ..first.clone() };
    sources.watch(&relabelled);
    sources.watch(&workload(SourceKind::Embedded, Some("spiffe://td/other")));
    assert_eq!(next(&mut updates).await.as_deref(), Ok("spiffe://td/other"), "the label alone made an update");
}

#[tokio::test]
async fn dropping_the_sources_ends_them() {
    let (dir, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (sender, mut updates) = mpsc::channel(8);
    let config = SourcesConfig {
        trust_domain: "td".parse().unwrap(),
        embedded_dir: Some(dir.path().to_owned()),
        files_dir: Some(files.path().to_owned()),
    };
    let mut sources = Sources::new(config, sender);
    sources.watch(&workload(SourceKind::Embedded, Some("spiffe://td/web")));
    let mut in_files = workload(SourceKind::Files, None);
    in_files.key.name = "api".into();
    sources.watch(&in_files);
    next(&mut updates).await.ok();
    next(&mut updates).await.ok();
    drop(sources);
    // The channel closes once every sender is gone: the tasks' and the thread's.
    assert!(timeout(Duration::from_secs(15), updates.recv()).await.expect("a source lives on").is_none());
}
