//! The static file: read, judged as a whole, and refused with file, line and reason where anything is wrong with it.
//!
//! A field that is unknown, or known but not enforced in this version, is wrong too: ignoring it could fail open.

mod error;
mod mesh;
mod policies;
mod raw;
#[cfg(test)]
mod tests;
mod validate;
mod values;
pub mod watch;

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde_saphyr::{Location, UserMessageFormatter};

use self::error::Problems;
pub use self::error::{ConfigError, ConfigErrors};
use crate::identity::TrustDomain;
use crate::snapshot::{Limits, Timeouts};
use crate::workload::{Peer, Policy, Service, SourceKind, Workload};

/// A configuration that has been judged good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// This node's name.
    pub node: String,
    /// The trust domain of this node's workloads.
    pub trust_domain: TrustDomain,
    /// Where identities come from.
    pub identity: IdentitySettings,
    /// Where the kernel programs are attached and pinned.
    pub capture: Capture,
    /// The admin server's address, on loopback.
    pub admin: SocketAddr,
    /// The address for a scraper, where there is one.
    pub metrics: Option<SocketAddr>,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// How much one pod may take.
    pub limits: Limits,
    /// The pods of this node.
    pub workloads: Vec<Workload>,
    /// Enrolled workloads on other nodes.
    pub peers: Vec<Peer>,
    /// Virtual addresses.
    pub services: Vec<Service>,
    /// Who may call whom, and how.
    pub policies: Vec<Policy>,
    places: Places,
}

/// Where identities come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentitySettings {
    /// The source of workloads that name none.
    pub source: SourceKind,
    /// Directory of the development CA.
    pub embedded_dir: PathBuf,
    /// Directory of the files source.
    pub files_dir: PathBuf,
}

/// Where the kernel programs are attached and pinned, and where the agent listens inside each pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capture {
    /// The cgroup of all pods.
    pub cgroup: PathBuf,
    /// Directory for pins, in a BPF file system.
    pub bpffs: PathBuf,
    /// Four consecutive ports: two for each of the two agents that live side by side during an upgrade.
    pub ports: RangeInclusive<u16>,
}

impl Default for Capture {
    fn default() -> Self {
        Self {
            cgroup: "/sys/fs/cgroup/kubepods.slice".into(),
            bpffs: "/sys/fs/bpf/sealane".into(),
            ports: 15001..=15004,
        }
    }
}

/// The file, and where it says what only a restart can change.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Places {
    file: PathBuf,
    trust_domain: Location,
    node: Location,
    identity: Location,
    capture: Location,
    admin: Location,
    metrics: Location,
}

impl Config {
    /// Reads and judges a file.
    ///
    /// # Errors
    /// Everything that is wrong with it, or that it cannot be read.
    pub fn load(path: &Path) -> Result<Self, ConfigErrors> {
        let text =
            std::fs::read_to_string(path).map_err(|error| whole_file(path, format!("cannot be read: {error}")))?;
        Self::parse(path, &text)
    }

    /// Judges a file's text; `path` only names it in errors.
    ///
    /// # Errors
    /// Everything that is wrong with it. What is not YAML, of the wrong shape, or an unknown field ends the search.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigErrors> {
        let options = serde_saphyr::options! {
            // Snippets would carry the file's lines into the log.
            with_snippet: false,
            strict_booleans: true,
            reject_unsupported_tags: true,
        };
        let file = serde_saphyr::from_str_with_options(text, options).map_err(|error| syntax(path, &error))?;
        validate::config(path, &file)
    }

    /// True where any workload, or the default, takes its identity from `source`.
    pub fn uses(&self, source: SourceKind) -> bool {
        self.identity.source == source || self.workloads.iter().any(|workload| workload.source == source)
    }

    /// Judges whether a running agent can go over from `old` to `new`.
    ///
    /// # Errors
    /// What only a restart can change: `node`, `trustDomain`, the directories of `identity`, `capture`, `admin`, `metrics`.
    pub fn reload_check(old: &Self, new: &Self) -> Result<(), ConfigErrors> {
        let directories = |config: &Self| (config.identity.embedded_dir.clone(), config.identity.files_dir.clone());
        let places = &new.places;
        let changes = [
            (old.trust_domain != new.trust_domain, places.trust_domain, "trustDomain"),
            (old.node != new.node, places.node, "node"),
            (directories(old) != directories(new), places.identity, "a directory of identity"),
            (old.capture != new.capture, places.capture, "capture"),
            (old.admin != new.admin, places.admin, "admin"),
            (old.metrics != new.metrics, places.metrics, "metrics"),
        ];
        let mut problems = Problems::default();
        for (_, at, what) in changes.into_iter().filter(|(changed, ..)| *changed) {
            problems.add(at, format!("{what} changed, which only a restart can do"));
        }
        problems.finish(&places.file, Some(()))
    }
}

fn syntax(path: &Path, error: &serde_saphyr::Error) -> ConfigErrors {
    let location = error.location().unwrap_or(Location::UNKNOWN);
    let text = error.render_with_formatter(&UserMessageFormatter);
    let place = format!(" at line {}, column {}", location.line(), location.column());
    let reason = text.strip_suffix(&place).unwrap_or(&text).to_owned();
    let error = ConfigError { line: location.line(), column: location.column(), reason };
    ConfigErrors { file: path.into(), errors: vec![error] }
}

fn whole_file(path: &Path, reason: String) -> ConfigErrors {
    ConfigErrors { file: path.into(), errors: vec![ConfigError { line: 0, column: 0, reason }] }
}
