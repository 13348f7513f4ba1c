//! The pinned maps, typed.

use std::collections;
use std::hash::Hash;
use std::path::Path;

use aya::maps::{Array, HashMap, MapData, MapError, PerCpuArray, SockHash};
use sealane_common::keys::{
    ClientAddr, Generation, ListenerKey, MeshKey, PodAddr, PodEntry, PodPort, PodRecord, PodRules,
};
use sealane_common::names::maps;
use sealane_common::reason::Reason;

use super::KernelError;

/// Every map that the agent reads or writes. See `ebpf/src/maps.rs` for who else does.
pub struct Maps {
    /// netns cookie -> pod.
    pub pods: HashMap<MapData, u64, PodEntry>,
    /// pod id -> rules.
    pub rules: HashMap<MapData, u32, PodRules>,
    /// Ports with a mode of their own.
    pub port_modes: HashMap<MapData, PodPort, u32>,
    /// Listening sockets counted by sock_ops.
    pub listening: HashMap<MapData, PodPort, i64>,
    /// Listening sockets that sock_ops did not see.
    pub listening_before: HashMap<MapData, PodPort, i64>,
    /// Addresses configured in the pods.
    pub own: HashMap<MapData, PodAddr, u32>,
    /// Mesh destinations.
    pub mesh: HashMap<MapData, MeshKey, u32>,
    /// The agent's listeners.
    pub listeners: SockHash<MapData, ListenerKey>,
    /// Agents below `capture.cgroup`.
    pub exempt: HashMap<MapData, u64, u32>,
    /// What un-enrolment puts back.
    pub records: HashMap<MapData, u32, PodRecord>,
    /// Which agent may write.
    pub generation: Array<MapData, Generation>,
}

impl Maps {
    /// Opens the maps pinned in `dir`.
    pub fn open(dir: &Path) -> Result<Self, KernelError> {
        macro_rules! open {
            ($kind:ident, $name:ident) => {
                aya::maps::$kind::try_from(aya::maps::Map::$kind(pinned(dir, maps::$name)?))
                    .map_err(|source| KernelError::Map { name: maps::$name, source })?
            };
        }
        Ok(Self {
            pods: open!(HashMap, PODS),
            rules: open!(HashMap, POD_RULES),
            port_modes: open!(HashMap, PORT_MODES),
            listening: open!(HashMap, LISTENING),
            listening_before: open!(HashMap, LISTENING_BEFORE),
            own: open!(HashMap, OWN),
            mesh: open!(HashMap, MESH),
            listeners: open!(SockHash, LISTENERS),
            exempt: open!(HashMap, EXEMPT),
            records: open!(HashMap, POD_RECORDS),
            generation: open!(Array, GENERATION),
        })
    }
}

/// Opens the map that tells sock_ops which client a dial stands for; the data path's only map.
pub fn dial_clients(dir: &Path) -> Result<HashMap<MapData, u64, ClientAddr>, KernelError> {
    HashMap::try_from(aya::maps::Map::LruHashMap(pinned(dir, maps::DIAL_CLIENT)?))
        .map_err(|source| KernelError::Map { name: maps::DIAL_CLIENT, source })
}

/// What the kernel programs counted, by reason.
pub fn events(dir: &Path) -> Result<Vec<(Reason, u64)>, KernelError> {
    let failed = |source| KernelError::Map { name: maps::EVENTS, source };
    let counts: PerCpuArray<_, u64> =
        PerCpuArray::try_from(aya::maps::Map::PerCpuArray(pinned(dir, maps::EVENTS)?)).map_err(failed)?;
    let kernel = Reason::ALL.iter().take(Reason::KERNEL as usize);
    kernel.map(|reason| Ok((*reason, counts.get(&(*reason as u32), 0).map_err(failed)?.iter().sum()))).collect()
}

fn pinned(dir: &Path, name: &'static str) -> Result<MapData, KernelError> {
    MapData::from_pin(dir.join(name)).map_err(|source| KernelError::Map { name, source })
}

/// Makes the map hold exactly `wanted` among the keys that `mine` admits: additions and changes first, so that nothing that
/// stays is missing for a moment. Only where the map is full do removals come first.
pub fn converge<K: aya::Pod + Eq + Hash, V: aya::Pod + PartialEq>(
    map: &mut HashMap<MapData, K, V>,
    wanted: &collections::HashMap<K, V>,
    mine: impl Fn(&K) -> bool,
) -> Result<(), MapError> {
    if write(map, wanted).is_err() {
        prune(map, wanted, &mine)?;
        write(map, wanted)?;
    }
    prune(map, wanted, mine)
}

/// Adds what is missing and changes what differs.
pub fn write<K: aya::Pod + Eq + Hash, V: aya::Pod + PartialEq>(
    map: &mut HashMap<MapData, K, V>,
    wanted: &collections::HashMap<K, V>,
) -> Result<(), MapError> {
    let unchanged = |key: &K, value: &V| map.get(key, 0).is_ok_and(|held| held == *value);
    let news: Vec<_> = wanted.iter().filter(|(key, value)| !unchanged(key, value)).collect();
    news.into_iter().try_for_each(|(key, value)| map.insert(key, value, 0))
}

/// Removes the keys that `mine` admits and `wanted` has not.
pub fn prune<K: aya::Pod + Eq + Hash, V: aya::Pod>(
    map: &mut HashMap<MapData, K, V>,
    wanted: &collections::HashMap<K, V>,
    mine: impl Fn(&K) -> bool,
) -> Result<(), MapError> {
    let keys: Vec<K> = map.keys().collect::<Result<_, _>>()?;
    keys.iter().filter(|key| mine(key) && !wanted.contains_key(key)).try_for_each(|key| remove(map, key))
}

/// Removes a key that may be gone already.
pub fn remove<K: aya::Pod, V: aya::Pod>(map: &mut HashMap<MapData, K, V>, key: &K) -> Result<(), MapError> {
    match map.remove(key) {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result,
    }
}
