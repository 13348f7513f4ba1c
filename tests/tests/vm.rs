//! What hangs on the kernel: the programs load, attach and stay pinned, every row of the classifier holds, and so does the
//! guard. Runs here as any other test, and on older kernels by `cargo xtask vm`, where no hardware helps: so few and small.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use sealane_tests::agent::{self, Agent, PATIENCE};
use sealane_tests::config::Mesh;
use sealane_tests::lab::{Lab, Node, WIRE};
use sealane_tests::pod::Pod;
use sealane_tests::poll;
use sealane_tests::report::{End, Event, Outcome, Pings};
use sealane_tests::testpod::{Server, binary};
use sealane_tests::wire::{Capture, Trace, tls};
use serde_json::json;

const MARKER: &str = "a-secret-of-the-application";
const SEND: [&str; 3] = ["--text", MARKER, "--half-close"];

/// The port's mode is the workload's, STRICT.
const STRICT: u16 = 8080;
const PERMISSIVE: u16 = 8081;
const DISABLED: u16 = 8082;
const CLOSED: u16 = 8083;

/// `web` on node-a calls `api` on node-b, which is STRICT; `plain` on node-a is not enrolled.
struct Scene {
    a: Agent,
    b: Agent,
    web: Pod,
    api: Pod,
    plain: Pod,
    mesh: Mesh,
    lab: Lab,
}

impl Scene {
    fn set(name: &str) -> Result<Self> {
        let lab = Lab::new(name)?;
        let (web, plain, api) = (lab.a.pod("web", 10)?, lab.a.pod("plain", 20)?, lab.b.pod("api", 11)?);
        let mut mesh = Mesh::new(&lab);
        mesh.enrol(&web);
        mesh.enrol(&api);
        let ports = json!([{ "port": PERMISSIVE, "mode": "PERMISSIVE" }, { "port": DISABLED, "mode": "DISABLED" }]);
        mesh.policy("api", json!({ "listener": { "mode": "STRICT", "ports": ports } }));
        let (a, b) = mesh.start()?;
        Ok(Self { a, b, web, api, plain, mesh, lab })
    }
}

#[test]
fn every_family_and_kind_is_captured_and_encrypted() -> Result<()> {
    let scene = Scene::set("families")?;
    let Scene { web, api, lab, .. } = &scene;
    let server = api.serve(STRICT, &[])?;
    for kind in ["plain", "mapped", "mptcp", "uring"] {
        for to in [api.at(STRICT), api.at6(STRICT)] {
            let wire = Capture::start(&lab.a.netns, WIRE)?;
            let outcome = web.connect(to, &[&SEND[..], &["--kind", kind]].concat())?;
            assert!(outcome.echoed() && outcome.peer == Some(to), "{kind} {to}: {outcome:?}");
            assert_encrypted(&wire.stop()?, STRICT)?;
        }
    }
    let families: Vec<_> = clients(&server, 8)?.iter().map(|client| client.ip()).collect();
    assert_eq!(families, [IpAddr::V4(web.v4), IpAddr::V6(web.v6)].repeat(4));
    Ok(())
}

#[test]
fn strict_refuses_plaintext_and_closed_ports() -> Result<()> {
    let scene = Scene::set("strict")?;
    let Scene { b, web, api, plain, lab, .. } = &scene;
    let server = api.serve(STRICT, &[])?;
    for to in [api.at(STRICT), api.at6(STRICT)] {
        for (who, outcome) in [("pod", plain.connect(to, &SEND)?), ("node", lab.b.connect(to, &SEND)?)] {
            assert!(outcome.refused(), "{who} {to}: {outcome:?}");
        }
        b.wait_access("the refusal", |line| line["destination"] == to.to_string() && line["outcome"] == "not_tls")?;
    }
    for to in [api.at(CLOSED), api.at6(CLOSED)] {
        let outcome = plain.connect(to, &SEND)?;
        assert_eq!((outcome.error.as_deref(), outcome.end), (Some("ECONNREFUSED"), End::Never), "{to}");
        assert!(web.connect(to, &SEND)?.refused(), "{to}");
    }
    assert!(!server.events().iter().any(|event| matches!(event, Event::Accepted { .. })), "{:?}", server.events());
    Ok(())
}

#[test]
fn permissive_and_disabled_ports_take_plaintext() -> Result<()> {
    let scene = Scene::set("modes")?;
    let Scene { web, api, plain, lab, .. } = &scene;
    for (port, from_web_encrypted) in [(PERMISSIVE, true), (DISABLED, false)] {
        for to in [api.at(port), api.at6(port)] {
            let server = api.serve(port, &[])?;
            let outcome = plain.connect(to, &SEND)?;
            assert!(outcome.echoed(), "{to}: {outcome:?}");
            let wire = Capture::start(&lab.a.netns, WIRE)?;
            let captured = web.connect(to, &SEND)?;
            assert!(captured.echoed(), "{to}: {captured:?}");
            let shown = clients(&server, 2)?;
            assert_eq!(Some(shown[0]), outcome.local);
            assert_eq!(Some(shown[1].ip()), captured.local.map(|client| client.ip()));
            let trace = wire.stop()?;
            if from_web_encrypted {
                assert_encrypted(&trace, port)?;
            } else {
                assert!(trace.contains(MARKER.as_bytes())?, "{to}: a DISABLED port is not the mesh's");
            }
        }
    }
    Ok(())
}

#[test]
fn the_pod_itself_other_destinations_and_udp_are_left_alone() -> Result<()> {
    let scene = Scene::set("alone")?;
    let Scene { a, b, web, api, plain, .. } = &scene;
    let (own, other) = (api.serve(STRICT, &[])?, plain.serve(STRICT, &[])?);
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, STRICT));
    let mut local = Vec::new();
    for to in [api.at(STRICT), api.at6(STRICT), loopback, format!("[::1]:{STRICT}").parse()?] {
        let outcome = api.connect(to, &SEND)?;
        assert!(outcome.echoed(), "{to}: {outcome:?}");
        local.extend(outcome.local);
    }
    assert_eq!(clients(&own, 4)?, local);
    local.clear();
    for to in [plain.at(STRICT), plain.at6(STRICT)] {
        let outcome = web.connect(to, &SEND)?;
        assert!(outcome.echoed(), "{to}: {outcome:?}");
        local.extend(outcome.local);
    }
    assert_eq!(clients(&other, 2)?, local);
    let _udp = Server::start(api.command(binary("testpod")?), "udp-serve", "[::]:53", &[])?;
    let udp: Outcome = web.testpod(&["udp", "--to", &api.at(53).to_string(), "--text", "x"])?;
    assert_eq!((udp.text.as_str(), udp.end), ("x", End::Enough));
    // A connection that an agent does carry, so that silence about the others means something.
    assert!(web.connect(api.at(STRICT), &SEND)?.echoed());
    for agent in [a, b] {
        agent.wait_access("the captured connection", |line| line["client"].as_str().is_some_and(is_of(web)))?;
        assert_eq!(agent.access().len(), 1, "{:?}", agent.access());
    }
    Ok(())
}

#[test]
fn the_agents_ports_are_closed_to_everybody() -> Result<()> {
    let scene = Scene::set("ports")?;
    let Scene { api, plain, .. } = &scene;
    let ports = listening(api)?;
    assert_eq!(ports.len(), 2, "inbound and outbound: {ports:?}");
    for port in ports {
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        for (from, to) in [
            (plain, api.at(port)),
            (plain, api.at6(port)),
            (api, api.at(port)),
            (api, loopback),
            (api, format!("[::1]:{port}").parse()?),
        ] {
            let outcome = from.connect(to, &SEND)?;
            assert_eq!(outcome.error.as_deref(), Some("ECONNREFUSED"), "{} to {to}: {outcome:?}", from.name);
        }
    }
    Ok(())
}

#[test]
fn the_guard_keeps_captured_sockets_captured() -> Result<()> {
    let scene = Scene::set("guard")?;
    let Scene { web, api, plain, lab, .. } = &scene;
    let (_server, _other) = (api.serve(STRICT, &[])?, plain.serve(STRICT, &[])?);
    let wire = Capture::start(&lab.a.netns, WIRE)?;
    for (options, refusal) in [
        (&["--mark-after", "0"][..], Some("EPERM")),
        (&["--device-after", "eth0"], Some("EPERM")),
        (&["--transparent"], Some("EPERM")),
        (&["--mark", "7"], None),
        (&["--device", "eth0"], None),
        (&["--kind", "reuse", "--first", &plain.at(STRICT).to_string()], None),
    ] {
        let outcome = web.connect(api.at(STRICT), &[&SEND[..], options].concat())?;
        assert!(outcome.echoed(), "{options:?}: {outcome:?}");
        assert_eq!(outcome.option_error.as_deref(), refusal, "{options:?}");
    }
    let foreign = web.connect(api.at(STRICT), &["--bind", "127.0.0.1:0", "--limit", "500"])?;
    assert!(!foreign.connected, "{foreign:?}");
    assert_encrypted(&wire.stop()?, STRICT)?;
    let free = plain.connect(plain.at(STRICT), &[&SEND[..], &["--mark-after", "0"]].concat())?;
    assert_eq!((free.echoed(), free.option_error), (true, None), "the guard is for enrolled pods alone");
    Ok(())
}

#[test]
fn a_second_agent_takes_over_with_a_connection_open() -> Result<()> {
    let scene = Scene::set("takeover")?;
    let Scene { a, b, web, api, mesh, lab, .. } = &scene;
    let server = api.serve(STRICT, &[])?;
    let ping = web.start_testpod(&["ping", "--to", &api.at(STRICT).to_string(), "--until-stdin"])?;
    server.wait(PATIENCE, |event| matches!(event, Event::Accepted { .. }))?;
    let (a2, b2) = (successor(&lab.a, mesh)?, successor(&lab.b, mesh)?);
    for to in [api.at(STRICT), api.at6(STRICT)] {
        let outcome = web.connect(to, &SEND)?;
        assert!(outcome.echoed(), "{to}: {outcome:?}");
        for agent in [&a2, &b2] {
            agent.wait_access("the new connection", |line| line["destination"] == to.to_string())?;
        }
    }
    assert_eq!(
        (a.access(), b.access()),
        (vec![], vec![]),
        "the old connection is still open, and the only one of the old agents"
    );
    let pings: Pings = ping.result()?;
    assert!(pings.connected && pings.error.is_none(), "{pings:?}");
    for agent in [a, b] {
        agent.wait_access("the old connection", |line| line["destination"] == api.at(STRICT).to_string())?;
        assert_eq!(agent.access().len(), 1, "{:?}", agent.access());
    }
    Ok(())
}

#[test]
fn pins_hold_without_an_agent_and_uninstall_leaves_nothing() -> Result<()> {
    let lab = Lab::new("pins")?;
    let (web, plain, api) = (lab.a.pod("web", 10)?, lab.a.pod("plain", 20)?, lab.b.pod("api", 11)?);
    let mut mesh = Mesh::new(&lab);
    mesh.enrol(&web);
    mesh.enrol(&api);
    mesh.policy("api", json!({ "listener": { "mode": "STRICT" } }));
    let untouched = [settings(&web)?, settings(&api)?];
    let (mut a, mut b) = mesh.start()?;
    let server = api.serve(STRICT, &[])?;
    assert!(web.connect(api.at(STRICT), &SEND)?.echoed());
    assert_ne!([settings(&web)?, settings(&api)?], untouched);
    a.kill()?;
    b.kill()?;

    let seen = server.events().len();
    let wire = Capture::start(&lab.a.netns, WIRE)?;
    for to in [api.at(STRICT), api.at6(STRICT)] {
        // Version 4 retries its SYN; to version 6 the kernel answers with a reset.
        let captured = web.connect(to, &["--limit", "500"])?;
        assert!(!captured.connected, "{to}: {captured:?}");
        let refused = plain.connect(to, &SEND)?;
        assert_eq!(refused.error.as_deref(), Some("ECONNREFUSED"), "{to}: {refused:?}");
    }
    let from_web = is_of(&web);
    assert!(wire.stop()?.to_port(STRICT).all(|flow| !from_web(&flow.src.to_string())));
    assert_eq!(server.events().len(), seen, "{:?}", server.events());

    for node in [&lab.a, &lab.b] {
        assert!(node.bpffs.exists());
        agent::uninstall(node)?;
        assert!(!node.bpffs.exists(), "{}", node.bpffs.display());
    }
    assert_eq!([settings(&web)?, settings(&api)?], untouched);
    let outcome = web.connect(api.at(STRICT), &[&SEND[..], &["--mark-after", "0"]].concat())?;
    assert_eq!((outcome.echoed(), outcome.option_error.as_deref()), (true, None), "{outcome:?}");
    assert_eq!(clients(&server, 2)?.last().copied(), outcome.local);
    Ok(())
}

/// Another agent beside the node's first one, as an upgrade starts it.
fn successor(node: &Arc<Node>, mesh: &Mesh) -> Result<Agent> {
    let config = mesh.config(node);
    let cgroup = node.cgroup().join("successor");
    fs::create_dir(&cgroup)?;
    let agent = Agent::spawn_in(node, &config, &cgroup)?;
    // By its log: as long as the first one answers at the admin address too, a GET may reach either.
    poll::until_true("the successor serves the node's pod", PATIENCE, || {
        let log = agent.log();
        ["enrolled", "SVID"].iter().all(|message| log.iter().any(|line| line["message"] == *message))
    })?;
    Ok(agent)
}

/// Every stream towards the port begins with a ClientHello, and none has the marker in it.
fn assert_encrypted(trace: &Trace, port: u16) -> Result<()> {
    ensure!(trace.to_port(port).count() > 0, "nothing went to port {port}");
    for flow in trace.to_port(port) {
        let hello = tls::read(flow).and_then(|tls| tls.hello).with_context(|| format!("no TLS: {flow:?}"))?;
        ensure!(hello.client, "{hello:?}");
    }
    ensure!(!trace.contains(MARKER.as_bytes())?, "the marker is on the wire");
    Ok(())
}

/// Waits for the server's `count`th connection; the clients as accept(2) and getpeername(2), which agree, reported them.
fn clients(server: &Server, count: usize) -> Result<Vec<SocketAddr>> {
    let mut clients = Vec::new();
    poll::until_true("the server's connections", PATIENCE, || {
        clients = server.events().iter().filter_map(accepted).collect();
        clients.len() >= count
    })
    .with_context(|| format!("{:?}", server.events()))?;
    ensure!(clients.iter().all(|(accept, getpeername)| *getpeername == Some(*accept)), "{clients:?}");
    Ok(clients.into_iter().map(|(accept, _)| accept).collect())
}

fn accepted(event: &Event) -> Option<(SocketAddr, Option<SocketAddr>)> {
    match event {
        Event::Accepted { peer, getpeername, .. } => Some((*peer, *getpeername)),
        Event::Listening { .. } | Event::Closed { .. } => None,
    }
}

/// True for a socket address of the pod's.
fn is_of(pod: &Pod) -> impl Fn(&str) -> bool {
    let own = [IpAddr::V4(pod.v4), IpAddr::V6(pod.v6)];
    move |text| text.parse::<SocketAddr>().is_ok_and(|addr| own.contains(&addr.ip()))
}

/// The ports that listen in the pod's network namespace.
fn listening(pod: &Pod) -> Result<Vec<u16>> {
    const LISTEN: &str = "0A";
    let tables = pod.netns.run(|| {
        let read = |family| fs::read_to_string(format!("/proc/thread-self/net/{family}"));
        Ok(read("tcp")? + &read("tcp6")?)
    })?;
    let fields = tables.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let ports = fields
        .filter(|fields| fields.get(3) == Some(&LISTEN))
        .filter_map(|fields| u16::from_str_radix(fields[1].rsplit_once(':')?.1, 16).ok());
    Ok(ports.collect())
}

/// Everything of the pod's network namespace that an agent changes: rules, routes, settings.
fn settings(pod: &Pod) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for family in ["-4", "-6"] {
        for what in [&["rule"][..], &["route", "show", "table", "all"]] {
            let out = pod.netns.command("ip").arg(family).args(what).output()?;
            ensure!(out.status.success(), "ip {what:?}: {}", String::from_utf8_lossy(&out.stderr));
            lines.extend(String::from_utf8(out.stdout)?.lines().map(|line| format!("{family} {line}")));
        }
    }
    lines.sort();
    const KEYS: [&str; 5] = [
        "ipv4/ip_local_port_range",
        "ipv4/ip_local_reserved_ports",
        "ipv4/tcp_tw_reuse",
        "ipv4/fwmark_reflect",
        "ipv6/fwmark_reflect",
    ];
    for key in KEYS {
        let value = pod.netns.run(|| Ok(fs::read_to_string(format!("/proc/sys/net/{key}"))?))?;
        lines.push(format!("{key} {}", value.trim()));
    }
    Ok(lines)
}
