//! Accepts a pod's connections: options first, then a place under the limit, then a task of its own.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use sealane_common::reason::Reason;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::sleep;

use super::{Pod, serve};
use crate::drain::Watcher;
use crate::metrics::{ConnRecord, Direction};
use crate::podnet;

/// Where accept fails for want of descriptors or memory, the next attempt waits this long, and twice as long each time.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// Up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// An accepted connection; addresses as the sockets show them, IPv4 as IPv4.
pub(super) struct Accepted {
    pub stream: TcpStream,
    pub client: SocketAddr,
    /// What the client dialled: the socket's own address.
    pub destination: SocketAddr,
}

/// Accepts until the watcher stops, which closes the listener; what the kernel had completed by then is still served.
pub(super) async fn run(pod: Arc<Pod>, listener: TcpListener, direction: Direction, mut watcher: Watcher) {
    let mut pause = FIRST_PAUSE;
    loop {
        let accepted = tokio::select! {
            biased;
            () = watcher.stopped() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, client)) => {
                pause = FIRST_PAUSE;
                admit(&pod, stream, client, direction, &watcher);
            }
            Err(error) if concerns_one_connection(&error) => {}
            Err(error) => {
                pod.ctx.metrics.accept_errors.inc();
                if pause == FIRST_PAUSE {
                    tracing::warn!(workload = %pod.net.key(), direction = direction.label(), %error, "cannot accept");
                }
                sleep(pause).await;
                pause = LONGEST_PAUSE.min(pause * 2);
            }
        }
    }
    while let Some(Ok((stream, client))) = listener.accept().now_or_never() {
        admit(&pod, stream, client, direction, &watcher);
    }
}

/// Lets the kernel deliver what is still under way after the socket is closed.
pub(super) fn end_in_order(stream: &TcpStream) {
    // Failure leaves the reset, which is the safe end.
    let _ = SockRef::from(stream).set_linger(None);
}

/// Counts what is held at one time; limits may change while it is.
#[derive(Clone, Default)]
pub(super) struct Slots(Arc<Count>);

#[derive(Default)]
struct Count {
    held: AtomicUsize,
    freed: Notify,
}

/// One of the [`Slots`], until it is dropped.
pub(super) struct Slot(Arc<Count>);

impl Slots {
    /// `None` where `limit` are held already.
    pub(super) fn take(&self, limit: usize) -> Option<Slot> {
        let more = |held| (held < limit).then_some(held + 1);
        self.0.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Slot(self.0.clone()))
    }

    /// Waits, first come first served, until fewer than `limit` are held.
    pub(super) async fn wait(&self, limit: usize) -> Slot {
        loop {
            if let Some(slot) = self.take(limit) {
                return slot;
            }
            // A slot that was freed meanwhile has left its permit.
            self.0.freed.notified().await;
        }
    }

    pub(super) fn held(&self) -> usize {
        self.0.held.load(Ordering::Relaxed)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::Relaxed);
        self.0.freed.notify_one();
    }
}

fn admit(pod: &Arc<Pod>, stream: TcpStream, client: SocketAddr, direction: Direction, watcher: &Watcher) {
    let Ok(destination) = podnet::prepare(&SockRef::from(&stream)).and_then(|()| stream.local_addr()) else { return };
    let conn = Accepted { stream, client: unmapped(client), destination: unmapped(destination) };
    let key = pod.net.key().clone();
    let record = ConnRecord::accepted(pod.ctx.metrics.clone(), direction, key, conn.client, conn.destination);
    let limit = pod.ctx.snapshots.borrow().limits.connections_per_pod;
    let Some(slot) = pod.places(direction).connections.take(limit as usize) else {
        record.finish(Err(Reason::ConnectionLimit.into()));
        return;
    };
    tokio::spawn(attend(pod.clone(), conn, direction, record, watcher.clone(), slot));
}

/// One connection's task, and the only place where its result becomes a metric and a log line.
pub(super) async fn attend(
    pod: Arc<Pod>,
    conn: Accepted,
    direction: Direction,
    mut record: ConnRecord,
    mut watcher: Watcher,
    _slot: Slot,
) {
    let result = tokio::select! {
        biased;
        reason = watcher.closed() => Err(reason.into()),
        result = serve(&pod, conn, direction, &mut record) => result,
    };
    record.finish(result);
}

/// The dual-stack listeners show IPv4 as mapped; a link-local address keeps its scope.
fn unmapped(addr: SocketAddr) -> SocketAddr {
    match addr.ip().to_canonical() {
        ip if ip.is_ipv4() => SocketAddr::new(ip, addr.port()),
        _ => addr,
    }
}

/// Errors that accept(2) passes on from a connection that died in the queue.
fn concerns_one_connection(error: &io::Error) -> bool {
    let exhausted = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM, libc::EINVAL, libc::EBADF];
    error.raw_os_error().is_some_and(|errno| !exhausted.contains(&errno))
}

#[cfg(test)]
mod tests;
