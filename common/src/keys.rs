//! Map keys and values. Ports are in host order; addresses as [`Addr`]; padding is spelled out because BPF hash maps
//! compare every byte.

use crate::addr::Addr;

crate::map_type! {
    /// PODS value, by network namespace cookie.
    pub struct PodEntry {
        /// The agent's number for this enrolment; never reused while an entry holds it.
        pub pod_id: u32,
        /// [`CAPTURE`] and [`GUARD`].
        pub flags: u32,
    }

    /// POD_RULES value, by pod id: what sk_lookup needs to know of the pod.
    pub struct PodRules {
        /// One of [`MODE_PERMISSIVE`], [`MODE_STRICT`], [`MODE_DISABLED`].
        pub mode: u32,
        /// First and last of the agent's own listener ports.
        pub agent_port_first: u16,
        /// Inclusive.
        pub agent_port_last: u16,
        /// 0 where the listening set could not be kept whole: then that row is off.
        pub listening_known: u32,
    }

    /// {pod, port}: PORT_MODES (value: a mode), LISTENING and LISTENING_BEFORE (value: sockets).
    pub struct PodPort {
        /// Pod id.
        pub pod_id: u32,
        /// Host order.
        pub port: u16,
        /// Always zero.
        pub pad: u16,
    }

    /// OWN key: an address configured in the pod's netns.
    pub struct PodAddr {
        /// Pod id.
        pub pod_id: u32,
        /// The address.
        pub addr: Addr,
    }

    /// MESH key; value [`MESH_YES`] or [`MESH_NO`]. The most specific entry decides: pod and port, pod, port, neither.
    pub struct MeshKey {
        /// The pod that this entry binds, 0 for all.
        pub pod_id: u32,
        /// Destination.
        pub addr: Addr,
        /// Destination port, 0 for all.
        pub port: u16,
        /// Always zero.
        pub pad: u16,
    }

    /// LISTENERS (SOCKHASH) key.
    pub struct ListenerKey {
        /// Pod id.
        pub pod_id: u32,
        /// [`INBOUND`] or [`OUTBOUND`].
        pub direction: u32,
    }

    /// A client's address as the application shall see it.
    pub struct ClientAddr {
        /// Address.
        pub addr: Addr,
        /// Host order.
        pub port: u16,
        /// Always zero.
        pub pad: u16,
    }

    /// DIAL_TUPLE key: the agent's dial towards the application, from the application's point of view.
    pub struct DialTuple {
        /// Pod id.
        pub pod_id: u32,
        /// The application's address.
        pub local: Addr,
        /// The agent's address.
        pub remote: Addr,
        /// The application's port, host order.
        pub local_port: u16,
        /// The agent's port, host order.
        pub remote_port: u16,
    }

    /// GENERATION value: which agent process may write.
    pub struct Generation {
        /// Counts up with every takeover.
        pub number: u64,
    }

    /// POD_RECORDS value, by pod id: what un-enrolment has to put back, also when another process does it.
    pub struct PodRecord {
        /// The netns cookie.
        pub cookie: u64,
        /// Bit 0: `ports` was changed; bit 1: `tw_reuse`; bits 2 and 3: fwmark_reflect v4 and v6; bit 4: `reserved`.
        pub changed: u32,
        /// net.ipv4.tcp_tw_reuse before.
        pub tw_reuse: u32,
        /// net.ipv4.ip_local_port_range before.
        pub ports: [u16; 2],
        /// net.ipv4.fwmark_reflect and net.ipv6.fwmark_reflect before.
        pub reflect: [u16; 2],
        /// net.ipv4.ip_local_reserved_ports before, zero-terminated.
        pub reserved: [u8; 256],
        /// Path of the netns, zero-terminated.
        pub netns: [u8; 256],
    }
}

/// Pod flag: connects to the mesh are marked.
pub const CAPTURE: u32 = 1;
/// Pod flag: socket options that would undo the mark are refused. Outlives [`CAPTURE`] until the last marked socket ends.
pub const GUARD: u32 = 2;

/// Plaintext is accepted as well as mTLS.
pub const MODE_PERMISSIVE: u32 = 0;
/// mTLS or nothing.
pub const MODE_STRICT: u32 = 1;
/// Not captured.
pub const MODE_DISABLED: u32 = 2;

/// [`MeshKey`]'s value: captured.
pub const MESH_YES: u32 = 1;
/// [`MeshKey`]'s value: left alone (a peer's DISABLED port).
pub const MESH_NO: u32 = 0;

/// [`ListenerKey`] direction: from the network to the application.
pub const INBOUND: u32 = 0;
/// [`ListenerKey`] direction: from the application to the mesh.
pub const OUTBOUND: u32 = 1;

/// The mark bit on captured sockets. Chosen away from Kubernetes (0x4000, 0x8000), Cilium (0x0f00), VPC CNI (0x80)
/// and Istio (0x539, 0x111); the mark never leaves the pod's netns.
pub const MARK: u32 = 0x2000_0000;

/// The mark bit on the agent's own sockets inside pods, which sock_diag shows: nobody destroys them by mistake.
pub const AGENT_MARK: u32 = 0x1000_0000;
