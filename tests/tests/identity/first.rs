//! Pods that have no SVID yet. Where STRICT binds them their connections wait; others are not enrolled before they have one.

use anyhow::Result;
use sealane_tests::agent::Agent;
use sealane_tests::config::Config;
use sealane_tests::files::Files;
use sealane_tests::lab::WIRE;
use sealane_tests::poll;
use sealane_tests::report::Outcome;
use sealane_tests::trio::Trio;
use sealane_tests::wire::Capture;
use serde_json::{Value, json};

use crate::{MARKER, SEND, SOON, edit, identity, reset, scene, wait_identity};

#[test]
fn a_connection_waits_for_the_first_svid_at_either_end() -> Result<()> {
    let (mut trio, files) = scene("first")?;
    trio.mesh.policy("web", json!({ "listener": { "mode": "STRICT" } }));
    let (web, api) = (&trio.web, &trio.api);
    let _server = api.serve(8080, &[])?;
    let (a, b) = start(&trio, &files, "60s")?;
    let wire = Capture::start(&trio.lab.a.netns, WIRE)?;
    let to = api.at(8080).to_string();
    let call = web.start_testpod(&[&["connect", "--to", &to, "--limit", "60000"], &SEND[..]].concat())?;
    for (agent, pod) in [(&a, "web"), (&b, "api")] {
        poll::until_true(&format!("a connection waits for {pod}'s SVID"), SOON, || {
            agent.state().is_ok_and(|state| of_pod(&state, pod)["connections"] == 1)
        })?;
        assert_eq!(identity(agent, pod)?["state"], "pending");
        files.give_sound(&[pod])?;
    }
    let outcome: Outcome = call.result()?;
    assert!(outcome.echoed(), "{outcome:?}");
    assert!(!wire.stop()?.contains(MARKER.as_bytes())?, "plaintext on the wire");
    Ok(())
}

#[test]
fn a_connection_does_not_wait_for_ever() -> Result<()> {
    let (mut trio, files) = scene("pending")?;
    trio.mesh.policy("web", json!({ "listener": { "mode": "STRICT" } }));
    let (web, api) = (&trio.web, &trio.api);
    let server = api.serve(8080, &[])?;
    let (a, b) = start(&trio, &files, "300ms")?;
    a.refuses("outbound", "identity_pending", || reset(&web.connect(api.at(8080), &SEND)?))?;
    files.give_sound(&["web"])?;
    wait_identity(&a, "web", "state", &json!("ready"))?;
    b.refuses("inbound", "identity_pending", || reset(&web.connect(api.at(8080), &SEND)?))?;
    assert_eq!(server.events().len(), 1, "only that it listens");
    Ok(())
}

#[test]
fn a_pod_that_strict_does_not_bind_is_enrolled_with_its_first_svid() -> Result<()> {
    let (trio, files) = scene("unbound")?;
    files.give_sound(&["api"])?;
    let server = trio.api.serve(8080, &[])?;
    let configs = [&trio.lab.a, &trio.lab.b].map(|node| {
        let mut config = trio.mesh.config(node);
        edit(&files, &mut config);
        config
    });
    let (a, _b) = (Agent::spawn(&trio.lab.a, &configs[0])?, Agent::start(&trio.lab.b, &configs[1])?);
    let detail = "the workload has no SVID yet";
    poll::until_true("web waits", SOON, || a.state().is_ok_and(|state| of_pod(&state, "web")["detail"] == detail))?;
    assert_eq!(a.get("/readyz")?.status, 503);
    // It is not the mesh's yet, and api takes mTLS alone.
    assert!(trio.web.connect(trio.api.at(8080), &SEND)?.refused());
    assert_eq!(server.events().len(), 1, "only that it listens");
    files.give_sound(&["web"])?;
    a.wait_ready()?;
    a.wait_enrolled(&configs[0])?;
    assert!(trio.web.connect(trio.api.at(8080), &SEND)?.echoed());
    Ok(())
}

/// Both agents, which have the pods but no SVID.
fn start(trio: &Trio, files: &Files, wait: &str) -> Result<(Agent, Agent)> {
    let edited = |mut config: Config| {
        edit(files, &mut config);
        config.timeouts.insert("svidWait".into(), wait.into());
        config
    };
    let agents = (
        Agent::spawn(&trio.lab.a, &edited(trio.mesh.config(&trio.lab.a)))?,
        Agent::spawn(&trio.lab.b, &edited(trio.mesh.config(&trio.lab.b)))?,
    );
    for (agent, pod) in [(&agents.0, "web"), (&agents.1, "api")] {
        agent.wait_ready()?;
        poll::until_true(&format!("{pod} is enrolled"), SOON, || {
            agent.state().is_ok_and(|state| of_pod(&state, pod)["state"] == "enrolled")
        })?;
    }
    Ok(agents)
}

/// What `/state` says of a pod; null where it does not name it.
fn of_pod(state: &Value, name: &str) -> Value {
    let mut pods = state["pods"].as_array().into_iter().flatten();
    pods.find(|pod| pod["workload"] == format!("shop/{name}")).cloned().unwrap_or_default()
}
