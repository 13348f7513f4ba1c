//! sockops: follows the agent's dials so that applications see the real client, keeps the set of listening ports, and
//! holds the mark to what the connect hook decided.

use aya_ebpf::EbpfContext;
use aya_ebpf::programs::SockOpsContext;
use sealane_common::keys::{DialTuple, MARK, PodPort};
use sealane_common::reason::Reason;

use crate::maps::{CLIENT, DECISION, DIAL_CLIENT, DIAL_TUPLE, LISTENING};
use crate::{count, ctx};

const TCP_CONNECT_CB: u32 = 3;
const PASSIVE_ESTABLISHED_CB: u32 = 5;
const STATE_CB: u32 = 10;
const TCP_LISTEN_CB: u32 = 11;
const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;

/// Dispatches on the callback; other callbacks and pods that are not enrolled cost one comparison and one lookup.
#[inline(always)]
pub fn follow(ctx: &SockOpsContext) {
    let op = ctx::op(ctx);
    if !matches!(op, TCP_CONNECT_CB | PASSIVE_ESTABLISHED_CB | STATE_CB | TCP_LISTEN_CB) {
        return;
    }
    let Some(pod) = ctx::pod(ctx.as_ptr()) else { return };
    match op {
        TCP_CONNECT_CB => connecting(ctx, pod.pod_id),
        PASSIVE_ESTABLISHED_CB => accepted(ctx, pod.pod_id),
        TCP_LISTEN_CB => listening(ctx, pod.pod_id),
        _ => closing(ctx, pod.pod_id),
    }
}

/// Before the SYN, the local port known.
#[inline(always)]
fn connecting(ctx: &SockOpsContext, pod_id: u32) {
    let cookie = ctx::socket_cookie(ctx);
    // SAFETY: copied out at once; nobody else writes this socket's entry.
    if let Some(client) = unsafe { DIAL_CLIENT.get(cookie) }.copied() {
        let _ = DIAL_TUPLE.insert(dial_tuple(ctx, pod_id), client, 0);
        let _ = DIAL_CLIENT.remove(cookie);
        ctx::want_state_callbacks(ctx);
        return;
    }
    // SAFETY: the pointer is the socket's own storage, checked by `ops_storage`.
    let captured = ctx::ops_storage(ctx, &DECISION, false).is_some_and(|decision| unsafe { *decision } != 0);
    let mark = ctx::ops_mark(ctx);
    if captured && mark & MARK == 0 {
        if !ctx::set_ops_mark(ctx, mark | MARK) {
            count::add(Reason::MarkFailed);
        }
    }
}

/// The application's side of a dial: accept() cannot overtake this, it takes the socket's lock.
#[inline(always)]
fn accepted(ctx: &SockOpsContext, pod_id: u32) {
    let (local, remote) = ctx::ends(ctx);
    let tuple =
        DialTuple { pod_id, local: local.addr, remote: remote.addr, local_port: local.port, remote_port: remote.port };
    // SAFETY: copied out at once; the 4-tuple is in use, so nobody else writes this entry.
    let Some(client) = unsafe { DIAL_TUPLE.get(tuple) }.copied() else { return };
    if let Some(shown) = ctx::ops_storage(ctx, &CLIENT, true) {
        // SAFETY: the pointer is the socket's own storage, checked by `ops_storage`.
        unsafe { *shown = client };
    }
    let _ = DIAL_TUPLE.remove(tuple);
}

#[inline(always)]
fn listening(ctx: &SockOpsContext, pod_id: u32) {
    let (local, _) = ctx::ends(ctx);
    let key = PodPort { pod_id, port: local.port, pad: 0 };
    // The insert races with another CPU's only for the first socket of a port; NOEXIST makes the loser count up.
    const NOEXIST: u64 = 1;
    if LISTENING.insert(key, 1, NOEXIST).is_err() {
        add(&key, 1);
    }
    ctx::want_state_callbacks(ctx);
}

#[inline(always)]
fn closing(ctx: &SockOpsContext, pod_id: u32) {
    let (old, new) = ctx::states(ctx);
    if new != TCP_CLOSE {
        return;
    }
    if old == TCP_LISTEN {
        let (local, _) = ctx::ends(ctx);
        add(&PodPort { pod_id, port: local.port, pad: 0 }, -1);
    } else {
        let _ = DIAL_TUPLE.remove(dial_tuple(ctx, pod_id));
    }
}

/// Entries stay at zero: removing one would race with a listen() on another CPU.
#[inline(always)]
fn add(key: &PodPort, delta: i64) {
    if let Some(count) = LISTENING.get_ptr_mut(key) {
        ctx::atomic_add(count, delta);
    }
}

/// The key as the application's side will look it up, from the agent's socket.
#[inline(always)]
fn dial_tuple(ctx: &SockOpsContext, pod_id: u32) -> DialTuple {
    let (local, remote) = ctx::ends(ctx);
    DialTuple { pod_id, local: remote.addr, remote: local.addr, local_port: remote.port, remote_port: local.port }
}
