//! An identity that is taken back, or that nobody renews.

use std::time::Duration;

use anyhow::{Result, ensure};
use sealane_tests::config::spiffe_id;
use sealane_tests::files::Files;
use sealane_tests::lab::WIRE;
use sealane_tests::report::Event;
use sealane_tests::testpod::Server;
use sealane_tests::trio::Trio;
use sealane_tests::wire::Capture;
use serde_json::json;

use crate::{MARKER, SEND, edit, ping, reset, reset_in_the_end, started, wait_identity, wait_open};

#[test]
fn a_withdrawn_identity_ends_what_rests_on_it_and_never_means_plaintext() -> Result<()> {
    let (trio, files, a, b) = started("withdrawn")?;
    let (web, api) = (&trio.web, &trio.api);
    let server = api.serve(8080, &[])?;
    let wire = Capture::start(&trio.lab.a.netns, WIRE)?;
    for (agent, pod, direction) in [(&b, "api", "inbound"), (&a, "web", "outbound")] {
        let open = ping(web, api)?;
        wait_open(agent, pod, 1.0)?;
        files.take(pod)?;
        agent.wait_access("its end", |entry| {
            entry["outcome"] == "identity_changed" && entry["direction"] == direction
        })?;
        reset_in_the_end(open)?;
        wait_identity(agent, pod, "state", &json!("withdrawn"))?;
        let reached = accepted(&server);
        for to in [api.at(8080), api.at6(8080)] {
            agent.refuses(direction, "identity_withdrawn", || reset(&web.connect(to, &SEND)?))?;
        }
        // Plaintext least of all.
        b.refuses("inbound", if pod == "api" { "identity_withdrawn" } else { "not_tls" }, || {
            let outcome = trio.out.connect(api.at(8080), &["--text", "of a stranger", "--half-close"])?;
            ensure!(outcome.refused(), "{outcome:?}");
            Ok(())
        })?;
        assert_eq!(accepted(&server), reached, "{pod}: accepted nothing of it");
        files.give_sound(&[pod])?;
        wait_identity(agent, pod, "state", &json!("ready"))?;
        let outcome = web.connect(api.at(8080), &SEND)?;
        assert!(outcome.echoed(), "{pod} is back: {outcome:?}");
    }
    assert!(!wire.stop()?.contains(MARKER.as_bytes())?, "plaintext on the wire");
    Ok(())
}

/// Even on a port that takes plaintext as well.
#[test]
fn another_id_ends_what_rests_on_the_old_one() -> Result<()> {
    let trio = Trio::new("another", json!({ "mode": "PERMISSIVE" }))?;
    let (web, api, files) = (&trio.web, &trio.api, Files::new(&trio.lab)?);
    files.give_sound(&["web", "api"])?;
    let server = api.serve(8080, &[])?;
    let (a, b) = trio.mesh.start_with(|config| {
        edit(&files, config);
        // So that the application hears of no call that is refused.
        config.timeouts.insert("peek".into(), "10s".into());
    })?;
    let wire = Capture::start(&trio.lab.a.netns, WIRE)?;
    let open = ping(web, api)?;
    wait_open(&b, "api", 1.0)?;
    files.give("api", &files.ca.svid("another")?)?;
    b.wait_access("its end", |entry| entry["outcome"] == "identity_changed")?;
    reset_in_the_end(open)?;
    wait_identity(&b, "api", "spiffeId", &json!(spiffe_id("another")))?;
    a.refuses("outbound", "peer_id_mismatch", || reset(&web.connect(api.at(8080), &SEND)?))?;
    files.take("api")?;
    wait_identity(&b, "api", "state", &json!("withdrawn"))?;
    b.refuses("inbound", "identity_withdrawn", || reset(&web.connect(api.at(8080), &SEND)?))?;
    assert_eq!(accepted(&server), 1, "accepted nothing of it");
    assert!(!wire.stop()?.contains(MARKER.as_bytes())?, "plaintext on the wire");
    Ok(())
}

#[test]
fn an_expired_svid_ends_what_rests_on_it_and_a_new_one_heals() -> Result<()> {
    let (trio, files, a, b) = started("expired")?;
    let (web, api) = (&trio.web, &trio.api);
    let server = api.serve(8080, &[])?;
    let wire = Capture::start(&trio.lab.a.netns, WIRE)?;
    for (agent, pod, direction) in [(&b, "api", "inbound"), (&a, "web", "outbound")] {
        let open = ping(web, api)?;
        wait_open(agent, pod, 1.0)?;
        files.give(pod, &files.ca.short_svid(pod, Duration::from_secs(3))?)?;
        agent.wait_access("its end", |entry| entry["outcome"] == "svid_expired" && entry["direction"] == direction)?;
        reset_in_the_end(open)?;
        wait_identity(agent, pod, "state", &json!("expired"))?;
        let reached = accepted(&server);
        agent.refuses(direction, "svid_expired", || reset(&web.connect(api.at(8080), &SEND)?))?;
        assert_eq!(accepted(&server), reached, "{pod}: accepted nothing of it");
        files.give_sound(&[pod])?;
        wait_identity(agent, pod, "state", &json!("ready"))?;
        let outcome = web.connect(api.at(8080), &SEND)?;
        assert!(outcome.echoed(), "{pod} is healed: {outcome:?}");
    }
    assert!(!wire.stop()?.contains(MARKER.as_bytes())?, "plaintext on the wire");
    Ok(())
}

fn accepted(server: &Server) -> usize {
    server.events().iter().filter(|event| matches!(event, Event::Accepted { .. })).count()
}
