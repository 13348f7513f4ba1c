//! What the data path knows at one moment: immutable, built whole from configuration and identities, swapped at once.

mod destinations;
mod listener;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sealane_common::reason::Reason;
use tokio::sync::watch;

use self::destinations::Destinations;
use crate::config::Config;
use crate::identity::TrustDomain;
use crate::tls::WorkloadTls;
use crate::workload::{Allow, Mode, Peer, Workload, WorkloadKey};

/// Who is in the mesh, who may call whom, and with which identity, at one moment.
#[derive(Clone)]
pub struct Snapshot {
    /// Counts up with every snapshot.
    pub epoch: u64,
    /// The trust domain of this node's workloads.
    pub trust_domain: TrustDomain,
    /// The pods of this node.
    pub workloads: HashMap<WorkloadKey, Arc<LocalWorkload>>,
    /// By address: enrolled workloads on other nodes, and those of this node that are announced.
    pub peers: HashMap<IpAddr, Arc<Peer>>,
    /// Addresses that two workloads, two services, or a workload and a service claim; they are in no other map.
    pub conflicts: HashSet<IpAddr>,
    /// By virtual address and port.
    pub services: HashMap<(IpAddr, u16), Arc<ServicePort>>,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// How much one pod may take.
    pub limits: Limits,
}

/// A pod of this node, with what it needs to serve.
pub struct LocalWorkload {
    /// The pod.
    pub workload: Workload,
    /// Its identity.
    pub identity: IdentityState,
    /// Who may call it, and how.
    pub listener: Listener,
}

/// What is known of a workload's identity.
#[derive(Clone)]
pub enum IdentityState {
    /// None yet.
    Pending,
    /// It has an SVID, which may have expired since.
    Ready(Arc<WorkloadTls>),
    /// It had one, and the source took it back.
    Withdrawn,
}

impl IdentityState {
    /// The identity to speak with at `now`.
    ///
    /// # Errors
    /// `IdentityPending`, `IdentityWithdrawn`, `SvidExpired`.
    pub fn usable(&self, now: SystemTime) -> Result<&Arc<WorkloadTls>, Reason> {
        match self {
            Self::Pending => Err(Reason::IdentityPending),
            Self::Withdrawn => Err(Reason::IdentityWithdrawn),
            Self::Ready(tls) if tls.identity().svid.not_after <= now => Err(Reason::SvidExpired),
            Self::Ready(tls) => Ok(tls),
        }
    }
}

/// A workload's listener policy, resolved.
#[derive(Clone)]
pub struct Listener {
    /// For ports that are not in `ports`.
    pub default: PortRule,
    /// Ports with a mode of their own, or that `allow` names.
    pub ports: BTreeMap<u16, PortRule>,
}

impl Listener {
    /// What holds for `port`.
    pub fn rule(&self, port: u16) -> &PortRule {
        self.ports.get(&port).unwrap_or(&self.default)
    }
}

impl Listener {
    /// The same with one mode for all ports that are captured at all.
    #[must_use]
    pub fn with_mode(mut self, mode: Mode) -> Self {
        let rules = std::iter::once(&mut self.default).chain(self.ports.values_mut());
        rules.filter(|rule| rule.mode != Mode::Disabled).for_each(|rule| rule.mode = mode);
        self
    }
}

/// What holds for one port of a workload.
#[derive(Clone)]
pub struct PortRule {
    /// mTLS, plaintext too, or not captured.
    pub mode: Mode,
    /// Who may call.
    pub allow: Allow,
    /// The TLS server that enforces `allow`; `None` without an SVID.
    pub tls: Option<Arc<rustls::ServerConfig>>,
}

/// One port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The service.
    pub key: WorkloadKey,
    /// Its endpoints, with the target port.
    pub endpoints: Vec<SocketAddr>,
}

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// One TCP dial.
    pub connect: Duration,
    /// A TLS handshake, from its first byte.
    pub handshake: Duration,
    /// A connection's wait for its workload's first SVID.
    pub svid_wait: Duration,
    /// How long connections may go on after SIGTERM or un-enrolment.
    pub drain: Duration,
    /// How long a pod accepts both after its announcement has been withdrawn.
    pub unenrol_grace: Duration,
    /// How long PERMISSIVE waits for the first bytes before the application may speak first.
    pub peek: Duration,
    /// Age at which a connection is closed; zero for never.
    pub max_connection_age: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            handshake: Duration::from_secs(5),
            svid_wait: Duration::from_secs(10),
            drain: Duration::from_secs(30),
            unenrol_grace: Duration::from_secs(5),
            peek: Duration::from_millis(30),
            max_connection_age: Duration::ZERO,
        }
    }
}

/// How much one pod may take, so that the others keep their share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Open connections, in and out.
    pub connections_per_pod: u32,
    /// Handshakes under way.
    pub handshakes_per_pod: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections_per_pod: 10_000, handshakes_per_pod: 256 }
    }
}

impl Snapshot {
    /// The snapshot of a configuration and the identities known so far (absent is pending). Peers learn of this node's
    /// workloads that are `announced`: those whose listeners stand.
    ///
    /// TLS servers are taken over from `previous` where identity and `allow` are the same, so that an unrelated change
    /// builds none; and so is the last known ID of a workload whose SVID was withdrawn.
    pub fn build(
        epoch: u64,
        config: &Config,
        identities: &HashMap<WorkloadKey, IdentityState>,
        announced: &HashSet<WorkloadKey>,
        previous: Option<&Self>,
    ) -> Self {
        let workloads: HashMap<_, _> = config
            .workloads
            .iter()
            .map(|workload| {
                let key = &workload.key;
                let identity = identities.get(key).cloned().unwrap_or(IdentityState::Pending);
                let before = previous.and_then(|snapshot| snapshot.workloads.get(key));
                let listener = listener::listener(config, workload, &identity, before.map(|before| &**before));
                (key.clone(), Arc::new(LocalWorkload { workload: workload.clone(), identity, listener }))
            })
            .collect();
        let Destinations { peers, conflicts, services } =
            destinations::destinations(config, &workloads, announced, previous);
        Self {
            epoch,
            trust_domain: config.trust_domain.clone(),
            workloads,
            peers,
            conflicts,
            services,
            timeouts: config.timeouts,
            limits: config.limits,
        }
    }

    /// True where the service is a mesh destination: at least one endpoint is enrolled, or claimed twice.
    pub fn is_mesh(&self, service: &ServicePort) -> bool {
        let enrolled = |ip| self.peers.contains_key(&ip) || self.conflicts.contains(&ip);
        service.endpoints.iter().any(|endpoint| enrolled(endpoint.ip()))
    }
}

/// The writing end: one per agent, held by the one task that changes anything.
pub struct Publisher(watch::Sender<Arc<Snapshot>>);

/// The reading end: the latest snapshot, and word of every newer one.
pub type Reader = watch::Receiver<Arc<Snapshot>>;

impl Publisher {
    /// With its first snapshot.
    pub fn new(first: Snapshot) -> (Self, Reader) {
        let (sender, reader) = watch::channel(Arc::new(first));
        (Self(sender), reader)
    }

    /// Replaces the snapshot for every reader.
    pub fn publish(&self, snapshot: Arc<Snapshot>) {
        self.0.send_replace(snapshot);
    }

    /// The latest.
    pub fn latest(&self) -> Arc<Snapshot> {
        self.0.borrow().clone()
    }

    /// Another reader.
    pub fn reader(&self) -> Reader {
        self.0.subscribe()
    }
}
