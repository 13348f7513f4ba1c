//! /state: what the agent knows, as JSON. Identities appear by ID and dates, never by key.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::snapshot::{IdentityState, LocalWorkload, PortRule, Snapshot};
use crate::workload::{Allow, Mode};

/// The snapshot, with the pods' enrolment as control sees it.
pub(super) fn json(snapshot: &Snapshot, pods: Value) -> Value {
    let workloads: BTreeMap<_, _> =
        snapshot.workloads.iter().map(|(key, workload)| (key.to_string(), of_workload(workload))).collect();
    let peers: BTreeMap<_, _> = snapshot
        .peers
        .iter()
        .map(|(ip, peer)| {
            let ports: BTreeMap<_, _> =
                peer.ports.iter().map(|(port, mode)| (port.to_string(), label(*mode))).collect();
            let value = json!({
                "name": peer.key.to_string(),
                "spiffeId": peer.spiffe_id.as_str(),
                "mode": label(peer.mode),
                "ports": ports,
            });
            (ip.to_string(), value)
        })
        .collect();
    let services: BTreeMap<_, _> = snapshot
        .services
        .iter()
        .map(|((vip, port), service)| {
            let value = json!({ "name": service.key.to_string(), "endpoints": service.endpoints });
            (std::net::SocketAddr::new(*vip, *port).to_string(), value)
        })
        .collect();
    let mut conflicts: Vec<_> = snapshot.conflicts.iter().collect();
    conflicts.sort();
    json!({
        "epoch": snapshot.epoch,
        "trustDomain": snapshot.trust_domain.as_str(),
        "workloads": workloads,
        "peers": peers,
        "services": services,
        "conflicts": conflicts,
        "pods": pods,
    })
}

fn of_workload(workload: &LocalWorkload) -> Value {
    let identity = match &workload.identity {
        IdentityState::Pending => json!({ "state": "pending" }),
        IdentityState::Withdrawn => json!({ "state": "withdrawn" }),
        IdentityState::Ready(tls) => {
            let identity = tls.identity();
            let expired = identity.svid.not_after <= SystemTime::now();
            json!({
                "state": if expired { "expired" } else { "ready" },
                "spiffeId": identity.svid.id.as_str(),
                "notBefore": seconds(identity.svid.not_before),
                "notAfter": seconds(identity.svid.not_after),
                "trusts": identity.bundles.keys().map(|domain| domain.as_str()).collect::<Vec<_>>(),
            })
        }
    };
    let listener = &workload.listener;
    let ports: BTreeMap<_, _> = listener.ports.iter().map(|(port, rule)| (port.to_string(), of_rule(rule))).collect();
    json!({
        "ips": workload.workload.ips,
        "serviceAccount": workload.workload.service_account,
        "identity": identity,
        "listener": { "default": of_rule(&listener.default), "ports": ports },
    })
}

fn of_rule(rule: &PortRule) -> Value {
    let allow = match &rule.allow {
        Allow::TrustDomain(domain) => json!({ "trustDomain": domain.as_str() }),
        Allow::Ids(ids) => json!({ "ids": ids.iter().map(|id| id.as_str()).collect::<Vec<_>>() }),
    };
    json!({ "mode": label(rule.mode), "allow": allow })
}

/// App Mesh's words.
fn label(mode: Mode) -> &'static str {
    match mode {
        Mode::Strict => "STRICT",
        Mode::Permissive => "PERMISSIVE",
        Mode::Disabled => "DISABLED",
    }
}

/// Since 1970.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
