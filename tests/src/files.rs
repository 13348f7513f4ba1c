//! The `files` identity source in a lab: one directory for both agents, filled by a CA of the test's own.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use crate::ca::{Ca, Svid};
use crate::config::{Config, NAMESPACE, TRUST_DOMAIN};
use crate::lab::Lab;

/// The directory, and the CA of the lab's trust domain.
#[derive(Debug)]
pub struct Files {
    /// Who signs.
    pub ca: Ca,
    dir: PathBuf,
}

impl Files {
    /// With a fresh CA and no identity yet.
    pub fn new(lab: &Lab) -> Result<Self> {
        let dir = lab.dir().join("identities");
        fs::create_dir_all(&dir)?;
        Ok(Self { ca: Ca::new(TRUST_DOMAIN)?, dir })
    }

    /// Makes it the source of every workload of the configuration.
    pub fn feed(&self, config: &mut Config) {
        config.identity = json!({ "source": "files", "files": { "dir": self.dir } });
        config.workloads.iter_mut().for_each(|workload| workload.spiffe_id = None);
    }

    /// Gives a pod this identity in place of the one it has.
    pub fn give(&self, pod: &str, svid: &Svid) -> Result<()> {
        svid.write(&self.dir, NAMESPACE, pod)
    }

    /// Gives each pod a fresh one of the CA's.
    pub fn give_sound(&self, pods: &[&str]) -> Result<()> {
        pods.iter().try_for_each(|pod| self.give(pod, &self.ca.svid(pod)?))
    }

    /// Takes a pod's identity away.
    pub fn take(&self, pod: &str) -> Result<()> {
        Ok(fs::remove_dir_all(self.set(pod))?)
    }

    /// Where a pod's files lie.
    pub fn set(&self, pod: &str) -> PathBuf {
        self.dir.join(NAMESPACE).join(pod)
    }
}
