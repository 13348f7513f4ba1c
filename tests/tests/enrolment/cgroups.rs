//! Wherever the agent is started: its own dials are exempt, and nobody else's.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result};
use sealane_tests::agent::Agent;
use sealane_tests::cgroup;
use sealane_tests::report::Event;
use sealane_tests::trio::Trio;
use sealane_tests::wire::Capture;

use crate::TEXT;
use crate::footprint::maps;

#[test]
fn the_agent_exempts_itself_alone_wherever_it_is_started() -> Result<()> {
    let trio = Trio::strict("cgroups")?;
    let (web, api, lab) = (&trio.web, &trio.api, &trio.lab);
    let servers = [web.serve(8080, &[])?, api.serve(8080, &[])?];
    let [mut own, others] = [&lab.a, &lab.b].map(|node| trio.mesh.config(node));
    own.timeouts.insert("drain".into(), "1s".into());
    let _b = Agent::start(&lab.b, &others)?;
    let (root, pods) = (cgroup::root()?, lab.a.pods.clone());
    let (root, pods) = (root.as_path(), pods.as_path());
    for (place, below_pods) in [
        (lab.a.cgroup().join("agent"), false),
        (pods.join("agent"), true),
        // With a neighbour in it, which is not to be exempted: the agent moves on to a leaf.
        (web.cgroup().to_owned(), true),
        (pods.to_owned(), false),
        (lab.a.cgroup().to_owned(), false),
        (root.to_owned(), false),
    ] {
        fs::create_dir_all(&place)?;
        let mut a = Agent::spawn_in(&lab.a, &own, &place)?;
        a.wait_ready()?;
        a.wait_enrolled(&own)?;
        let shown = fs::read_to_string(format!("/proc/{}/cgroup", a.pid()))?;
        let leaf = shown.lines().find_map(|line| line.strip_prefix("0::/")).context("no cgroup")?;
        let leaf = root.join(leaf);
        assert!(!pods.starts_with(&leaf) && leaf != web.cgroup(), "{}: {}", place.display(), leaf.display());
        assert_eq!(leaf.starts_with(pods), below_pods, "{}", leaf.display());
        let exempt: Vec<u64> = maps(&lab.a)?.exempt.keys().collect::<Result<_, _>>()?;
        assert_eq!(exempt.contains(&fs::metadata(&leaf)?.ino()), below_pods, "{}", place.display());
        for shared in [pods, web.cgroup(), lab.a.cgroup(), root] {
            assert!(
                !exempt.contains(&fs::metadata(shared)?.ino()),
                "{}: {} is exempt",
                place.display(),
                shared.display()
            );
        }

        let wire = Capture::start(&lab.a.netns, &web.veth)?;
        for (client, server, events) in [(web, api, &servers[1]), (api, web, &servers[0])] {
            for (to, from) in [(server.at(8080), client.at(0)), (server.at6(8080), client.at6(0))] {
                let seen = events.events().len();
                let outcome = client.connect(to, &TEXT)?;
                assert!(outcome.echoed(), "{}, {to}: {outcome:?}", place.display());
                // Only where sock_ops follows the agent's dials.
                events.wait(Duration::from_secs(5), |_| events.events().len() > seen)?;
                let accepted = events.events().into_iter().skip(seen).find_map(|event| match event {
                    Event::Accepted { peer, .. } => Some(peer.ip()),
                    Event::Listening { .. } | Event::Closed { .. } => None,
                });
                assert_eq!(accepted, Some(from.ip()), "{}, {to}", place.display());
            }
        }
        assert!(!wire.stop()?.contains(TEXT[1].as_bytes())?, "{}", place.display());
        a.stop()?;
        assert!(leaf == place || !leaf.exists(), "{} is left behind", leaf.display());
    }
    Ok(())
}
