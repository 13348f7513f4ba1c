//! The data path: accept, identify, policy, TLS, copy, metrics.
//!
//! [`serve_pod`] starts two accept loops for one pod. Every connection is a task of its own: `outbound` and `inbound`
//! bring it from an accepted socket to two ends between which bytes may pass, `copy` moves them, and `recheck`
//! watches that what it rests on still holds. Whatever ends it before its time resets both ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sealane_common::reason::Reason;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use self::accept::{Accepted, Slots};
pub use self::error::Failure;
use self::recheck::{Grounds, View};
use self::stream::Peer;
use crate::drain;
use crate::metrics::{Carried, ConnRecord, Direction, Metrics};
use crate::podnet::PodNet;
use crate::snapshot::Reader;

mod accept;
mod copy;
mod dial;
mod error;
mod handshake;
mod identify;
mod inbound;
mod outbound;
mod recheck;
mod sniff;
mod stream;

/// What every connection of the agent shares.
pub struct Ctx {
    /// Where connections read their snapshots.
    pub snapshots: Reader,
    /// Where they are counted.
    pub metrics: Arc<Metrics>,
}

/// One pod's network namespace and the two listeners in it.
pub struct PodListeners {
    /// The namespace.
    pub net: PodNet,
    /// Takes what the network sends to the application.
    pub inbound: TcpListener,
    /// Takes what the application sends to the mesh.
    pub outbound: TcpListener,
}

/// A pod that is being served; dropped, it closes everything.
pub struct Serving {
    trigger: drain::Trigger,
    connections: [Slots; 2],
    metrics: Arc<Metrics>,
}

/// Serves a pod on the current runtime until the handle says otherwise.
pub fn serve_pod(ctx: Arc<Ctx>, pod: PodListeners) -> Serving {
    let (trigger, watcher) = drain::channel();
    let metrics = ctx.metrics.clone();
    let PodListeners { net, inbound, outbound } = pod;
    let pod = Arc::new(Pod::new(ctx, net));
    let connections = [pod.inbound.connections.clone(), pod.outbound.connections.clone()];
    let serving = Serving { trigger, connections, metrics };
    serving.metrics.pods_enrolled.inc();
    tokio::spawn(accept::run(pod.clone(), inbound, Direction::Inbound, watcher.clone()));
    tokio::spawn(accept::run(pod, outbound, Direction::Outbound, watcher));
    serving
}

impl Serving {
    /// Closes both listeners; open connections go on.
    pub fn stop_accepting(&self) {
        self.trigger.stop_accepting();
    }

    /// Closes both listeners and resets what is open, for this reason.
    pub fn close(&self, reason: Reason) {
        self.trigger.close(reason);
    }

    /// Connections that are open now, those being set up included.
    pub fn open(&self) -> usize {
        self.connections.iter().map(Slots::held).sum()
    }

    /// Returns when both listeners are closed and every connection has ended; to be called with a bound.
    pub async fn drained(&self) {
        self.trigger.drained().await;
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.metrics.pods_enrolled.dec();
    }
}

/// One pod, as its connections see it.
struct Pod {
    ctx: Arc<Ctx>,
    net: PodNet,
    /// Apart, so that strangers who fill the first cannot keep the pod from calling others.
    inbound: Places,
    outbound: Places,
    dials: AtomicUsize,
}

/// What is limited, in one direction.
#[derive(Clone, Default)]
struct Places {
    connections: Slots,
    handshakes: Slots,
}

/// Two ends between which bytes may pass, and what that rests on.
struct Established {
    app: TcpStream,
    peer: Peer,
    carried: Carried,
    grounds: Grounds,
}

async fn serve(pod: &Pod, conn: Accepted, direction: Direction, record: &mut ConnRecord) -> Result<(), Failure> {
    let mut view = View::subscribe(&pod.ctx.snapshots);
    // Boxed, so that the many kilobytes of dialling and handshake are freed before the long life of the connection.
    let established = match direction {
        Direction::Inbound => Box::pin(inbound::establish(pod, conn, &mut view, record)).await?,
        Direction::Outbound => Box::pin(outbound::establish(pod, conn, &mut view, record)).await?,
    };
    record.opened(established.carried);
    carry(established, &mut view, record).await
}

async fn carry(established: Established, view: &mut View, record: &ConnRecord) -> Result<(), Failure> {
    let Established { mut app, mut peer, mut grounds, .. } = established;
    tokio::select! {
        biased;
        reason = recheck::until_broken(view, &mut grounds, Instant::now()) => return Err(reason.into()),
        copied = copy::duplex(&mut app, &mut peer, &record.traffic) => copied?,
    }
    accept::end_in_order(&app);
    accept::end_in_order(peer.tcp());
    Ok(())
}

impl Pod {
    fn new(ctx: Arc<Ctx>, net: PodNet) -> Self {
        Self { ctx, net, inbound: Places::default(), outbound: Places::default(), dials: AtomicUsize::new(0) }
    }

    fn places(&self, direction: Direction) -> &Places {
        match direction {
            Direction::Inbound => &self.inbound,
            Direction::Outbound => &self.outbound,
        }
    }

    /// A running number, by which a service's connections spread over its endpoints.
    fn turn(&self) -> usize {
        self.dials.fetch_add(1, Ordering::Relaxed)
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
