//! PERMISSIVE and STRICT ports of one workload.

use anyhow::Result;
use sealane_tests::agent::Agent;
use sealane_tests::report::{End, Outcome};
use serde_json::json;

use crate::{MARKER, SEND, SOON, Scene, accepted, reset};

#[test]
fn a_permissive_port_takes_both_and_counts_plaintext_and_a_strict_one_does_not() -> Result<()> {
    let ports = json!([{ "port": 8082, "mode": "STRICT" }, { "port": 8083, "mode": "STRICT" }]);
    let scene = Scene::new("modes", json!({ "mode": "PERMISSIVE", "ports": ports }))?;
    let (web, api, out) = (&scene.trio.web, &scene.trio.api, &scene.trio.out);
    let first = ["--mode", "first", "--text", "the server begins"];
    let servers = [api.serve(8080, &[])?, api.serve(8081, &first)?, api.serve(8082, &[])?, api.serve(8083, &first)?];
    let (_a, b) = scene.trio.mesh.start_with(|config| {
        scene.edit(config);
        // A client's hello may take that long where the machine is busy; a server that speaks first has then not begun.
        config.timeouts.insert("peek".into(), "3s".into());
    })?;
    let (says, hears): (&[&str], &[&str]) = (&SEND, &["--expect", "17"]);
    for (at, port) in [api.at(0), api.at6(0)].into_iter().flat_map(|at| (8080..8084).map(move |port| (at.ip(), port))) {
        let to = (at, port).into();
        let (args, answer) = if port % 2 == 0 { (says, MARKER) } else { (hears, "the server begins") };
        let good = |outcome: &Outcome| outcome.text == answer && matches!(outcome.end, End::Eof | End::Enough);
        let before = [plaintext(&b, port)?, mtls(&b)?];

        let outcome = web.connect(to, args)?;
        assert!(good(&outcome), "mTLS to {to}: {outcome:?}");
        assert_eq!([plaintext(&b, port)?, mtls(&b)?], [before[0], before[1] + 1.0], "mTLS to {to}");

        if port < 8082 {
            let outcome = out.connect(to, args)?;
            assert!(good(&outcome), "plaintext to {to}: {outcome:?}");
            assert_eq!([plaintext(&b, port)?, mtls(&b)?], [before[0] + 1.0, before[1] + 1.0], "plaintext to {to}");
        } else {
            b.refuses("inbound", "not_tls", || reset(&out.connect(to, &SEND)?))?;
            assert_eq!(plaintext(&b, port)?, 0.0, "{to}");
        }
    }
    // One by each family, and on the first two ports by each client.
    for (server, count) in servers.iter().zip([4, 4, 2, 2]) {
        server.wait(SOON, |_| accepted(server) >= count)?;
        assert_eq!(accepted(server), count);
    }
    Ok(())
}

/// Plaintext connections that the agent has carried to this port.
fn plaintext(agent: &Agent, port: u16) -> Result<f64> {
    let port = port.to_string();
    let labels = [("direction", "inbound"), ("workload", "shop/api"), ("port", &port)];
    Ok(agent.metrics()?.sum("sealane_plaintext_connections_total", &labels))
}

fn mtls(agent: &Agent) -> Result<f64> {
    Ok(agent.metrics()?.sum("sealane_connections_opened_total", &[("direction", "inbound"), ("mode", "mtls")]))
}
