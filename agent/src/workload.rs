//! Plain values that configuration and control speak in: workloads of this node, peers on others, services, policies.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::identity::{SpiffeId, TrustDomain};

/// A workload's name in logs, metrics and maps: `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkloadKey {
    /// Kubernetes namespace, or its counterpart in the static file.
    pub namespace: Arc<str>,
    /// Pod name, or its counterpart in the static file.
    pub name: Arc<str>,
}

impl fmt::Display for WorkloadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its name.
    pub key: WorkloadKey,
    /// Service account; empty where there is none.
    pub service_account: String,
    /// Labels that policies select by.
    pub labels: BTreeMap<String, String>,
    /// Where its network namespace is mounted.
    pub netns: PathBuf,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// The ID that the `embedded` source shall issue; `None` for every other source.
    pub spiffe_id: Option<SpiffeId>,
    /// Where its identity comes from.
    pub source: SourceKind,
}

impl Workload {
    /// A pod of which only the netns is known: one that an earlier agent enrolled and nobody configures any more.
    pub fn nameless(key: WorkloadKey, netns: &Path) -> Self {
        let (service_account, labels, ips) = Default::default();
        let source = SourceKind::Files;
        Self { key, service_account, labels, netns: netns.to_owned(), ips, spiffe_id: None, source }
    }
}

/// Where a workload's identity comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceKind {
    /// A development CA.
    Embedded,
    /// PEM files, watched.
    Files,
}

/// An enrolled workload on another node, or (derived) of this one: what a client may know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub key: WorkloadKey,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// The ID it must present.
    pub spiffe_id: SpiffeId,
    /// Mode of the ports not listed.
    pub mode: Mode,
    /// Ports with a mode of their own.
    pub ports: BTreeMap<u16, Mode>,
}

/// App Mesh's listener modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// mTLS or nothing.
    Strict,
    /// Plaintext is accepted too, and counted.
    Permissive,
    /// Not captured.
    Disabled,
}

/// A virtual address in front of endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub key: WorkloadKey,
    /// Virtual addresses.
    pub vips: Vec<IpAddr>,
    /// Virtual port to endpoint port.
    pub ports: BTreeMap<u16, u16>,
    /// Addresses of the pods behind it.
    pub endpoints: Vec<IpAddr>,
}

/// An entry of `policies`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its name; the last tie-breaker of precedence.
    pub key: WorkloadKey,
    /// Which workloads of its namespace it binds.
    pub select: Select,
    /// The listener block.
    pub listener: Option<ListenerPolicy>,
}

/// Which workloads of its namespace a policy binds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Select {
    /// All of these labels.
    Labels(BTreeMap<String, String>),
    /// This service account.
    ServiceAccount(String),
    /// The whole namespace.
    Namespace,
}

/// A policy's listener block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerPolicy {
    /// Mode of the ports not listed.
    pub mode: Mode,
    /// Ports with a mode of their own.
    pub ports: BTreeMap<u16, Mode>,
    /// Who may call; `None` is any ID of the workload's own trust domain, an empty list nobody.
    pub allow: Option<Vec<AllowRule>>,
}

/// An entry of `allow`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowRule {
    /// Exact IDs.
    pub from: Vec<SpiffeId>,
    /// Ports, empty for all.
    pub ports: Vec<u16>,
}

/// Which peers may call a port: `allow` as resolved for one workload and port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Allow {
    /// No `allow`: any ID of the workload's own trust domain.
    TrustDomain(TrustDomain),
    /// Exactly these; empty is nobody.
    Ids(Arc<[SpiffeId]>),
}

impl Allow {
    /// True where the peer may call.
    pub fn permits(&self, peer: &SpiffeId) -> bool {
        match self {
            Self::TrustDomain(own) => peer.trust_domain() == own,
            Self::Ids(ids) => ids.contains(peer),
        }
    }
}
