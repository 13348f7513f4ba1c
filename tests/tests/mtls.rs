//! The happy path between two agents: the bytes arrive, the wire shows TLS 1.3 alone, and the server sees its client.

use std::time::Duration;

use anyhow::Result;
use sealane_tests::config::{Mesh, spiffe_id};
use sealane_tests::lab::{Lab, WIRE};
use sealane_tests::report::Event;
use sealane_tests::wire::{Capture, tls};
use serde_json::json;

const MARKER: &str = "a-marker-that-must-not-be-seen";

#[test]
fn enrolled_pods_speak_tls_on_the_wire_and_know_each_other() -> Result<()> {
    let lab = Lab::new("mtls")?;
    let (web, api) = (lab.a.pod("web", 10)?, lab.b.pod("api", 11)?);
    let mut mesh = Mesh::new(&lab);
    mesh.enrol(&web);
    mesh.enrol(&api);
    mesh.service("api", &["172.20.0.10"], &[(80, 8080)], &[&api])?;
    mesh.policy("api", json!({ "listener": { "mode": "STRICT" } }));
    let early = api.serve(8080, &[])?;
    let (a, b) = mesh.start()?;
    let late = api.serve(8081, &[])?;
    for (to, server) in [
        (api.at(8080), &early),
        (api.at6(8080), &early),
        (api.at(8081), &late),
        (api.at6(8081), &late),
        ("172.20.0.10:80".parse()?, &early),
    ] {
        let before = server.events().len();
        let capture = Capture::start(&lab.a.netns, WIRE)?;
        let outcome = web.connect(to, &["--text", MARKER, "--half-close"])?;
        let trace = capture.stop()?;
        assert!(outcome.echoed(), "{to}: {outcome:?}");
        assert_eq!(outcome.peer, Some(to));
        assert!(!trace.contains(MARKER.as_bytes())?, "{to}");
        let flows: Vec<_> = trace.to_port(8080).chain(trace.to_port(8081)).collect();
        assert!(!flows.is_empty(), "{to}");
        for flow in flows {
            let hello = tls::read(flow).filter(|tls| tls.whole).and_then(|tls| tls.hello);
            assert_eq!(hello.map(|hello| hello.version), Some(tls::TLS13), "{to}: {flow:?}");
        }
        server.wait(Duration::from_secs(5), |_| server.events().len() > before)?;
        let own = if to.is_ipv4() { web.at(0).ip() } else { web.at6(0).ip() };
        let seen = server.events().into_iter().skip(before).find_map(|event| match event {
            Event::Accepted { peer, getpeername, .. } => Some((peer.ip(), getpeername.map(|peer| peer.ip()))),
            Event::Listening { .. } | Event::Closed { .. } => None,
        });
        assert_eq!(seen, Some((own, Some(own))), "{to}: the client that the server sees");
    }
    for (agent, local, peer) in [(&a, "web", "api"), (&b, "api", "web")] {
        agent.wait_access("both IDs", |entry| {
            entry["outcome"] == "done" && entry["local_id"] == *spiffe_id(local) && entry["peer_id"] == *spiffe_id(peer)
        })?;
    }
    Ok(())
}
