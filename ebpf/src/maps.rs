//! Every map: who writes it, who reads it, why it has its size. All are pinned and outlive the agent.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, SockHash};
use sealane_common::keys::{
    ClientAddr, DialTuple, Generation, ListenerKey, MeshKey, PodAddr, PodEntry, PodPort, PodRecord, PodRules,
};
use sealane_common::names::{MAX_DIALS, MAX_MESH, MAX_POD_PORTS, MAX_PODS};
use sealane_common::reason::Reason;

/// netns cookie -> pod. Written by the agent; read by every cgroup program.
#[map]
pub static PODS: HashMap<u64, PodEntry> = HashMap::pinned(MAX_PODS, BPF_F_NO_PREALLOC);

/// pod id -> what sk_lookup needs to know. Written by the agent.
#[map]
pub static POD_RULES: HashMap<u32, PodRules> = HashMap::pinned(MAX_PODS, BPF_F_NO_PREALLOC);

/// Ports with a mode of their own. Written by the agent; read by sk_lookup.
#[map]
pub static PORT_MODES: HashMap<PodPort, u32> = HashMap::pinned(MAX_POD_PORTS, BPF_F_NO_PREALLOC);

/// Sockets that listen, counted by sock_ops from listen() to close. Read by sk_lookup; may only cause a refusal.
#[map]
pub static LISTENING: HashMap<PodPort, i64> = HashMap::pinned(MAX_POD_PORTS, BPF_F_NO_PREALLOC);

/// Sockets that listened before sock_ops saw them. Written by the agent from sock_diag; read by sk_lookup.
#[map]
pub static LISTENING_BEFORE: HashMap<PodPort, i64> = HashMap::pinned(MAX_POD_PORTS, BPF_F_NO_PREALLOC);

/// Addresses configured in the pod. Written by the agent, which follows them by netlink; eight per pod on average.
#[map]
pub static OWN: HashMap<PodAddr, u32> = HashMap::pinned(MAX_PODS * 8, BPF_F_NO_PREALLOC);

/// Mesh destinations. Written by the agent; read by the connect hook.
#[map]
pub static MESH: HashMap<MeshKey, u32> = HashMap::pinned(MAX_MESH, BPF_F_NO_PREALLOC);

/// The agent's listeners inside the pods. Written by the agent; an entry leaves when its socket closes (fail closed).
#[map]
pub static LISTENERS: SockHash<ListenerKey> = SockHash::pinned(MAX_PODS * 2, 0);

/// cgroup ids of agents that live below `capture.cgroup`: two during an upgrade.
#[map]
pub static EXEMPT: HashMap<u64, u32> = HashMap::pinned(16, BPF_F_NO_PREALLOC);

/// socket cookie of a dial -> the client that the application shall see. Written by the agent just before connect(),
/// moved on by sock_ops. LRU: an entry lives for microseconds, so only what a killed agent left can be evicted.
#[map]
pub static DIAL_CLIENT: LruHashMap<u64, ClientAddr> = LruHashMap::pinned(MAX_DIALS, 0);

/// 4-tuple of a dial -> client, from the SYN to the accept queue. Written and read by sock_ops.
#[map]
pub static DIAL_TUPLE: LruHashMap<DialTuple, ClientAddr> = LruHashMap::pinned(MAX_DIALS, 0);

/// What the connect hook decided for a socket: 1 is captured. Read by sock_ops, which on 6.1 cannot ask for the cgroup.
#[btf_map]
pub static DECISION: SkStorage<u32> = SkStorage::new();

/// The client that accept() and getpeername() report for a socket. Written by sock_ops.
#[btf_map]
pub static CLIENT: SkStorage<ClientAddr> = SkStorage::new();

/// Reason -> count. Written by all programs.
#[map]
pub static EVENTS: PerCpuArray<u64> = PerCpuArray::pinned(Reason::KERNEL, 0);

/// Which agent process may write. Only the agents use it.
#[map]
pub static GENERATION: Array<Generation> = Array::pinned(1, 0);

/// What un-enrolment puts back. Only the agents use it.
#[map]
pub static POD_RECORDS: HashMap<u32, PodRecord> = HashMap::pinned(MAX_PODS, BPF_F_NO_PREALLOC);
