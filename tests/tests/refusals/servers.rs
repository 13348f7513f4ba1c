//! Servers that an enrolled pod dials, where its agent expects a peer of the mesh.

use anyhow::Result;
use sealane_tests::agent::Agent;
use sealane_tests::config::{Config, spiffe_id};
use sealane_tests::lab::WIRE;
use sealane_tests::pod::Pod;
use sealane_tests::report::Event;
use sealane_tests::testpod::{Server, binary};
use sealane_tests::wire::Capture;
use serde_json::{Value, json};

use crate::{MARKER, SEND, SOON, Scene, accepted, reset};

/// The peer is PERMISSIVE, and the calls are all the same refused: a client knows what it dials.
#[test]
fn a_server_that_is_not_the_peer_gets_no_byte_of_the_application() -> Result<()> {
    let scene = Scene::new("servers", json!({ "mode": "PERMISSIVE" }))?;
    let (web, api, lab) = (&scene.trio.web, &scene.trio.api, &scene.trio.lab);
    let a = one_agent(&scene, |_| {})?;
    let wire = Capture::start(&lab.a.netns, WIRE)?;

    let mut bad: Vec<_> = scene.bad_svids("api")?.into_iter().map(|(svid, reason, _)| (svid, reason)).collect();
    bad.push((scene.files.ca.svid("another")?, "peer_id_mismatch"));
    bad.push((scene.files.ca.svid("web")?, "peer_id_mismatch"));
    for ((svid, reason), port) in bad.iter().zip(9000..) {
        let (cert, key) = svid.write_pair(&lab.dir(), &port.to_string())?;
        let server = tls_serve(api, port, &["--cert", &cert.to_string_lossy(), "--key", &key.to_string_lossy()])?;
        let entry = resets(&a, web, api, port, reason)?;
        assert_eq!(entry["peer_id"], json!(null));
        let closed = server.wait(SOON, |event| matches!(event, Event::Closed { .. }))?;
        assert!(matches!(closed, Event::Closed { received: 0, .. }), "{reason}: {closed:?}");
    }

    let (cert, key) = scene.files.ca.svid("api")?.write_pair(&lab.dir(), "sound")?;
    let (cert, key) = (cert.to_string_lossy(), key.to_string_lossy());
    let sound = ["--cert", &cert, "--key", &key];
    let _old = tls_serve(api, 8081, &[&sound[..], &["--tls12"]].concat())?;
    let entry = resets(&a, web, api, 8081, "refused_by_peer")?;
    assert_eq!(entry["alert"], "protocol_version");

    // It is the flaw alone that was refused, and the agent lives.
    let _server = tls_serve(api, 8080, &sound)?;
    let outcome = web.connect(api.at(8080), &SEND)?;
    assert!(outcome.echoed(), "{outcome:?}");
    assert!(!wire.stop()?.contains(MARKER.as_bytes())?, "plaintext on the wire");
    Ok(())
}

#[test]
fn a_server_that_speaks_no_tls_gets_no_byte_of_the_application() -> Result<()> {
    let scene = Scene::new("no-tls", json!({ "mode": "PERMISSIVE" }))?;
    let (web, api) = (&scene.trio.web, &scene.trio.api);
    let a = one_agent(&scene, |_| {})?;
    let wire = Capture::start(&scene.trio.lab.a.netns, WIRE)?;
    for (port, mode, reason) in [
        (8081, "first", "not_tls"),
        (8082, "echo", "tls_misbehaved"),
        (8083, "close", "handshake_closed"),
        (8084, "reset", "handshake_closed"),
    ] {
        let server = api.serve(port, &["--mode", mode])?;
        resets(&a, web, api, port, reason)?;
        assert_eq!(accepted(&server), 1, "{mode}: tried once, and not again in plaintext");
    }
    resets(&a, web, api, 8086, "connect_refused")?;
    assert!(!wire.stop()?.contains(MARKER.as_bytes())?, "plaintext on the wire");
    Ok(())
}

#[test]
fn a_server_that_never_answers_gets_no_byte_of_the_application() -> Result<()> {
    let scene = Scene::new("silent", json!({ "mode": "PERMISSIVE" }))?;
    let (web, api) = (&scene.trio.web, &scene.trio.api);
    let a = one_agent(&scene, |config| scene.hasten(config))?;
    let wire = Capture::start(&scene.trio.lab.a.netns, WIRE)?;
    let server = api.serve(8080, &["--mode", "hold"])?;
    resets(&a, web, api, 8080, "handshake_timeout")?;
    assert_eq!(accepted(&server), 1, "tried once, and not again in plaintext");
    assert!(!wire.stop()?.contains(MARKER.as_bytes())?, "plaintext on the wire");
    Ok(())
}

#[test]
fn a_server_that_refuses_us_tells_why() -> Result<()> {
    let allow = json!([{ "from": ["spiffe://lab.example/nobody"] }]);
    let scene = Scene::new("alert", json!({ "mode": "PERMISSIVE", "allow": allow }))?;
    let (web, api) = (&scene.trio.web, &scene.trio.api);
    let server = api.serve(8080, &[])?;
    let (a, b) = scene.start()?;
    let wire = Capture::start(&scene.trio.lab.a.netns, WIRE)?;
    for (to, times) in [(api.at(8080), 1), (api.at6(8080), 2)] {
        b.refuses("inbound", "not_allowed", || reset(&web.connect(to, &SEND)?))?;
        let entry = a.wait_access("the other side", |entry| {
            entry["outcome"] == "refused_by_peer" && entry["destination"] == to.to_string()
        })?;
        assert_eq!((&entry["alert"], &entry["peer_id"]), (&json!("access_denied"), &json!(spiffe_id("api"))));
        assert_eq!(a.access().len(), times, "one connection each");
    }
    assert_eq!(accepted(&server), 0);
    assert!(!wire.stop()?.contains(MARKER.as_bytes())?, "plaintext on the wire");
    Ok(())
}

/// node-a's; there is none where the servers are.
fn one_agent(scene: &Scene, edit: impl Fn(&mut Config)) -> Result<Agent> {
    let mut config = scene.trio.mesh.config(&scene.trio.lab.a);
    scene.edit(&mut config);
    edit(&mut config);
    Agent::start(&scene.trio.lab.a, &config)
}

fn tls_serve(pod: &Pod, port: u16, args: &[&str]) -> Result<Server> {
    Server::start(pod.command(binary("testpod")?), "tls-serve", &pod.at(port).to_string(), args)
}

/// The agent refuses its application's call for this reason.
fn resets(agent: &Agent, from: &Pod, to: &Pod, port: u16, reason: &str) -> Result<Value> {
    agent.refuses("outbound", reason, || reset(&from.connect(to.at(port), &SEND)?))
}
