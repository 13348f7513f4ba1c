//! Two agents, pods on both nodes, real applications: the main path.

use anyhow::Result;
use sealane_tests::config::Mesh;
use sealane_tests::lab::{Lab, WIRE};
use sealane_tests::wire::Capture;
use serde_json::json;

#[test]
fn enrolled_pods_speak_mtls_across_the_wire() -> Result<()> {
    let lab = Lab::new("mesh")?;
    let web = lab.a.pod("web", 10)?;
    let api = lab.b.pod("api", 11)?;
    let mut mesh = Mesh::new(&lab);
    mesh.enrol(&web);
    mesh.enrol(&api);
    mesh.policy(
        "api",
        json!({ "listener": { "mode": "STRICT", "allow": [{ "from": ["spiffe://lab.example/web"] }] } }),
    );
    let (a, b) = mesh.start()?;
    let server = api.serve(8080, &["--mode", "echo"])?;
    for to in [api.at(8080), api.at6(8080)] {
        let wire = Capture::start(&lab.a.netns, WIRE)?;
        let outcome = web.connect(to, &["--bytes", "300000", "--half-close"])?;
        assert!(outcome.echoed(), "{to}: {outcome:?}");
        assert_eq!(outcome.peer, Some(to));
        let trace = wire.stop()?;
        println!("{} packets, {} flows", trace.packets.len(), trace.flows.len());
    }
    println!("{:?}\n{:?}\n{:?}", server.events(), a.access(), b.access());
    Ok(())
}
