//! Where identities come from. Each source feeds one channel with full replacements of a workload's [`Identity`].
//!
//! * [`embedded`]: a development CA, for demos and tests.
//! * [`files`]: PEM files of somebody else's making, watched.
//!
//! An identity that cannot be renewed or read is kept: whether it is still valid is judged where it is used. It is taken
//! back ([`Reason::IdentityWithdrawn`]) only where whoever gave it took it back.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use sealane_common::reason::Reason;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::identity::TrustDomain;
use crate::svid::Identity;
use crate::workload::{SourceKind, Workload, WorkloadKey};

pub mod embedded;
pub mod files;
mod pem;

/// What a source says of one workload, in place of all that it said before.
#[derive(Clone, Debug)]
pub struct IdentityUpdate {
    /// Whose identity.
    pub workload: WorkloadKey,
    /// The identity, or [`Reason::IdentityPending`] where there is none yet, [`Reason::IdentityWithdrawn`] where there
    /// is none any more.
    pub identity: Result<Arc<Identity>, Reason>,
}

/// Where the sources find what they need.
#[derive(Clone, Debug)]
pub struct SourcesConfig {
    /// The agent's trust domain; the embedded source issues for no other.
    pub trust_domain: TrustDomain,
    /// Directory of the development CAs; `None` where no workload uses them.
    pub embedded_dir: Option<PathBuf>,
    /// Directory of the identities in files; `None` where no workload uses them.
    pub files_dir: Option<PathBuf>,
}

/// The sources of this node's workloads. Dropping it ends them all.
pub struct Sources {
    config: SourcesConfig,
    updates: mpsc::Sender<IdentityUpdate>,
    watched: HashMap<WorkloadKey, Watched>,
    files: Option<files::Files>,
}

impl Sources {
    /// No workload is watched yet; `updates` gets what the sources will say.
    pub fn new(config: SourcesConfig, updates: mpsc::Sender<IdentityUpdate>) -> Self {
        Self { config, updates, watched: HashMap::new(), files: None }
    }

    /// Begins to follow a workload's identity; the first update says [`Reason::IdentityPending`] where there is none.
    /// Does nothing where the workload is followed already and its source would give the same. To be called within a
    /// tokio runtime.
    pub fn watch(&mut self, workload: &Workload) {
        if self.watched.get(&workload.key).is_some_and(|watched| watched.is_for(workload)) {
            return;
        }
        self.forget(&workload.key);
        let task = match self.begin(workload) {
            Ok(task) => task,
            Err(error) => {
                tracing::error!(workload = %workload.key, %error, "no identity source");
                Some(self.say_pending(workload.key.clone()))
            }
        };
        self.watched.insert(workload.key.clone(), Watched { workload: workload.clone(), task });
    }

    /// Ends it. An update that was on its way may still arrive.
    pub fn forget(&mut self, key: &WorkloadKey) {
        let was_watched = self.watched.remove(key).is_some();
        if let (true, Some(files)) = (was_watched, &self.files) {
            files.forget(key);
        }
    }

    fn begin(&mut self, workload: &Workload) -> Result<Option<AbortHandle>, SourceError> {
        match workload.source {
            SourceKind::Embedded => {
                let dir = self.config.embedded_dir.clone().ok_or(SourceError::NoDirectory("embedded"))?;
                let id = workload.spiffe_id.clone().ok_or(SourceError::NoSpiffeId)?;
                if *id.trust_domain() != self.config.trust_domain {
                    return Err(SourceError::TrustDomain);
                }
                let feed = embedded::feed(dir, workload.key.clone(), id, self.updates.clone());
                Ok(Some(tokio::spawn(feed).abort_handle()))
            }
            SourceKind::Files => {
                let files = match self.files.take() {
                    Some(files) => files,
                    None => {
                        let dir = self.config.files_dir.clone().ok_or(SourceError::NoDirectory("files"))?;
                        files::Files::start(dir, self.updates.clone()).map_err(SourceError::Thread)?
                    }
                };
                files.watch(workload);
                self.files = Some(files);
                Ok(None)
            }
        }
    }

    fn say_pending(&self, workload: WorkloadKey) -> AbortHandle {
        let updates = self.updates.clone();
        let say = async move {
            let _closed = updates.send(IdentityUpdate { workload, identity: Err(Reason::IdentityPending) }).await;
        };
        tokio::spawn(say).abort_handle()
    }
}

/// Why a workload's source cannot begin: the configuration has to change first.
#[derive(Debug, thiserror::Error)]
enum SourceError {
    #[error("identity.{0}.dir is not configured")]
    NoDirectory(&'static str),
    #[error("the embedded source needs the workload's spiffeId")]
    NoSpiffeId,
    #[error("the embedded source issues for the agent's own trust domain only")]
    TrustDomain,
    #[error("cannot start the thread that watches files: {0}")]
    Thread(std::io::Error),
}

struct Watched {
    workload: Workload,
    /// `None` where another's thread does it.
    task: Option<AbortHandle>,
}

impl Watched {
    /// True where the source would do for `workload` what it does already.
    fn is_for(&self, workload: &Workload) -> bool {
        self.workload.source == workload.source
            && self.workload.spiffe_id == workload.spiffe_id
            && self.workload.service_account == workload.service_account
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests;
