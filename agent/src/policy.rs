//! Who may call whom, and how: pure functions of a snapshot. Dialling takes the permit that they give, and nothing else
//! makes one.

#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use sealane_common::reason::Reason;

use crate::identity::SpiffeId;
use crate::snapshot::{LocalWorkload, Snapshot};
use crate::workload::{Mode, Peer, WorkloadKey};

/// Leave to dial, for one captured outbound connection.
#[derive(Clone, Debug)]
pub struct OutboundPermit {
    candidates: Vec<Candidate>,
    /// How many of the candidates, from the first, are of the destination's address family.
    same_family: usize,
}

/// One endpoint that may be dialled.
#[derive(Clone, Debug)]
pub struct Candidate {
    addr: SocketAddr,
    how: How,
}

impl Candidate {
    /// The endpoint, IPv4 as IPv4.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// How it is spoken to.
    pub fn how(&self) -> &How {
        &self.how
    }
}

/// How an endpoint is spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// mTLS, and the server must present one of these IDs.
    Mtls {
        /// Never empty.
        expected: Arc<[SpiffeId]>,
    },
    /// In plaintext: the endpoint is not enrolled, or its port is DISABLED.
    Plaintext,
    /// In plaintext inside the pod: the endpoint is the caller itself. To be dialled only where the address really is
    /// configured in the pod.
    Hairpin,
}

impl OutboundPermit {
    /// In dial order: the destination's address family first. A failed TCP dial tries the next; a failed handshake never
    /// does.
    pub fn candidates(&self) -> &[Candidate] {
        &self.candidates
    }

    /// The same candidates, each family's turned by `turn` places, so that a service's connections spread over its
    /// endpoints: pass a random or a running number.
    #[must_use]
    pub fn spread(mut self, turn: usize) -> Self {
        let (same, other) = self.candidates.split_at_mut(self.same_family);
        for group in [same, other] {
            if !group.is_empty() {
                group.rotate_left(turn % group.len());
            }
        }
        self
    }
}

/// Leave to hand an inbound connection to the application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboundPermit {
    port: u16,
    peer: Option<SpiffeId>,
}

impl InboundPermit {
    /// The application's port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Who calls; `None` for plaintext.
    pub fn peer(&self) -> Option<&SpiffeId> {
        self.peer.as_ref()
    }
}

/// Where a captured connection of `from` to `dst` may be dialled.
///
/// # Errors
/// `UnknownWorkload`, `PeerConflict`, `NoEndpoint`, `UnknownDestination`.
pub fn outbound(snap: &Snapshot, from: &LocalWorkload, dst: SocketAddr) -> Result<OutboundPermit, Reason> {
    let from = snap.workloads.get(&from.workload.key).ok_or(Reason::UnknownWorkload)?;
    // The listener is dual-stack: it shows IPv4 destinations as mapped ones.
    let dst = SocketAddr::new(dst.ip().to_canonical(), dst.port());
    if snap.conflicts.contains(&dst.ip()) {
        return Err(Reason::PeerConflict);
    }
    if snap.pending.contains(&dst.ip()) && !is_own(from, dst.ip()) {
        return Err(Reason::IdentityPending);
    }
    if let Some(service) = snap.services.get(&(dst.ip(), dst.port())) {
        return endpoints(snap, from, dst.ip(), &service.endpoints);
    }
    if snap.peers.contains_key(&dst.ip()) || is_own(from, dst.ip()) {
        return Ok(OutboundPermit { candidates: vec![candidate(snap, from, dst)], same_family: 1 });
    }
    Err(Reason::UnknownDestination)
}

/// Whether `peer` may call `port` of `to`; `None` is plaintext.
///
/// # Errors
/// `UnknownWorkload`, `NotTls` for plaintext under STRICT, `NotAllowed`.
pub fn inbound(
    snap: &Snapshot,
    to: &LocalWorkload,
    port: u16,
    peer: Option<&SpiffeId>,
) -> Result<InboundPermit, Reason> {
    let to = snap.workloads.get(&to.workload.key).ok_or(Reason::UnknownWorkload)?;
    let rule = to.listener.rule(port);
    match (peer, rule.mode) {
        (None, Mode::Strict) => Err(Reason::NotTls),
        // DISABLED is not captured; what was, just before it became so, is the application's.
        (None, Mode::Permissive | Mode::Disabled) => Ok(InboundPermit { port, peer: None }),
        (Some(id), _) if rule.allow.permits(id) => Ok(InboundPermit { port, peer: Some(id.clone()) }),
        (Some(_), _) => Err(Reason::NotAllowed),
    }
}

/// What an open outbound connection rests on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutboundFacts {
    /// The endpoint that was dialled.
    pub addr: SocketAddr,
    /// Both IDs, where it speaks mTLS.
    pub mtls: Option<MtlsFacts>,
}

/// What an open inbound connection rests on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboundFacts {
    /// The application's port.
    pub port: u16,
    /// Both IDs, where it speaks mTLS.
    pub mtls: Option<MtlsFacts>,
}

/// The IDs that an open mTLS connection was made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MtlsFacts {
    /// The local workload's.
    pub own: SpiffeId,
    /// The peer's.
    pub peer: SpiffeId,
}

/// Whether an open outbound connection of `from` still holds at `now`. Whether its peer's chain is still trusted is
/// [`crate::tls`]'s to say.
///
/// A peer that left the mesh, or that is not known any more, ends nothing; another ID at its address does. A plaintext
/// connection goes on when its endpoint is enrolled later.
///
/// # Errors
/// `UnknownWorkload`, `SvidExpired`, `IdentityChanged`, `PolicyChanged`.
pub fn outbound_still_holds(
    snap: &Snapshot,
    from: &WorkloadKey,
    facts: &OutboundFacts,
    now: SystemTime,
) -> Result<(), Reason> {
    let from = snap.workloads.get(from).ok_or(Reason::UnknownWorkload)?;
    let Some(mtls) = &facts.mtls else { return Ok(()) };
    still_own(from, &mtls.own, now)?;
    peer_still_expected(snap, facts.addr, &mtls.peer)
}

/// Whether the endpoint at `addr`, which proved to be `peer`, is still the one expected there, as far as it is known.
///
/// # Errors
/// `PolicyChanged`.
pub fn peer_still_expected(snap: &Snapshot, addr: SocketAddr, peer: &SpiffeId) -> Result<(), Reason> {
    match snap.peers.get(&addr.ip().to_canonical()) {
        Some(known) if known.spiffe_id != *peer => Err(Reason::PolicyChanged),
        Some(_) | None => Ok(()),
    }
}

/// Whether an open inbound connection to `to` still holds at `now`. Whether its peer's chain is still trusted is
/// [`crate::tls`]'s to say.
///
/// # Errors
/// `UnknownWorkload`, `SvidExpired`, `IdentityChanged`, `PolicyChanged`.
pub fn inbound_still_holds(
    snap: &Snapshot,
    to: &WorkloadKey,
    facts: &InboundFacts,
    now: SystemTime,
) -> Result<(), Reason> {
    let to = snap.workloads.get(to).ok_or(Reason::UnknownWorkload)?;
    if let Some(mtls) = &facts.mtls {
        still_own(to, &mtls.own, now)?;
    }
    let peer = facts.mtls.as_ref().map(|mtls| &mtls.peer);
    inbound(snap, to, facts.port, peer).map(drop).map_err(|_| Reason::PolicyChanged)
}

fn endpoints(
    snap: &Snapshot,
    from: &LocalWorkload,
    vip: IpAddr,
    endpoints: &[SocketAddr],
) -> Result<OutboundPermit, Reason> {
    if endpoints.is_empty() {
        return Err(Reason::NoEndpoint);
    }
    // One endpoint that is claimed twice, or has no known ID yet, must not take the service down.
    let pending = |ip| snap.pending.contains(&ip) && !is_own(from, ip);
    let certain = endpoints.iter().filter(|e| !snap.conflicts.contains(&e.ip()) && !pending(e.ip()));
    let (mut candidates, other): (Vec<_>, Vec<_>) = certain
        .map(|endpoint| candidate(snap, from, *endpoint))
        .partition(|candidate| candidate.addr.is_ipv4() == vip.is_ipv4());
    let same_family = candidates.len();
    candidates.extend(other);
    if candidates.is_empty() {
        let waits = endpoints.iter().any(|endpoint| pending(endpoint.ip()));
        return Err(if waits { Reason::IdentityPending } else { Reason::PeerConflict });
    }
    Ok(OutboundPermit { candidates, same_family })
}

fn candidate(snap: &Snapshot, from: &LocalWorkload, addr: SocketAddr) -> Candidate {
    let peer = snap.peers.get(&addr.ip()).cloned();
    let mode = |peer: &Peer| peer.ports.get(&addr.port()).copied().unwrap_or(peer.mode);
    let how = match &peer {
        _ if is_own(from, addr.ip()) => How::Hairpin,
        Some(peer) if mode(peer) != Mode::Disabled => How::Mtls { expected: [peer.spiffe_id.clone()].into() },
        Some(_) | None => How::Plaintext,
    };
    Candidate { addr, how }
}

fn is_own(from: &LocalWorkload, ip: IpAddr) -> bool {
    from.workload.ips.contains(&ip)
}

fn still_own(local: &LocalWorkload, used: &SpiffeId, now: SystemTime) -> Result<(), Reason> {
    let changed = |reason| if reason == Reason::SvidExpired { reason } else { Reason::IdentityChanged };
    let tls = local.identity.usable(now).map_err(changed)?;
    if tls.identity().svid.id == *used { Ok(()) } else { Err(Reason::IdentityChanged) }
}
