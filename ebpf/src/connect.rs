//! cgroup/connect4 and connect6: should this pod's connection go to the agent?

use aya_ebpf::EbpfContext;
use aya_ebpf::programs::SockAddrContext;
use sealane_common::addr::Addr;
use sealane_common::keys::{CAPTURE, MARK, MESH_YES, MeshKey, PodAddr, PodEntry};
use sealane_common::reason::Reason;

use crate::ctx::{self, Endpoint};
use crate::maps::{DECISION, MESH, OWN};

const IPPROTO_TCP: u32 = 6;

/// Marks or unmarks the socket. `None` where the caller is not an enrolled pod, or no TCP.
#[inline(always)]
pub fn try_connect(ctx: &SockAddrContext, to: Endpoint) -> Option<Reason> {
    if ctx::protocol(ctx) != IPPROTO_TCP {
        return None;
    }
    let pod = ctx::pod(ctx.as_ptr())?;
    if ctx::is_agent() {
        return None;
    }
    let captured = pod.flags & CAPTURE != 0 && is_mesh(pod, to);
    if !record(ctx, captured) {
        return Some(Reason::MarkFailed);
    }
    // Sockets are reused for other destinations (AF_UNSPEC), so the bit is cleared as well as set; an application's own
    // mark bits are left alone.
    let before = ctx::mark(ctx);
    let after = if captured { before | MARK } else { before & !MARK };
    if after != before && !ctx::set_mark(ctx, after) {
        return Some(Reason::MarkFailed);
    }
    Some(if captured { Reason::Captured } else { Reason::NotMesh })
}

/// Leaves the decision for sock_ops. A socket that was never captured needs no record.
#[inline(always)]
fn record(ctx: &SockAddrContext, captured: bool) -> bool {
    match ctx::storage(ctx, &DECISION, captured) {
        Some(decision) => {
            // SAFETY: the pointer is the socket's own storage, checked by `storage`.
            unsafe { *decision = u32::from(captured) };
            true
        }
        None => !captured,
    }
}

#[inline(always)]
fn is_mesh(pod: PodEntry, to: Endpoint) -> bool {
    if to.addr.is_loopback() || to.addr.is_unspecified() {
        return false;
    }
    if OWN.get_ptr(PodAddr { pod_id: pod.pod_id, addr: to.addr }).is_some() {
        return false;
    }
    let entry = mesh(pod.pod_id, to.addr, to.port)
        .or_else(|| mesh(pod.pod_id, to.addr, 0))
        .or_else(|| mesh(0, to.addr, to.port))
        .or_else(|| mesh(0, to.addr, 0));
    entry == Some(MESH_YES)
}

#[inline(always)]
fn mesh(pod_id: u32, addr: Addr, port: u16) -> Option<u32> {
    // SAFETY: copied out at once; the agent replaces entries whole, and the map is not preallocated.
    unsafe { MESH.get(MeshKey { pod_id, addr, port, pad: 0 }) }.copied()
}
