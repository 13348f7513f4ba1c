//! A connection of the pod's application to the mesh: identify, policy, dial, TLS.

use sealane_common::reason::Reason;

use super::accept::Accepted;
use super::error::Failure;
use super::handshake::{self, Bounds};
use super::recheck::{Facts, Grounds, Trust, View};
use super::stream::{Peer, Replay};
use super::{Established, Pod, dial, identify};
use crate::metrics::{Carried, ConnRecord};
use crate::policy::{self, Candidate, How, MtlsFacts, OutboundFacts, OutboundPermit};

/// From the accepted socket to two ends between which bytes may pass.
pub(super) async fn establish(
    pod: &Pod,
    app: Accepted,
    view: &mut View,
    record: &mut ConnRecord,
) -> Result<Established, Failure> {
    identify::guard_outbound(&pod.net, &app)?;
    let (permit, tls) = identify::when_ready(view, pod.net.key(), |snapshot, from| {
        let permit = policy::outbound(snapshot, from, app.destination)?;
        let tls = if needs_identity(&permit) { Some(identify::identity(from)?) } else { None };
        Ok((permit, tls))
    })
    .await?;
    let permit = permit.spread(pod.turn());
    let bounds = Bounds::of(&view.now());
    let dial = dial::peer(pod, &permit, view.now().timeouts.connect, record);
    let ((stream, candidate), turn) = match tls {
        Some(tls) => {
            let (dialled, place) = handshake::in_turn(pod, bounds, dial).await?;
            (dialled, Some((tls, place)))
        }
        None => (dial.await?, None),
    };
    let (peer, carried, mtls, trust) = match (candidate.how(), turn) {
        (How::Mtls { expected }, Some((tls, place))) => {
            let own = tls.identity().svid.id.clone();
            record.local_id = Some(own.clone());
            let config = tls.client(expected.clone());
            let (stream, endpoint) = (Replay::from(stream), candidate.addr().ip());
            let (peer, verified) = handshake::client(pod, config, stream, endpoint, place, bounds, record).await?;
            let mtls = MtlsFacts { own, peer: verified.id.clone() };
            (peer, Carried::Mtls, Some(mtls), Some(Trust::new(verified, &tls)))
        }
        (How::Mtls { .. }, None) => return Err(Reason::IdentityPending.into()),
        (How::Plaintext, _) => (Peer::Plain(stream.into()), Carried::Plaintext, None, None),
        (How::Hairpin, _) => (Peer::Plain(stream.into()), Carried::Hairpin, None, None),
    };
    let facts = Facts::Outbound(OutboundFacts { addr: candidate.addr(), mtls });
    let grounds = Grounds { workload: pod.net.key().clone(), facts, trust };
    Ok(Established { app: app.stream, peer, carried, grounds })
}

fn needs_identity(permit: &OutboundPermit) -> bool {
    permit.candidates().iter().any(|candidate: &Candidate| matches!(candidate.how(), How::Mtls { .. }))
}
