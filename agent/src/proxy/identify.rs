//! Who calls whom: the addresses must be what the capture layer promises, and the pod must be one of the snapshot's.

use std::sync::Arc;
use std::time::SystemTime;

use sealane_common::reason::Reason;
use tokio::time::{Instant, timeout_at};

use super::accept::Accepted;
use super::recheck::View;
use crate::podnet::PodNet;
use crate::snapshot::{LocalWorkload, Snapshot};
use crate::tls::WorkloadTls;
use crate::workload::WorkloadKey;

/// What reaches the outbound listener comes from the pod and does not go to it: the kernel passes a pod's connections to
/// itself. A wrong row there would give a stranger the pod's identity, or lead the agent into itself without end.
pub(super) fn guard_outbound(net: &PodNet, conn: &Accepted) -> Result<(), Reason> {
    let to = conn.destination.ip();
    if !net.is_own(conn.client.ip()) {
        return Err(Reason::ForeignSource);
    }
    if net.is_own(to) || (to.is_loopback() && net.is_agent_port(conn.destination.port())) {
        return Err(Reason::LoopDetected);
    }
    Ok(())
}

/// What reaches the inbound listener goes to an address of the pod's and does not come from one: the agent's own dials
/// do, and the kernel passes them to the application.
pub(super) fn guard_inbound(net: &PodNet, conn: &Accepted) -> Result<(), Reason> {
    if !net.is_own(conn.destination.ip()) {
        return Err(Reason::UnknownLocal);
    }
    if net.is_own(conn.client.ip()) || net.is_agent_port(conn.destination.port()) {
        return Err(Reason::LoopDetected);
    }
    Ok(())
}

/// The listener's own pod, as this snapshot shows it.
pub(super) fn workload<'a>(snapshot: &'a Snapshot, key: &WorkloadKey) -> Result<&'a Arc<LocalWorkload>, Reason> {
    snapshot.workloads.get(key).ok_or(Reason::UnknownWorkload)
}

/// The pod's usable identity.
pub(super) fn identity(workload: &LocalWorkload) -> Result<Arc<WorkloadTls>, Reason> {
    workload.identity.usable(SystemTime::now()).cloned()
}

/// Decides on the current snapshot, and again on each new one for as long as the answer is [`Reason::IdentityPending`], up to
/// the time limit `svid_wait`: a pod's first connections may come before its SVID.
pub(super) async fn when_ready<T>(
    view: &mut View,
    key: &WorkloadKey,
    decide: impl Fn(&Snapshot, &LocalWorkload) -> Result<T, Reason>,
) -> Result<T, Reason> {
    let deadline = Instant::now() + view.now().timeouts.svid_wait;
    loop {
        let snapshot = view.now();
        let decision = decide(&snapshot, workload(&snapshot, key)?);
        drop(snapshot);
        let pending = matches!(decision, Err(Reason::IdentityPending));
        if !pending || timeout_at(deadline, view.changed()).await.is_err() {
            return decision;
        }
    }
}
