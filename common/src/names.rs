//! Names of programs and maps, their capacities, and the layout version that pins lie under.

/// Directory below `capture.bpffs`; changes whenever a pinned type or the meaning of a map does.
pub const LAYOUT: &str = "v1";

/// Host-wide cgroup programs, by name in the object.
pub mod programs {
    /// cgroup/connect4.
    pub const CONNECT4: &str = "sealane_connect4";
    /// cgroup/connect6.
    pub const CONNECT6: &str = "sealane_connect6";
    /// cgroup/getpeername4.
    pub const GETPEERNAME4: &str = "sealane_peer4";
    /// cgroup/getpeername6.
    pub const GETPEERNAME6: &str = "sealane_peer6";
    /// cgroup/setsockopt.
    pub const SETSOCKOPT: &str = "sealane_setopt";
    /// sockops.
    pub const SOCK_OPS: &str = "sealane_sockops";
    /// sk_lookup, one instance per pod netns.
    pub const SK_LOOKUP: &str = "sealane_lookup";
}

/// Maps, by name in the object; all pinned.
pub mod maps {
    /// netns cookie -> PodEntry.
    pub const PODS: &str = "PODS";
    /// pod id -> PodRules.
    pub const POD_RULES: &str = "POD_RULES";
    /// PodPort -> mode.
    pub const PORT_MODES: &str = "PORT_MODES";
    /// PodPort -> sockets that listen, counted by sock_ops.
    pub const LISTENING: &str = "LISTENING";
    /// PodPort -> sockets that listened before sock_ops saw them, counted by sock_diag.
    pub const LISTENING_BEFORE: &str = "LISTENING_BEFORE";
    /// PodAddr -> 1.
    pub const OWN: &str = "OWN";
    /// MeshKey -> MESH_YES or MESH_NO.
    pub const MESH: &str = "MESH";
    /// ListenerKey -> the agent's listener.
    pub const LISTENERS: &str = "LISTENERS";
    /// cgroup id -> 1: agents below `capture.cgroup`.
    pub const EXEMPT: &str = "EXEMPT";
    /// socket cookie of the agent's dial -> ClientAddr.
    pub const DIAL_CLIENT: &str = "DIAL_CLIENT";
    /// DialTuple -> ClientAddr.
    pub const DIAL_TUPLE: &str = "DIAL_TUPLE";
    /// per socket: what the connect hook decided.
    pub const DECISION: &str = "DECISION";
    /// per socket: ClientAddr.
    pub const CLIENT: &str = "CLIENT";
    /// Event -> count, per CPU.
    pub const EVENTS: &str = "EVENTS";
    /// 0 -> Generation.
    pub const GENERATION: &str = "GENERATION";
    /// pod id -> PodRecord.
    pub const POD_RECORDS: &str = "POD_RECORDS";
}

/// The read-only global that tells an sk_lookup instance its pod.
pub const POD_ID_GLOBAL: &str = "POD_ID";

/// Pods of one node: EKS allows 250 on a node, 1,024 leaves room for both sides of a rolling replacement.
pub const MAX_PODS: u32 = 1024;
/// Mesh destinations (pod addresses and VIP ports) of the whole cluster: 2^17 entries of 28 bytes, allocated on demand.
pub const MAX_MESH: u32 = 131_072;
/// {pod, port} pairs of one node.
pub const MAX_POD_PORTS: u32 = 16_384;
/// Dials that have not reached the application's accept queue yet.
pub const MAX_DIALS: u32 = 65_536;
