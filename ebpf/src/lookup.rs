//! sk_lookup, one instance per pod netns: who gets a SYN? The rows and their order are a security boundary; each has a
//! test in tests/tests/hooks.

use aya_ebpf::programs::SkLookupContext;
use sealane_common::addr::Addr;
use sealane_common::keys::{INBOUND, ListenerKey, MODE_DISABLED, MODE_STRICT, OUTBOUND, PodAddr, PodPort, PodRules};
use sealane_common::reason::Reason;

use crate::ctx::{self, Lookup};
use crate::maps::{LISTENERS, LISTENING, LISTENING_BEFORE, OWN, POD_RULES, PORT_MODES};

const IPPROTO_TCP: u32 = 6;
const LOOPBACK_IFINDEX: u32 = 1;

/// Which pod this instance serves; set by the loader. The program may not ask for the netns, and addresses are not
/// enough: a SYN from pod A to pod B looks the same in both.
#[unsafe(no_mangle)]
static POD_ID: u32 = 0;

/// What becomes of the SYN.
pub enum Verdict {
    /// The kernel's own lookup.
    Pass,
    /// A listener of the agent was chosen.
    Steered,
    /// No socket: the kernel answers with a reset, or with silence for an address that is not local.
    Drop(Reason),
}

/// The rows, first match wins.
#[inline(always)]
pub fn classify(ctx: &SkLookupContext) -> Verdict {
    // Runs for every packet of an unconnected UDP socket: leave first.
    if ctx::lookup_protocol(ctx) != IPPROTO_TCP {
        return Verdict::Pass;
    }
    let pod_id = pod_id();
    let Lookup { local, remote, ingress_ifindex } = ctx::lookup(ctx);
    // SAFETY: copied out at once; the agent replaces entries whole, and the map is not preallocated.
    let Some(rules) = (unsafe { POD_RULES.get(pod_id) }).copied() else {
        return Verdict::Drop(Reason::NoListener);
    };
    let local_is_own = is_own(pod_id, local.addr);
    let local_is_loopback = local.addr.is_loopback();
    let remote_is_own = is_own(pod_id, remote);

    if is_agent_port(rules, local.port) && (local_is_own || local_is_loopback) {
        return Verdict::Drop(Reason::AgentPort);
    }
    // Not by the address alone: with route_localnet a neighbour can send to 127.0.0.1.
    if local_is_loopback && ingress_ifindex == LOOPBACK_IFINDEX {
        return Verdict::Pass;
    }
    // The pod to itself, the agent's dials to the application among it. From the wire, IPv4 cannot forge it, and for IPv6 the
    // answer goes to the pod.
    if (local_is_own && remote_is_own) || local.addr == remote {
        return Verdict::Pass;
    }
    if !local_is_own && !local_is_loopback && remote_is_own {
        return steer(ctx, pod_id, OUTBOUND);
    }
    if !local_is_own {
        // A marked SYN from a source that is not the pod's, or a packet to an address that was just removed.
        return Verdict::Drop(if local_is_loopback { Reason::UnknownLocal } else { Reason::ForeignSource });
    }
    let mode = port_mode(pod_id, local.port).unwrap_or(rules.mode);
    if mode == MODE_DISABLED {
        return Verdict::Pass;
    }
    if rules.listening_known != 0 && !is_listening(pod_id, local.port) {
        // STRICT must not pass: listen() may come between this look and the kernel's.
        return if mode == MODE_STRICT { Verdict::Drop(Reason::NotListening) } else { Verdict::Pass };
    }
    steer(ctx, pod_id, INBOUND)
}

#[inline(always)]
fn steer(ctx: &SkLookupContext, pod_id: u32, direction: u32) -> Verdict {
    match LISTENERS.redirect_sk_lookup(ctx, ListenerKey { pod_id, direction }, 0) {
        Ok(()) => Verdict::Steered,
        Err(_) => Verdict::Drop(Reason::NoListener),
    }
}

#[inline(always)]
fn pod_id() -> u32 {
    // SAFETY: a read-only global; volatile because the loader changes it after compilation.
    unsafe { core::ptr::read_volatile(&raw const POD_ID) }
}

#[inline(always)]
fn is_agent_port(rules: PodRules, port: u16) -> bool {
    port >= rules.agent_port_first && port <= rules.agent_port_last
}

#[inline(always)]
fn is_own(pod_id: u32, addr: Addr) -> bool {
    OWN.get_ptr(PodAddr { pod_id, addr }).is_some()
}

#[inline(always)]
fn port_mode(pod_id: u32, port: u16) -> Option<u32> {
    // SAFETY: copied out at once; the agent replaces entries whole, and the map is not preallocated.
    unsafe { PORT_MODES.get(PodPort { pod_id, port, pad: 0 }) }.copied()
}

#[inline(always)]
fn is_listening(pod_id: u32, port: u16) -> bool {
    let key = PodPort { pod_id, port, pad: 0 };
    // SAFETY: copied out at once; an aligned i64.
    let counted =
        |map: &aya_ebpf::maps::HashMap<PodPort, i64>| unsafe { map.get(key) }.is_some_and(|count| *count != 0);
    counted(&LISTENING) || counted(&LISTENING_BEFORE)
}
