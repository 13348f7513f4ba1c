//! What can be dialled in the mesh, by address, and which addresses are claimed twice.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::{IdentityState, LocalWorkload, ServicePort, Snapshot};
use crate::config::Config;
use crate::identity::SpiffeId;
use crate::workload::{Peer, WorkloadKey};

/// The three maps of a snapshot that are keyed by destination.
pub(super) struct Destinations {
    pub(super) peers: HashMap<IpAddr, Arc<Peer>>,
    pub(super) conflicts: HashSet<IpAddr>,
    pub(super) pending: HashSet<IpAddr>,
    pub(super) services: HashMap<(IpAddr, u16), Arc<ServicePort>>,
}

pub(super) fn destinations(
    config: &Config,
    workloads: &HashMap<WorkloadKey, Arc<LocalWorkload>>,
    announced: &HashSet<WorkloadKey>,
    previous: Option<&Snapshot>,
) -> Destinations {
    let conflicts = conflicts(config);
    let announced = || workloads.values().filter(|local| announced.contains(&local.workload.key));
    let (known, unknown): (Vec<_>, Vec<_>) =
        announced().map(|local| (local, as_peer(local, previous))).partition(|(_, peer)| peer.is_some());
    let pending = unknown.iter().flat_map(|(local, _)| local.workload.ips.iter().copied());
    let pending = pending.filter(|ip| !conflicts.contains(ip)).collect();
    let known = known.into_iter().filter_map(|(_, peer)| peer);
    let mut peers = HashMap::new();
    for peer in config.peers.iter().cloned().chain(known).map(Arc::new) {
        for ip in peer.ips.iter().filter(|ip| !conflicts.contains(ip)) {
            peers.insert(*ip, peer.clone());
        }
    }
    let mut services = HashMap::new();
    for service in &config.services {
        for (port, target) in &service.ports {
            let endpoints = service.endpoints.iter().map(|ip| SocketAddr::new(*ip, *target)).collect();
            let entry = Arc::new(ServicePort { key: service.key.clone(), endpoints });
            for vip in service.vips.iter().filter(|vip| !conflicts.contains(vip)) {
                services.insert((*vip, *port), entry.clone());
            }
        }
    }
    Destinations { peers, conflicts, pending, services }
}

/// Addresses of two pods, of a pod and a service, or of two services with the same port. A pod claims its addresses
/// whether it is announced or not.
fn conflicts(config: &Config) -> HashSet<IpAddr> {
    let workloads = config.workloads.iter().map(|workload| &workload.ips);
    let peers = config.peers.iter().map(|peer| &peer.ips);
    let mut pods = HashSet::new();
    let mut conflicts = HashSet::new();
    for ips in workloads.chain(peers) {
        // A claimant that repeats an address does not conflict with itself.
        for ip in ips.iter().collect::<HashSet<_>>() {
            if !pods.insert(*ip) {
                conflicts.insert(*ip);
            }
        }
    }
    let mut vip_ports = HashSet::new();
    for service in &config.services {
        for vip in service.vips.iter().collect::<HashSet<_>>() {
            let taken = service.ports.keys().filter(|port| !vip_ports.insert((*vip, **port))).count() > 0;
            if taken || pods.contains(vip) {
                conflicts.insert(*vip);
            }
        }
    }
    conflicts
}

/// What a workload of this node is to the others, where it is announced.
fn as_peer(local: &LocalWorkload, previous: Option<&Snapshot>) -> Option<Peer> {
    let ports = local.listener.ports.iter().map(|(port, rule)| (*port, rule.mode)).collect();
    let workload = &local.workload;
    Some(Peer {
        key: workload.key.clone(),
        ips: workload.ips.clone(),
        spiffe_id: announced_id(local, previous)?,
        mode: local.listener.default.mode,
        ports,
    })
}

/// The ID that callers must find, as far as it is known: also of a workload that has no SVID yet or whose SVID was withdrawn.
/// Such calls fail at the other end, or wait here where no ID is known; they never go out in plaintext.
fn announced_id(local: &LocalWorkload, previous: Option<&Snapshot>) -> Option<SpiffeId> {
    let workload = &local.workload;
    match &local.identity {
        IdentityState::Ready(tls) => Some(tls.identity().svid.id.clone()),
        IdentityState::Pending | IdentityState::Withdrawn => {
            let before = previous.and_then(|snapshot| {
                workload.ips.iter().filter_map(|ip| snapshot.peers.get(ip)).find(|peer| peer.key == workload.key)
            });
            before.map(|peer| peer.spiffe_id.clone()).or_else(|| workload.spiffe_id.clone())
        }
    }
}
