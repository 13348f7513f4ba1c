//! What an agent can leave in a pod and on bpffs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use sealane::kernel::layout_dir;
use sealane::kernel::maps::Maps;
use sealane_tests::lab::Node;
use sealane_tests::netns::Netns;

/// Rules, routes and settings of a network namespace.
#[derive(Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Rules and routes, by the arguments of `ip` that show them.
    network: BTreeMap<&'static str, String>,
    /// `/proc/sys/net`, what can be read of it.
    settings: BTreeMap<String, String>,
}

impl Footprint {
    /// As it is now.
    pub fn of(netns: &Netns) -> Result<Self> {
        const SHOW: [&str; 4] = ["-4 rule show", "-6 rule show", "-4 route show table all", "-6 route show table all"];
        let network = SHOW.into_iter().map(|args| Ok((args, netns.ip_show(args)?))).collect::<Result<_>>()?;
        let settings = netns.run(|| {
            let mut settings = BTreeMap::new();
            for family in ["ipv4", "ipv6"] {
                read_all(Path::new("/proc/sys/net").join(family).as_path(), &mut settings)?;
            }
            Ok(settings)
        })?;
        Ok(Self { network, settings })
    }

    /// What differs, for the message of a failed test.
    pub fn differs(&self, other: &Self) -> Vec<String> {
        let network = self.network.iter().filter(|(what, text)| other.network.get(*what) != Some(text));
        let network = network.map(|(what, text)| format!("{what}: {text:?}, {:?}", other.network.get(what)));
        let settings = self.settings.iter().filter(|(what, text)| other.settings.get(*what) != Some(text));
        let settings = settings.map(|(what, text)| format!("{what}: {text:?}, {:?}", other.settings.get(what)));
        network.chain(settings).collect()
    }
}

/// The maps that the node's agent has pinned.
pub fn maps(node: &Node) -> Result<Maps> {
    Maps::open(&layout_dir(&node.bpffs)).context("the pinned maps")
}

/// Every entry that a map, or a pinned link, holds for any pod of the node: empty where no pod is enrolled.
pub fn entries(node: &Node) -> Result<Vec<String>> {
    let maps = maps(node)?;
    let mut found = Vec::new();
    found.extend(maps.pods.keys().flatten().map(|key| format!("PODS {key}")));
    found.extend(maps.rules.keys().flatten().map(|key| format!("POD_RULES {key}")));
    found.extend(maps.records.keys().flatten().map(|key| format!("POD_RECORDS {key}")));
    found.extend(maps.own.keys().flatten().map(|key| format!("OWN {}", key.pod_id)));
    found.extend(maps.port_modes.keys().flatten().map(|key| format!("PORT_MODES {}", key.pod_id)));
    found.extend(maps.listening.keys().flatten().map(|key| format!("LISTENING {}", key.pod_id)));
    found.extend(maps.listening_before.keys().flatten().map(|key| format!("LISTENING_BEFORE {}", key.pod_id)));
    found.extend(maps.listeners.keys().flatten().map(|key| format!("LISTENERS {}", key.pod_id)));
    for entry in fs::read_dir(layout_dir(&node.bpffs))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        found.extend(name.starts_with("lookup-").then_some(name));
    }
    found.sort();
    Ok(found)
}

fn read_all(dir: &Path, found: &mut BTreeMap<String, String>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            read_all(&path, found)?;
        } else if let Ok(text) = fs::read_to_string(&path) {
            found.insert(path.display().to_string(), text);
        }
    }
    Ok(())
}
