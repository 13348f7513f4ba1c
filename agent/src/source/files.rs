//! SVIDs in PEM files, put there by somebody else and followed as they change.
//!
//! A workload's set lies in `<dir>/<namespace>/<workload name>/`, or else in `<dir>/<namespace>/<service account>/`:
//!
//! | file | what |
//! |---|---|
//! | `svid.pem` | the SVID, leaf first, then its intermediates |
//! | `key.pem` | its key: PKCS#8, SEC1 or PKCS#1, not encrypted |
//! | `bundle.pem` | the roots of the SVID's own trust domain |
//! | `bundle.<trust domain>.pem` | optional: the roots of a federated trust domain |
//!
//! The set is read anew when anything below `<dir>` changes, and from time to time. A set that is incomplete or wrong
//! changes nothing but the log; a writer should still put a new set in place at once, by a rename of the directory or of
//! a symlink to it, as Kubernetes does. A set without svid.pem and key.pem is none: that withdraws the identity.
//!
//! One thread does all of it, because inotify's instances are few and file systems may block.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use sealane_common::reason::Reason;
use tokio::sync::mpsc;

use super::pem::{self, PemError};
use crate::identity::TrustDomain;
use crate::source::IdentityUpdate;
use crate::svid::{Bundle, Identity, Svid, SvidError};
use crate::tls::profile;
use crate::workload::{Workload, WorkloadKey};

/// The thread that watches the files. Dropping it ends the thread.
pub struct Files {
    inputs: Sender<Input>,
}

impl Files {
    /// Starts it on `dir`, which need not exist yet.
    ///
    /// # Errors
    /// Where the system gives no thread.
    pub fn start(dir: PathBuf, updates: mpsc::Sender<IdentityUpdate>) -> io::Result<Self> {
        let (inputs, inbox) = channel();
        let follower = Follower { dir, updates, events: inputs.clone(), workloads: HashMap::new() };
        std::thread::Builder::new().name("identity-files".into()).spawn(move || follower.run(&inbox))?;
        Ok(Self { inputs })
    }

    /// Follows the set of a workload.
    pub fn watch(&self, workload: &Workload) {
        let input = Input::Watch { key: workload.key.clone(), service_account: workload.service_account.clone() };
        // The thread ends before us only where nobody wants updates any more.
        let _ended = self.inputs.send(input);
    }

    /// Follows it no longer.
    pub fn forget(&self, key: &WorkloadKey) {
        let _ended = self.inputs.send(Input::Forget(key.clone()));
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ended = self.inputs.send(Input::Stop);
    }
}

enum Input {
    Watch { key: WorkloadKey, service_account: String },
    Forget(WorkloadKey),
    Changed,
    Stop,
}

/// A set is read once nothing has changed for this long,
const SETTLE: Duration = Duration::from_millis(100);
/// but no later than this after the first change,
const SETTLE_AT_MOST: Duration = Duration::from_secs(1);
/// and without any change that often, for what inotify does not see: another host's writes to a shared file system, a
/// change behind a symlink that leads out of the directory.
const RESCAN: Duration = Duration::from_secs(30);
/// The same while the directory cannot be watched.
const RESCAN_UNWATCHED: Duration = Duration::from_secs(2);

struct Follower {
    dir: PathBuf,
    updates: mpsc::Sender<IdentityUpdate>,
    events: Sender<Input>,
    workloads: HashMap<WorkloadKey, Followed>,
}

/// Nobody wants updates any more.
struct Closed;

impl Follower {
    fn run(mut self, inbox: &Receiver<Input>) {
        let mut watcher = self.watch_dir();
        let mut first_change: Option<Instant> = None;
        let mut due = Instant::now() + rescan(&watcher);
        loop {
            let outcome = match inbox.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(Input::Watch { key, service_account }) => self.add(key, &service_account),
                Ok(Input::Forget(key)) => {
                    self.workloads.remove(&key);
                    Ok(())
                }
                Ok(Input::Changed) => {
                    let now = Instant::now();
                    due = (now + SETTLE).min(*first_change.get_or_insert(now) + SETTLE_AT_MOST);
                    Ok(())
                }
                Err(RecvTimeoutError::Timeout) => {
                    // A new watcher before each look: directories and symlinks may have been replaced, and whatever
                    // changes from here on is either seen by it or by the look.
                    watcher = self.watch_dir();
                    first_change = None;
                    due = Instant::now() + rescan(&watcher);
                    self.look_at_all()
                }
                Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => Err(Closed),
            };
            if outcome.is_err() {
                return;
            }
        }
    }

    fn add(&mut self, key: WorkloadKey, service_account: &str) -> Result<(), Closed> {
        let mut followed = Followed::new(&self.dir, &key, service_account);
        followed.look(&key, &self.updates)?;
        self.workloads.insert(key, followed);
        Ok(())
    }

    fn look_at_all(&mut self) -> Result<(), Closed> {
        self.workloads.iter_mut().try_for_each(|(key, followed)| followed.look(key, &self.updates))
    }

    fn watch_dir(&self) -> Option<RecommendedWatcher> {
        let events = self.events.clone();
        let handler = move |event: notify::Result<notify::Event>| {
            // An error (a full queue, too many watches) may hide a change.
            if event.is_err() || event.is_ok_and(|event| changes(event.kind)) {
                let _ended = events.send(Input::Changed);
            }
        };
        let watcher = notify::recommended_watcher(handler).and_then(|mut watcher| {
            watcher.watch(&self.dir, RecursiveMode::Recursive)?;
            Ok(watcher)
        });
        watcher
            .inspect_err(|error| tracing::debug!(dir = %self.dir.display(), %error, "cannot watch, looking often"))
            .ok()
    }
}

fn rescan(watcher: &Option<RecommendedWatcher>) -> Duration {
    if watcher.is_some() { RESCAN } else { RESCAN_UNWATCHED }
}

/// Reading is an event as well, our own included.
fn changes(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(access) => access == AccessKind::Close(AccessMode::Write),
        EventKind::Any | EventKind::Create(_) | EventKind::Modify(_) | EventKind::Remove(_) | EventKind::Other => true,
    }
}

/// One workload, and what was said of it last.
struct Followed {
    /// By workload name, by service account.
    candidates: Vec<PathBuf>,
    said: Option<Result<Arc<Identity>, Reason>>,
    complaint: Option<String>,
}

impl Followed {
    fn new(dir: &Path, key: &WorkloadKey, service_account: &str) -> Self {
        let candidate = |name: &str| {
            let plain = is_file_name(&key.namespace) && is_file_name(name);
            plain.then(|| dir.join(&*key.namespace).join(name))
        };
        let candidates = [candidate(&key.name), candidate(service_account)].into_iter().flatten().collect();
        Self { candidates, said: None, complaint: None }
    }

    fn look(&mut self, key: &WorkloadKey, updates: &mpsc::Sender<IdentityUpdate>) -> Result<(), Closed> {
        let found = self.candidates.iter().find(|set| exists(&set.join(SVID)) || exists(&set.join(KEY)));
        let read = found.map(|set| read(set));
        let complaint = read.as_ref().and_then(|read| read.as_ref().err()).map(ToString::to_string);
        if let (Some(error), true) = (&complaint, complaint != self.complaint) {
            tracing::warn!(workload = %key, %error, "a set of identity files is refused; the identity stays as it is");
        }
        self.complaint = complaint;

        let next = match (read, &self.said) {
            (Some(Ok(new)), Some(Ok(old))) if same(&new, old) => return Ok(()),
            (Some(Ok(new)), _) => Ok(Arc::new(new)),
            (Some(Err(_)), Some(_)) | (None, Some(Err(_))) => return Ok(()),
            (None, Some(Ok(_))) => Err(Reason::IdentityWithdrawn),
            (Some(Err(_)) | None, None) => Err(Reason::IdentityPending),
        };
        match &next {
            Ok(identity) => tracing::info!(workload = %key, svid = ?identity.svid, "identity read"),
            Err(reason) => tracing::warn!(workload = %key, %reason, "no identity files"),
        }
        self.said = Some(next.clone());
        updates.blocking_send(IdentityUpdate { workload: key.clone(), identity: next }).map_err(|_| Closed)
    }
}

const SVID: &str = "svid.pem";
const KEY: &str = "key.pem";
const BUNDLE: &str = "bundle.pem";

/// Why a set of files is no identity.
#[derive(Debug, thiserror::Error)]
enum FilesError {
    #[error(transparent)]
    Pem(#[from] PemError),
    #[error("{}: {source}", path.display())]
    Svid { path: PathBuf, source: SvidError },
    #[error("{}: certificate {at}, counted from 1, is no signing certificate", path.display())]
    NoRoot { path: PathBuf, at: usize },
    #[error("{}: {source}", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("{}: the name must be bundle.<trust domain>.pem, and not of the SVID's own", path.display())]
    BundleName { path: PathBuf },
}

fn read(set: &Path) -> Result<Identity, FilesError> {
    let chain = pem::certificates(&set.join(SVID))?;
    let key_path = set.join(KEY);
    let key = pem::private_key(&key_path)?;
    let svid = Svid::new(chain, key).map_err(|source| {
        let path = match source {
            SvidError::Key | SvidError::KeyMismatch => key_path,
            SvidError::Empty | SvidError::Profile(_) | SvidError::Intermediate(_) => set.join(SVID),
        };
        FilesError::Svid { path, source }
    })?;

    let own = svid.id.trust_domain().clone();
    let mut bundles = BTreeMap::from([(own.clone(), bundle(&set.join(BUNDLE), own.clone())?)]);
    for (path, name) in federated(set)? {
        match name.parse::<TrustDomain>() {
            Ok(domain) if domain != own => bundles.insert(domain.clone(), bundle(&path, domain)?),
            Ok(_) | Err(_) => return Err(FilesError::BundleName { path }),
        };
    }
    Ok(Identity { svid, bundles })
}

fn bundle(path: &Path, trust_domain: TrustDomain) -> Result<Arc<Bundle>, FilesError> {
    let roots = pem::certificates(path)?;
    match roots.iter().position(|root| !profile::is_root(root)) {
        Some(at) => Err(FilesError::NoRoot { path: path.to_owned(), at: at + 1 }),
        None => Ok(Arc::new(Bundle { trust_domain, roots })),
    }
}

/// Path and trust domain, as the name has it, of each `bundle.<trust domain>.pem`.
fn federated(set: &Path) -> Result<Vec<(PathBuf, String)>, FilesError> {
    let failed = |source| FilesError::Directory { path: set.to_owned(), source };
    let mut found = Vec::new();
    for entry in set.read_dir().map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some(domain) = name.strip_prefix("bundle.").and_then(|rest| rest.strip_suffix(".pem")) {
            found.push((path.clone(), domain.to_owned()));
        }
    }
    Ok(found)
}

/// All but the key, which goes with the leaf.
fn same(one: &Identity, other: &Identity) -> bool {
    one.svid.chain == other.svid.chain && one.bundles == other.bundles
}

/// A symlink that leads nowhere is there: its target is being replaced. So is what cannot be looked at.
fn exists(path: &Path) -> bool {
    match path.symlink_metadata() {
        Ok(_) => true,
        Err(error) => !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory),
    }
}

/// True where a name is one plain component of a path, so that it leads nowhere else.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == name)
}

#[cfg(test)]
mod tests;
