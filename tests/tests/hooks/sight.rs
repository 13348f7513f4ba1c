//! What applications see: the real client, services behind virtual addresses, and a network that is otherwise as before.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use sealane_tests::lab::WIRE;
use sealane_tests::report::Event;
use sealane_tests::trio::Trio;
use sealane_tests::wire::Capture;
use serde_json::json;

use crate::{TEXT, accepted_from};

#[test]
fn applications_see_the_real_client_wherever_they_listen() -> Result<()> {
    let trio = Trio::new("client", json!({ "mode": "PERMISSIVE" }))?;
    let (web, api, out) = (&trio.web, &trio.api, &trio.out);
    let (_a, _b) = trio.start()?;
    let (own4, own6) = (api.at(8081), api.at6(8084));
    for (listen, reached) in [
        (own4.to_string(), vec![own4]),
        ("0.0.0.0:8082".into(), vec![api.at(8082)]),
        ("[::]:8083".into(), vec![api.at(8083), api.at6(8083)]),
        (own6.to_string(), vec![own6]),
    ] {
        let server = api.serve_at(&listen, &[])?;
        for (client, to) in [out, web].into_iter().flat_map(|client| reached.iter().map(move |to| (client, *to))) {
            let outcome = client.connect(to, &TEXT)?;
            assert!(outcome.echoed(), "{} to {to}: {outcome:?}", client.name);
            let ip = if to.is_ipv4() { client.at(0).ip() } else { client.at6(0).ip() };
            let event = server
                .wait(Duration::from_secs(5), |event| accepted_from(event).is_some_and(|peer| peer.ip() == ip))?;
            let Event::Accepted { peer, getpeername, local } = event else { unreachable!("accepted") };
            assert_eq!((getpeername, local), (Some(peer), to), "{} on {listen}", client.name);
            if client.name == "out" {
                assert_eq!(Some(peer), outcome.local, "a plaintext client's port is its own");
            }
        }
    }
    // The agent dials what the client dialled: an admin port on loopback stays the pod's own.
    for listen in ["127.0.0.1:8085", "[::1]:8085"] {
        let server = api.serve_at(listen, &[])?;
        for (client, to) in [(out, api.at(8085)), (out, api.at6(8085)), (web, api.at(8085)), (web, api.at6(8085))] {
            let outcome = client.connect(to, &TEXT)?;
            assert!(outcome.refused(), "{} to {to}: {outcome:?}", client.name);
        }
        assert_eq!(server.events().len(), 1, "only that it listens");
    }
    Ok(())
}

#[test]
fn a_service_resolves_to_its_endpoint_and_to_the_caller_itself() -> Result<()> {
    let mut trio = Trio::strict("service")?;
    trio.mesh.service("api", &["172.20.0.10", "fd20::10"], &[(80, 8080)], &[&trio.api])?;
    trio.mesh.service("web", &["172.20.0.11", "fd20::11"], &[(80, 8080)], &[&trio.web])?;
    let (web, api) = (&trio.web, &trio.api);
    let (servers, (a, _b)) = ([api.serve(8080, &[])?, web.serve(8080, &[])?], trio.start()?);
    let veth = Capture::start(&trio.lab.a.netns, &web.veth)?;
    for (server, vips) in servers.iter().zip([["172.20.0.10:80", "[fd20::10]:80"], ["172.20.0.11:80", "[fd20::11]:80"]])
    {
        for vip in vips {
            let to: SocketAddr = vip.parse()?;
            let outcome = web.connect(to, &TEXT)?;
            assert!(outcome.echoed(), "{vip}: {outcome:?}");
            assert_eq!(outcome.peer, Some(to), "the application sees what it dialled");
            let own = if to.is_ipv4() { web.at(0) } else { web.at6(0) };
            server
                .wait(Duration::from_secs(5), |event| accepted_from(event).is_some_and(|peer| peer.ip() == own.ip()))?;
        }
    }
    let trace = veth.stop()?;
    assert!(!trace.contains(TEXT[1].as_bytes())?);
    assert_eq!(trace.to_port(8080).count(), 2, "one to each address of api: {trace:?}");
    let hairpins = a.metrics()?.sum("sealane_connections_opened_total", &[("mode", "hairpin")]);
    assert_eq!(hairpins, 2.0);
    Ok(())
}

#[test]
fn a_pod_that_is_not_enrolled_is_untouched() -> Result<()> {
    let trio = Trio::new("outside", json!({ "mode": "PERMISSIVE" }))?;
    let (web, api, out) = (&trio.web, &trio.api, &trio.out);
    let far = trio.lab.b.pod("far", 13)?;
    let (a, b) = trio.start()?;
    let servers = [out.serve(8080, &[])?, far.serve(8080, &[])?, api.serve(8080, &[])?];
    let [near_server, far_server, api_server] = &servers;
    let wire = Capture::start(&trio.lab.a.netns, WIRE)?;
    for (client, to, server) in [
        (out, far.at(8080), far_server),
        (&far, out.at6(8080), near_server),
        (web, out.at(8080), near_server),
        (web, far.at6(8080), far_server),
        (api, out.at(8080), near_server),
        (out, api.at(8080), api_server),
    ] {
        let outcome = client.connect(to, &TEXT)?;
        assert!(outcome.echoed(), "{} to {to}: {outcome:?}", client.name);
        server.wait(Duration::from_secs(5), |event| accepted_from(event) == outcome.local)?;
    }
    assert!(wire.stop()?.contains(TEXT[1].as_bytes())?);
    // Only the last one met an agent, which says who came in plaintext, and where.
    let to_api = [("direction", "inbound"), ("workload", "shop/api"), ("port", "8080")];
    assert_eq!(b.metrics()?.sum("sealane_plaintext_connections_total", &to_api), 1.0);
    b.wait_access("the plaintext client", |entry| {
        entry["mode"] == "plaintext" && entry["client"].as_str().is_some_and(|client| client.starts_with("10.9.0.12:"))
    })?;
    let opened = |metrics: &sealane_tests::metrics::Metrics| metrics.sum("sealane_connections_opened_total", &[]);
    assert_eq!((opened(&a.metrics()?), opened(&b.metrics()?)), (0.0, 1.0));
    Ok(())
}
