//! The pinned maps, typed.

use std::path::Path;

use aya::maps::{Array, HashMap, MapData, PerCpuArray, SockHash};
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

/// Makes the map hold exactly `wanted` among the keys that `mine` admits: inserts and changes first, then removals.
pub fn converge<K: aya::Pod + Eq + std::hash::Hash, V: aya::Pod + PartialEq>(
    map: &mut HashMap<MapData, K, V>,
    wanted: &std::collections::HashMap<K, V>,
    mine: impl Fn(&K) -> bool,
) -> Result<(), aya::maps::MapError> {
    let mut stale = Vec::new();
    let mut unchanged = std::collections::HashSet::new();
    for entry in map.iter() {
        let (key, value) = entry?;
        match wanted.get(&key) {
            Some(want) if *want == value => {
                unchanged.insert(key);
            }
            Some(_) => {}
            None if mine(&key) => stale.push(key),
            None => {}
        }
    }
    for (key, value) in wanted.iter().filter(|(key, _)| !unchanged.contains(*key)) {
        map.insert(key, value, 0)?;
    }
    for key in stale {
        remove(map, &key)?;
    }
    Ok(())
}

/// Removes a key that may be gone already.
pub fn remove<K: aya::Pod, V: aya::Pod>(map: &mut HashMap<MapData, K, V>, key: &K) -> Result<(), aya::maps::MapError> {
    match map.remove(key) {
        Err(aya::maps::MapError::KeyNotFound) => Ok(()),
        Err(aya::maps::MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result,
    }
}
