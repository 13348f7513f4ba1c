//! What an open connection rests on, judged again whenever the snapshot changes and when the pod's SVID expires.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sealane_common::reason::Reason;
use tokio::time::{Instant, timeout};

use crate::identity::TrustDomain;
use crate::policy::{self, InboundFacts, OutboundFacts};
use crate::snapshot::{Reader, Snapshot};
use crate::svid::Bundle;
use crate::tls::{self, VerifiedPeer, WorkloadTls};
use crate::workload::WorkloadKey;

/// Expiry is a time of day, which may be set while a connection waits for it: look again at least this often.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// A connection's subscription to the snapshots, taken before its first check so that no change falls in between.
pub(super) struct View(Reader);

/// What an open connection rests on.
pub(super) struct Grounds {
    pub workload: WorkloadKey,
    pub facts: Facts,
    /// `None`: plaintext.
    pub trust: Option<Trust>,
}

/// What policy is asked again.
pub(super) enum Facts {
    Outbound(OutboundFacts),
    Inbound(InboundFacts),
}

/// The peer's chain, and the bundle that it was last found to lead to.
pub(super) struct Trust {
    peer: VerifiedPeer,
    bundle: Option<Arc<Bundle>>,
}

/// Returns when the connection must end, and why.
pub(super) async fn until_broken(view: &mut View, grounds: &mut Grounds, opened: Instant) -> Reason {
    loop {
        let mut wait = LONGEST_WAIT;
        {
            let snapshot = view.now();
            match grounds.judge(&snapshot, SystemTime::now()) {
                Ok(Some(expiry)) => wait = wait.min(expiry),
                Ok(None) => {}
                Err(reason) => return reason,
            }
            let max_age = snapshot.timeouts.max_connection_age;
            if !max_age.is_zero() {
                match max_age.checked_sub(opened.elapsed()) {
                    Some(left) if !left.is_zero() => wait = wait.min(left),
                    _ => return Reason::MaxAge,
                }
            }
        }
        // Either way: judge again.
        let _ = timeout(wait, view.changed()).await;
    }
}

impl View {
    pub(super) fn subscribe(snapshots: &Reader) -> Self {
        Self(snapshots.clone())
    }

    /// The newest snapshot; [`Self::changed`] waits for one after it.
    pub(super) fn now(&mut self) -> Arc<Snapshot> {
        self.0.borrow_and_update().clone()
    }

    pub(super) async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            // The publisher is gone and the last snapshot stays in force.
            std::future::pending().await
        }
    }
}

impl Trust {
    /// As the handshake verified it, with this identity.
    pub(super) fn new(peer: VerifiedPeer, with: &WorkloadTls) -> Self {
        let bundle = with.identity().bundles.get(peer.id.trust_domain()).cloned();
        Self { peer, bundle }
    }

    fn judge(&mut self, bundles: &BTreeMap<TrustDomain, Arc<Bundle>>) -> Result<(), Reason> {
        let today = bundles.get(self.peer.id.trust_domain());
        if today.zip(self.bundle.as_ref()).is_some_and(|(today, before)| same_roots(today, before)) {
            return Ok(());
        }
        if !tls::still_trusted(&self.peer, bundles) {
            return Err(Reason::BundleChanged);
        }
        self.bundle = today.cloned();
        Ok(())
    }
}

impl Grounds {
    /// How long the judgement holds if no snapshot comes: as long as the pod's own SVID, where it rests on one.
    ///
    /// A pod that is not in the snapshot any more is being unenrolled: its connections drain, up to a bound that the
    /// control side keeps (see [`crate::drain`]); nothing new is accepted for it.
    fn judge(&mut self, snapshot: &Snapshot, now: SystemTime) -> Result<Option<Duration>, Reason> {
        let Some(workload) = snapshot.workloads.get(&self.workload) else { return Ok(None) };
        match &self.facts {
            Facts::Outbound(facts) => policy::outbound_still_holds(snapshot, &self.workload, facts, now)?,
            Facts::Inbound(facts) => policy::inbound_still_holds(snapshot, &self.workload, facts, now)?,
        }
        let Some(trust) = &mut self.trust else { return Ok(None) };
        let identity = workload.identity.usable(now)?.identity();
        trust.judge(&identity.bundles)?;
        Ok(Some(identity.svid.not_after.duration_since(now).unwrap_or_default()))
    }
}

/// Rotation brings new values with the same content: comparing them spares verifying every connection's chain again.
fn same_roots(a: &Arc<Bundle>, b: &Arc<Bundle>) -> bool {
    Arc::ptr_eq(a, b) || a.roots == b.roots
}
