//! The record of one connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use sealane_common::reason::Reason;

use super::{Bytes, Carried, Direction, Ended, Metrics, Name, Opened, Outcome, Side, Where};
use crate::identity::SpiffeId;
use crate::proxy::Failure;
use crate::workload::WorkloadKey;

/// One connection, from its acceptance to the one metric and the one log line of its end. Dropped without
/// [`Self::finish`], it ends as [`Reason::Aborted`].
pub struct ConnRecord {
    metrics: Arc<Metrics>,
    direction: Direction,
    workload: WorkloadKey,
    client: SocketAddr,
    destination: SocketAddr,
    accepted: Instant,
    /// With the gauge of open connections, which may be forgotten (the pod has left) before the connection ends.
    carried: Option<(Carried, Gauge)>,
    finished: bool,
    /// Where it was dialled to: the peer for an outbound connection, the application for an inbound one.
    pub endpoint: Option<SocketAddr>,
    /// The pod's own ID, where TLS was spoken.
    pub local_id: Option<SpiffeId>,
    /// The ID that the peer proved.
    pub peer_id: Option<SpiffeId>,
    /// What the handshake agreed on.
    pub tls: Option<TlsFacts>,
    /// Bytes so far.
    pub traffic: Traffic,
}

/// What a handshake agreed on.
#[derive(Clone, Copy, Debug)]
pub struct TlsFacts {
    /// The protocol version.
    pub version: rustls::ProtocolVersion,
    /// The key exchange group.
    pub group: rustls::NamedGroup,
}

/// Application bytes of one connection, live, and added to the workload's total as they pass.
pub struct Traffic {
    from_app: (AtomicU64, Counter),
    from_peer: (AtomicU64, Counter),
}

impl Traffic {
    /// These many bytes were read from `side` and handed to the other one.
    pub fn add(&self, side: Side, bytes: usize) {
        let (own, total) = self.of(side);
        let bytes = bytes as u64;
        own.fetch_add(bytes, Ordering::Relaxed);
        total.inc_by(bytes);
    }

    /// Bytes read from `side` and handed to the other one so far.
    pub fn bytes(&self, side: Side) -> u64 {
        self.of(side).0.load(Ordering::Relaxed)
    }

    pub(super) fn new(app: Counter, peer: Counter) -> Self {
        Self { from_app: (AtomicU64::new(0), app), from_peer: (AtomicU64::new(0), peer) }
    }

    fn of(&self, side: Side) -> &(AtomicU64, Counter) {
        match side {
            Side::App => &self.from_app,
            Side::Peer => &self.from_peer,
        }
    }

    /// Counts for nobody but the test.
    #[cfg(test)]
    pub fn for_test() -> Self {
        Self::new(Counter::default(), Counter::default())
    }
}

impl ConnRecord {
    /// A connection that was accepted from `client` to `destination`, as the sockets show them.
    pub fn accepted(
        metrics: Arc<Metrics>,
        direction: Direction,
        workload: WorkloadKey,
        client: SocketAddr,
        destination: SocketAddr,
    ) -> Self {
        let total =
            |side| metrics.bytes.get_or_create_owned(&Bytes { direction, workload: Name(workload.clone()), side });
        let traffic = Traffic::new(total(Side::App), total(Side::Peer));
        Self {
            metrics,
            direction,
            workload,
            client,
            destination,
            accepted: Instant::now(),
            carried: None,
            finished: false,
            endpoint: None,
            local_id: None,
            peer_id: None,
            tls: None,
            traffic,
        }
    }

    /// Both ends stand and bytes begin to pass.
    pub fn opened(&mut self, mode: Carried) {
        let workload = Name(self.workload.clone());
        let open =
            self.metrics.open.get_or_create_owned(&Where { direction: self.direction, workload: workload.clone() });
        open.inc();
        self.carried = Some((mode, open));
        self.metrics.opened.get_or_create(&Opened { direction: self.direction, workload, mode }).inc();
        if mode == Carried::Plaintext {
            let port = match self.direction {
                Direction::Inbound => self.destination.port(),
                Direction::Outbound => self.endpoint.unwrap_or(self.destination).port(),
            };
            self.metrics.count_plaintext(self.direction, &self.workload, port);
        }
    }

    /// How it ended: in order, or why not.
    pub fn finish(mut self, result: Result<(), Failure>) {
        self.end(result);
    }

    fn end(&mut self, result: Result<(), Failure>) {
        self.finished = true;
        let failure = result.err();
        let reason = Outcome(failure.as_ref().map(|failure| failure.reason));
        let ended = Ended { direction: self.direction, workload: Name(self.workload.clone()), reason };
        if let Some((_, open)) = &self.carried {
            open.dec();
            self.metrics.closed.get_or_create(&ended).inc();
        } else {
            self.metrics.refused.get_or_create(&ended).inc();
        }
        // What the peer sent may be in the error's text: `?` escapes it.
        let error = failure.as_ref().and_then(|failure| failure.source.as_ref()).map(ToString::to_string);
        tracing::info!(
            target: "access",
            direction = self.direction.label(),
            workload = %self.workload,
            client = %self.client,
            destination = %self.destination,
            endpoint = self.endpoint.map(tracing::field::display),
            mode = self.carried.as_ref().map(|(mode, _)| mode.label()),
            local_id = self.local_id.as_ref().map(SpiffeId::as_str),
            peer_id = self.peer_id.as_ref().map(SpiffeId::as_str),
            tls = self.tls.map(|tls| tracing::field::debug(tls.version)),
            group = self.tls.map(|tls| tracing::field::debug(tls.group)),
            bytes_from_app = self.traffic.bytes(Side::App),
            bytes_from_peer = self.traffic.bytes(Side::Peer),
            duration_ms = u64::try_from(self.accepted.elapsed().as_millis()).unwrap_or(u64::MAX),
            outcome = reason.label(),
            alert = failure.as_ref().and_then(|failure| failure.alert),
            error = error.as_ref().map(tracing::field::debug),
            "{}",
            reason.0.map_or("both directions ended in order", Reason::words),
        );
    }
}

impl Drop for ConnRecord {
    fn drop(&mut self) {
        if !self.finished {
            self.end(Err(Reason::Aborted.into()));
        }
    }
}
