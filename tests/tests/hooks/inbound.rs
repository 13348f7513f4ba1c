//! What reaches a pod: the rows of the classifier, in their order.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;
use sealane_tests::lab::WIRE;
use sealane_tests::pod::Pod;
use sealane_tests::poll;
use sealane_tests::report::{End, Outcome};
use sealane_tests::testpod::{Server, binary};
use sealane_tests::trio::Trio;
use sealane_tests::wire::Capture;
use serde_json::json;

use crate::{TEXT, accepted_from, refused_at_once};

#[test]
fn udp_is_untouched() -> Result<()> {
    let trio = Trio::strict("udp")?;
    let (_a, _b) = trio.start()?;
    // A port of the agent's among them.
    for port in [53, 15001] {
        for (server, clients) in [(&trio.api, [&trio.web, &trio.out]), (&trio.out, [&trio.web, &trio.api])] {
            let _server = Server::start(server.command(binary("testpod")?), "udp-serve", &format!("[::]:{port}"), &[])?;
            for (client, to) in
                clients.into_iter().flat_map(|client| [(client, server.at(port)), (client, server.at6(port))])
            {
                let address = to.to_string();
                for connect in [&["--connect"][..], &[]] {
                    let outcome: Outcome =
                        client.testpod(&[&["udp", "--to", &address, "--text", "x"], connect].concat())?;
                    assert_eq!(
                        (outcome.text.as_str(), outcome.end),
                        ("x", End::Enough),
                        "{} {to} {connect:?}",
                        client.name
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_agents_own_ports_are_refused_but_the_same_ports_elsewhere_are_not() -> Result<()> {
    let trio = Trio::strict("ports")?;
    let elsewhere = trio.out.serve(15001, &[])?;
    let (a, b) = trio.start()?;
    let (web, api, out) = (&trio.web, &trio.api, &trio.out);
    for port in 15001..=15004 {
        for to in [api.at(port), api.at6(port)] {
            let outcome = out.connect(to, &TEXT)?;
            assert!(refused_at_once(&outcome), "from another pod to {to}: {outcome:?}");
            let outcome = web.connect(to, &TEXT)?;
            assert!(outcome.refused(), "from an enrolled pod to {to}: {outcome:?}");
        }
        let loopback = [SocketAddr::from(([127, 0, 0, 1], port)), (Ipv6Addr::LOCALHOST, port).into()];
        for to in loopback.into_iter().chain([api.at(port), api.at6(port)]) {
            let outcome = api.connect(to, &TEXT)?;
            assert!(refused_at_once(&outcome), "from the pod itself to {to}: {outcome:?}");
        }
    }
    for client in [web, api] {
        assert!(client.connect(out.at(15001), &TEXT)?.echoed(), "{}", client.name);
    }
    drop(elsewhere);
    assert!(b.metrics()?.kernel("agent_port") >= 32.0, "{:?}", b.metrics()?.lines("sealane_kernel"));
    for metrics in [a.metrics()?, b.metrics()?] {
        assert_eq!(metrics.sum("sealane_connections_refused_total", &[("reason", "loop_detected")]), 0.0);
        assert_eq!(metrics.sum("sealane_connections_opened_total", &[]), 0.0);
    }
    Ok(())
}

#[test]
fn a_pod_reaches_itself_in_plaintext() -> Result<()> {
    let trio = Trio::strict("self")?;
    let (_a, b) = trio.start()?;
    let api = &trio.api;
    let server = api.serve(8080, &[])?;
    let _local = api.serve_at("127.0.0.1:8081", &[])?;
    for to in ["127.0.0.1:8080", "127.9.9.9:8080", "[::1]:8080", "127.0.0.1:8081"].map(str::parse) {
        let to = to?;
        assert!(api.connect(to, &TEXT)?.echoed(), "{to}");
    }
    for to in [api.at(8080), api.at6(8080)] {
        let outcome = api.connect(to, &TEXT)?;
        assert!(outcome.echoed(), "{to}: {outcome:?}");
        server.wait(Duration::from_secs(5), |event| accepted_from(event) == outcome.local)?;
    }
    let metrics = b.metrics()?;
    assert_eq!(metrics.sum("sealane_connections_opened_total", &[]), 0.0);
    assert_eq!(metrics.kernel("captured"), 0.0);
    Ok(())
}

/// The classifier knows the pod's addresses from netlink, so one that comes later is the pod's as the first ones are; an order
/// of rows that takes an unknown one for outbound makes the agent dial itself without end.
#[test]
fn addresses_that_come_later_and_link_local_ones_are_captured() -> Result<()> {
    let trio = Trio::strict("later")?;
    let (web, api, out, lab) = (&trio.web, &trio.api, &trio.out, &trio.lab);
    let later: [IpAddr; 2] = ["10.9.1.77".parse()?, "fd09:1::77".parse()?];
    let (a, b) = trio.mesh.start_with(|config| {
        config.peers.iter_mut().filter(|peer| peer.name == "api").for_each(|peer| peer.ips.extend(later));
    })?;
    let server = api.serve(8080, &[])?;
    lab.b.netns.ip(&format!("route add 10.9.1.77 dev {0}\nroute add fd09:1::77 dev {0}\n", api.veth))?;
    api.netns.ip("addr add 10.9.1.77/32 dev eth0\naddr add fd09:1::77/128 dev eth0 nodad\n")?;
    for to in later.map(|ip| SocketAddr::new(ip, 8080)) {
        let arrives = || web.connect(to, &TEXT).is_ok_and(|outcome| outcome.echoed());
        poll::until_true("mTLS reaches the later address", Duration::from_secs(10), arrives)?;
        let client = if to.is_ipv4() { web.at(0) } else { web.at6(0) };
        server
            .wait(Duration::from_secs(5), |event| accepted_from(event).is_some_and(|peer| peer.ip() == client.ip()))?;
        let outcome = out.connect(to, &TEXT)?;
        assert!(outcome.connected && outcome.refused(), "plaintext to {to}: {outcome:?}");
    }
    let outcome = lab.b.connect(link_local(api, 8080)?, &TEXT)?;
    assert!(outcome.connected && outcome.refused(), "plaintext to the link-local address: {outcome:?}");
    b.wait_access("plaintext to the link-local address", |entry| {
        entry["outcome"] == "not_tls" && entry["destination"].as_str().is_some_and(|to| to.starts_with("[fe80::"))
    })?;
    let metrics = b.metrics()?;
    assert_eq!(metrics.refused("inbound", "not_tls"), 3.0, "{:?}", metrics.lines("sealane_connections"));
    for metrics in [metrics, a.metrics()?] {
        assert_eq!(metrics.sum("sealane_connections_refused_total", &[("reason", "loop_detected")]), 0.0);
    }

    // The agent dials a link-local address with its scope; web, without a policy, takes plaintext.
    let server = web.serve(8080, &[])?;
    let outcome = lab.a.connect(link_local(web, 8080)?, &TEXT)?;
    assert!(outcome.echoed(), "{outcome:?}");
    let client = outcome.local.context("connected")?;
    server.wait(Duration::from_secs(5), |event| {
        accepted_from(event).is_some_and(|peer| (peer.ip(), peer.port()) == (client.ip(), client.port()))
    })?;
    Ok(())
}

/// The listening set: it follows listen() and close, and knows what listened before the enrolment.
#[test]
fn a_closed_port_refuses_at_once() -> Result<()> {
    let trio = Trio::strict("closed")?;
    let (web, api, out) = (&trio.web, &trio.api, &trio.out);
    let before = [api.serve(8081, &[])?, web.serve(8081, &[])?];
    let (_a, _b) = trio.start()?;
    for (pod, strict, before) in [(api, true, &before[0]), (web, false, &before[1])] {
        let name = &pod.name;
        let open = |outcome: &Outcome| outcome.connected && if strict { outcome.refused() } else { outcome.echoed() };
        for to in [pod.at(81), pod.at6(81)] {
            let outcome = out.connect(to, &TEXT)?;
            assert!(refused_at_once(&outcome), "{to}, where nothing ever listened: {outcome:?}");
        }
        let outcome = out.connect(pod.at(8081), &TEXT)?;
        assert!(open(&outcome), "{name}, listening since before the enrolment: {outcome:?}");
        for round in 0..3 {
            let server = pod.serve(8082, &[])?;
            let outcome = out.connect(pod.at(8082), &TEXT)?;
            assert!(open(&outcome), "{name}, round {round}: {outcome:?}");
            drop(server);
            let outcome = out.connect(pod.at(8082), &TEXT)?;
            assert!(refused_at_once(&outcome), "{name}, closed, round {round}: {outcome:?}");
        }
        let both = [pod.serve_at(&pod.at(8083).to_string(), &[])?, pod.serve_at("127.0.0.1:8083", &[])?];
        let [reachable, local] = both;
        drop(local);
        let outcome = out.connect(pod.at(8083), &TEXT)?;
        assert!(open(&outcome), "{name}, one of two listeners closed: {outcome:?}");
        drop(reachable);
        assert!(refused_at_once(&out.connect(pod.at(8083), &TEXT)?), "{name}, both closed");
        let _ = before;
    }
    let outcome = web.connect(api.at(81), &TEXT)?;
    assert!(outcome.refused(), "through the mesh: {outcome:?}");
    drop(before);
    for pod in [api, web] {
        poll::until_true("a listener of before the enrolment is missed", Duration::from_secs(10), || {
            out.connect(pod.at(8081), &TEXT).is_ok_and(|outcome| refused_at_once(&outcome))
        })?;
    }
    Ok(())
}

#[test]
fn a_disabled_port_is_left_alone() -> Result<()> {
    let trio = Trio::new("disabled", json!({ "mode": "STRICT", "ports": [{ "port": 9100, "mode": "DISABLED" }] }))?;
    let (web, api, out) = (&trio.web, &trio.api, &trio.out);
    let (a, b) = trio.start()?;
    let (server, _strict) = (api.serve(9100, &[])?, api.serve(8080, &[])?);
    let wire = Capture::start(&trio.lab.a.netns, WIRE)?;
    for (client, to) in [(out, api.at(9100)), (out, api.at6(9100)), (web, api.at(9100)), (web, api.at6(9100))] {
        let outcome = client.connect(to, &TEXT)?;
        assert!(outcome.echoed(), "{} to {to}: {outcome:?}", client.name);
        server.wait(Duration::from_secs(5), |event| accepted_from(event) == outcome.local)?;
    }
    assert!(wire.stop()?.contains(TEXT[1].as_bytes())?);
    assert!(out.connect(api.at(8080), &TEXT)?.refused());
    for metrics in [a.metrics()?, b.metrics()?] {
        assert_eq!(metrics.sum("sealane_connections_opened_total", &[]), 0.0);
    }
    Ok(())
}

/// The pod's link-local address, as its node dials it.
fn link_local(pod: &Pod, port: u16) -> Result<SocketAddr> {
    let shown = pod.netns.ip_show("-6 -o addr show dev eth0 scope link")?;
    let ip = shown.split_whitespace().find_map(|word| word.strip_suffix("/64")).context("no link-local address")?;
    let scope = pod.node.netns.run(|| Ok(if_nametoindex(pod.veth.as_str())?))?;
    Ok(SocketAddrV6::new(ip.parse()?, port, 0, scope).into())
}
