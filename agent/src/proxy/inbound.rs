//! A connection from the network to the pod's application: identify, TLS where it is spoken, policy, dial the application.

use sealane_common::reason::Reason;
use tokio::time::Instant;

use super::accept::Accepted;
use super::error::{self, Failure};
use super::handshake::{self, Bounds};
use super::recheck::{self, Facts, Grounds, Trust, View};
use super::sniff::{self, Opening};
use super::stream::{Peer, Replay};
use super::{Established, Pod, dial, identify};
use crate::identity::SpiffeId;
use crate::metrics::{Carried, ConnRecord};
use crate::policy::{self, InboundFacts, InboundPermit, MtlsFacts};
use crate::workload::Mode;

/// From the accepted socket to two ends between which bytes may pass.
pub(super) async fn establish(
    pod: &Pod,
    conn: Accepted,
    view: &mut View,
    record: &mut ConnRecord,
) -> Result<Established, Failure> {
    identify::guard_inbound(&pod.net, &conn)?;
    let Accepted { stream, client, destination } = conn;
    let port = destination.port();
    let snapshot = view.now();
    let timeouts = snapshot.timeouts;
    let mode = identify::workload(&snapshot, pod.net.key())?.listener.rule(port).mode;
    drop(snapshot);

    let mut opening = match mode {
        Mode::Strict => Opening::Tls(stream.into()),
        Mode::Permissive => sniff::first(stream, timeouts.peek, timeouts.handshake).await.map_err(error::peer)?,
        // Not captured any more: what still arrives is the application's as it is.
        Mode::Disabled => Opening::Plaintext(stream.into()),
    };
    let mut dialled = None;
    if let Opening::Silent(stream) = opening {
        let permit = permit(pod, view, port, None)?;
        let app = dial::app(pod, &permit, destination, client, timeouts.connect, record).await?;
        // Both ends may stay silent for long, and policy may change meanwhile.
        let mut grounds = grounds(pod, port, None, None);
        opening = tokio::select! {
            biased;
            reason = recheck::until_broken(view, &mut grounds, Instant::now()) => return Err(reason.into()),
            opening = sniff::late(stream, &app, timeouts.handshake) => opening.map_err(error::peer)?,
        };
        dialled = Some(app);
    }

    let (peer, carried, mtls, trust) = match opening {
        Opening::Tls(stream) => {
            let (peer, mtls, trust) = terminate(pod, stream, port, view, record).await?;
            (peer, Carried::Mtls, Some(mtls), Some(trust))
        }
        Opening::Plaintext(stream) => (Peer::Plain(stream), Carried::Plaintext, None, None),
        Opening::Silent(stream) => (Peer::Plain(stream.into()), Carried::Plaintext, None, None),
    };
    let permit = permit(pod, view, port, mtls.as_ref().map(|mtls| &mtls.peer))?;
    let app = match dialled {
        Some(app) => app,
        None => dial::app(pod, &permit, destination, client, timeouts.connect, record).await?,
    };
    Ok(Established { app, peer, carried, grounds: grounds(pod, port, mtls, trust) })
}

/// The TLS handshake, with the identity and the rule of the moment it begins.
async fn terminate(
    pod: &Pod,
    stream: Replay,
    port: u16,
    view: &mut View,
    record: &mut ConnRecord,
) -> Result<(Peer, MtlsFacts, Trust), Failure> {
    let (tls, config) = identify::when_ready(view, pod.net.key(), |_, to| {
        let tls = identify::identity(to)?;
        let config = to.listener.rule(port).tls.clone().ok_or(Reason::IdentityPending)?;
        Ok((tls, config))
    })
    .await?;
    let own = tls.identity().svid.id.clone();
    record.local_id = Some(own.clone());
    let bounds = Bounds::of(&view.now());
    let (peer, verified) = handshake::server(pod, config, stream, bounds, record).await?;
    let mtls = MtlsFacts { own, peer: verified.id.clone() };
    Ok((peer, mtls, Trust::new(verified, &tls)))
}

fn grounds(pod: &Pod, port: u16, mtls: Option<MtlsFacts>, trust: Option<Trust>) -> Grounds {
    Grounds { workload: pod.net.key().clone(), facts: Facts::Inbound(InboundFacts { port, mtls }), trust }
}

fn permit(pod: &Pod, view: &mut View, port: u16, peer: Option<&SpiffeId>) -> Result<InboundPermit, Reason> {
    let snapshot = view.now();
    policy::inbound(&snapshot, identify::workload(&snapshot, pod.net.key())?, port, peer)
}
