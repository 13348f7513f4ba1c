//! TLS handshakes, with their bounds: how many at once, how long, and that a refused peer learns why.

use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::server::Acceptor;
use sealane_common::reason::Reason;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, TlsStream};

use super::Pod;
use super::accept::{Slot, Slots};
use super::error::{self, Failure};
use super::stream::{Peer, Replay};
use crate::metrics::{ConnRecord, TlsFacts};
use crate::snapshot::Snapshot;
use crate::tls::{self, VerifiedPeer};

/// How long a peer that we refused may take to read our alert before the socket is closed for good.
const ALERT_GRACE: Duration = Duration::from_secs(1);
/// How long a connection may wait for its turn to be dialled: thousands at once take a while, and applications wait longer.
const QUEUE: Duration = Duration::from_secs(30);
/// A dial that is not answered within this gives its place away: a peer that is gone must not hold up the calls to others.
const PROMPT: Duration = Duration::from_millis(250);

/// The server's side, towards a peer that dialled the pod.
pub(super) async fn server(
    pod: &Pod,
    config: Arc<rustls::ServerConfig>,
    stream: Replay,
    bounds: Bounds,
    record: &mut ConnRecord,
) -> Result<(Peer, VerifiedPeer), Failure> {
    let accept = async {
        if !stream.begins_as_tls().await {
            return Err(Reason::NotTls.into());
        }
        let mut hello = LazyConfigAcceptor::new(Acceptor::default(), stream);
        let start = match (&mut hello).await {
            Ok(start) => start,
            Err(error) => return Err(Broken { failure: error::handshake(error), stream: hello.take_io() }),
        };
        // Only now: peers that stay silent or dribble take no place from those that have spoken. The other half of the time is
        // the handshake's.
        let _place = place(&pod.inbound.handshakes, bounds, bounds.time / 2).await?;
        Ok(TlsStream::Server(start.into_stream(config).into_fallible().await?))
    };
    run(pod, accept, bounds, record).await
}

/// The client's side, towards an endpoint that the application dialled. No name is sent: the peer's ID is what counts.
pub(super) async fn client(
    pod: &Pod,
    config: Arc<rustls::ClientConfig>,
    stream: Replay,
    endpoint: IpAddr,
    _place: Slot,
    bounds: Bounds,
    record: &mut ConnRecord,
) -> Result<(Peer, VerifiedPeer), Failure> {
    let name = ServerName::IpAddress(endpoint.into());
    let connect =
        async { Ok(TlsStream::Client(TlsConnector::from(config).connect(name, stream).into_fallible().await?)) };
    run(pod, connect, bounds, record).await
}

/// Dials when there is a place among the pod's handshakes, and keeps it for [`client`]: a server that is dialled before its
/// client can speak loses patience.
pub(super) async fn in_turn<T>(
    pod: &Pod,
    bounds: Bounds,
    dial: impl Future<Output = Result<T, Failure>>,
) -> Result<(T, Slot), Failure> {
    let slots = &pod.outbound.handshakes;
    let mut dial = pin!(dial);
    let first = place(slots, bounds, QUEUE).await?;
    if let Ok(dialled) = timeout(PROMPT, dial.as_mut()).await {
        return Ok((dialled?, first));
    }
    drop(first);
    let dialled = dial.await?;
    Ok((dialled, place(slots, bounds, bounds.time).await?))
}

async fn place(slots: &Slots, bounds: Bounds, time: Duration) -> Result<Slot, Reason> {
    timeout(time, slots.wait(bounds.at_once)).await.map_err(|_| Reason::HandshakeLimit)
}

/// What a handshake may take.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    pub time: Duration,
    pub at_once: usize,
}

impl Bounds {
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        Self { time: snapshot.timeouts.handshake, at_once: snapshot.limits.handshakes_per_pod as usize }
    }
}

/// A handshake that failed, and the stream where the peer may be told why.
struct Broken {
    failure: Failure,
    stream: Option<Replay>,
}

impl From<Reason> for Broken {
    fn from(reason: Reason) -> Self {
        Self { failure: reason.into(), stream: None }
    }
}

impl From<(io::Error, Replay)> for Broken {
    fn from((error, stream): (io::Error, Replay)) -> Self {
        Self { failure: error::handshake(error), stream: Some(stream) }
    }
}

async fn run(
    pod: &Pod,
    handshake: impl Future<Output = Result<TlsStream<Replay>, Broken>>,
    bounds: Bounds,
    record: &mut ConnRecord,
) -> Result<(Peer, VerifiedPeer), Failure> {
    let began = Instant::now();
    let stream = match timeout(bounds.time, handshake).await.map_err(|_| Reason::HandshakeTimeout)? {
        Ok(stream) => stream,
        Err(Broken { failure, stream }) => {
            if let Some(stream) = stream.filter(|_| speaks_tls(failure.reason)) {
                let_alert_arrive(stream).await;
            }
            return Err(failure);
        }
    };
    pod.ctx.metrics.handshake_seconds.observe(began.elapsed().as_secs_f64());
    let session = stream.get_ref().1;
    record.tls = session
        .protocol_version()
        .zip(session.negotiated_key_exchange_group())
        .map(|(version, group)| TlsFacts { version, group: group.name() });
    // The verifier refuses a peer without a certificate; should it not, nothing was verified.
    let peer = tls::peer(session).ok_or(Reason::CertificateMissing)?;
    record.peer_id = Some(peer.id.clone());
    Ok((Peer::Tls(Box::new(stream)), peer))
}

/// False where an alert would only be garbage, or nobody is there to read it.
fn speaks_tls(reason: Reason) -> bool {
    reason != Reason::NotTls && reason != Reason::HandshakeClosed
}

/// A reset right behind the alert may overtake it, or find it unread: end our direction instead, and wait for the peer's.
async fn let_alert_arrive(mut stream: Replay) {
    if SockRef::from(stream.tcp()).set_linger(None).is_err() {
        return;
    }
    let end = async {
        stream.shutdown().await?;
        let mut discarded = [0; 1024];
        while stream.read(&mut discarded).await? > 0 {}
        io::Result::Ok(())
    };
    // However it ends, the refusal stands.
    let _ = timeout(ALERT_GRACE, end).await;
}
