//! What leaves a pod: every kind of client is captured, and what would undo a capture is refused.

use std::time::Duration;

use anyhow::Result;
use sealane_tests::agent::Agent;
use sealane_tests::poll;
use sealane_tests::report::{End, Outcome};
use sealane_tests::trio::Trio;
use sealane_tests::wire::Capture;

use crate::{TEXT, accepted_from};

/// `sealane_common::keys::MARK` and `AGENT_MARK`, as a pod would guess them.
const OUR_BITS: [&str; 3] = ["536870912", "268435456", "805306368"];

#[test]
fn every_kind_of_client_is_captured() -> Result<()> {
    let trio = Trio::strict("kinds")?;
    let (web, api, out) = (&trio.web, &trio.api, &trio.out);
    let server = api.serve(8080, &["--mptcp"])?;
    let _outside = out.serve(8080, &[])?;
    let (a, _b) = trio.start()?;
    // A second link: a socket bound to it is routed by a route of its own.
    web.netns.ip("link add eth1 type veth peer name eth1-peer\nlink set eth1 up\nlink set eth1-peer up\n")?;
    wait_for_routes(&trio, "eth1")?;
    let v4: &[&[&str]] = &[
        &["--kind", "mapped"],
        &["--bind", "10.9.0.10:0"],
        &["--bind", "10.9.0.10:33333"],
        &["--kind", "reuse", "--first", "10.9.0.12:8080"],
        &["--kind", "reuse", "--first", "10.9.1.11:8080", "--first", "10.9.0.12:8080"],
    ];
    let v6: &[&[&str]] = &[&["--bind", "[fd09:0::10]:0"], &["--bind", "[fd09:0::10]:33334"]];
    let both: &[&[&str]] = &[
        &["--kind", "plain"],
        &["--kind", "mptcp"],
        &["--kind", "fastopen-connect"],
        &["--kind", "msg-fastopen"],
        &["--kind", "nonblocking"],
        &["--kind", "uring"],
        &["--kind", "uring-sqpoll"],
        &["--device", "eth0"],
        &["--dontroute"],
        &["--mark", "7"],
        &["--long-option"],
    ];
    let to4 = v4.iter().chain(both).map(|how| (api.at(8080), how));
    let to6 = v6.iter().chain(both).map(|how| (api.at6(8080), how));
    let veth = Capture::start(&trio.lab.a.netns, &web.veth)?;
    let mut markers = Vec::new();
    for (number, (to, how)) in to4.chain(to6).enumerate() {
        let marker = format!("marker number {number} of a captured connection");
        let outcome = web.connect(to, &[&["--text", &marker, "--half-close"], *how].concat())?;
        assert!(outcome.echoed() && outcome.text == marker, "{to} {how:?}: {outcome:?}");
        assert_eq!(outcome.peer, Some(to), "{how:?}");
        markers.push((how, marker));
    }
    // Captured on every link; the answer comes by the one that has the pod's address, which these sockets do not hear.
    let second = Capture::start(&web.netns, "eth1")?;
    for device in ["eth1", "lo"] {
        let outcome = web.connect(api.at(8080), &[&TEXT[..], &["--device", device, "--limit", "700"]].concat())?;
        assert!(!outcome.connected, "{device}: {outcome:?}");
    }
    assert_eq!(second.stop()?.to_port(8080).count(), 0, "a SYN left by the second link");
    // The capture would have shown them.
    assert!(web.connect(out.at(8080), &TEXT)?.echoed());
    let trace = veth.stop()?;
    assert!(trace.contains(TEXT[1].as_bytes())?);
    for (how, marker) in &markers {
        assert!(!trace.contains(marker.as_bytes())?, "{how:?} left in plaintext");
    }
    let own = [web.at(0).ip(), web.at6(0).ip()];
    assert!(
        server.events().iter().filter_map(accepted_from).all(|peer| own.contains(&peer.ip())),
        "{:?}",
        server.events()
    );
    assert!(contained(&a)?, "a new link is no attack");
    Ok(())
}

/// The one answer that each option gives; the connection goes on, captured, without it.
#[test]
fn options_that_would_undo_a_capture_are_refused() -> Result<()> {
    let trio = Trio::strict("options")?;
    let (web, api) = (&trio.web, &trio.api);
    let (a, _b) = trio.start()?;
    let _server = api.serve(8080, &[])?;
    let mut attempts: Vec<Vec<&str>> = OUR_BITS.iter().map(|bits| vec!["--mark", bits]).collect();
    attempts.extend(OUR_BITS[1..].iter().map(|bits| vec!["--mark-after", bits]));
    attempts.push(vec!["--mark-after", "0"]);
    attempts.push(vec!["--kind", "mptcp", "--mark-after", "0"]);
    attempts.push(vec!["--device-after", "eth0"]);
    attempts.push(vec!["--transparent"]);
    let veth = Capture::start(&trio.lab.a.netns, &web.veth)?;
    for to in [api.at(8080), api.at6(8080)] {
        for how in &attempts {
            let outcome = web.connect(to, &[&TEXT[..], how].concat())?;
            assert!(outcome.echoed(), "{to} {how:?}: {outcome:?}");
            assert_eq!(outcome.option_error.as_deref(), Some("EPERM"), "{to} {how:?}");
        }
    }
    for allowed in [&["--mark", "7"][..], &["--device", "eth0"], &["--long-option"]] {
        let outcome = web.connect(api.at(8080), &[&TEXT[..], allowed].concat())?;
        assert!(outcome.echoed() && outcome.option_error.is_none(), "{allowed:?}: {outcome:?}");
    }
    assert!(!veth.stop()?.contains(TEXT[1].as_bytes())?);
    let metrics = a.metrics()?;
    assert_eq!((metrics.kernel("mark_change"), metrics.kernel("option_refused")), (14.0, 4.0));
    Ok(())
}

/// A mark that stayed would send a reused socket's next destination to the agent, and one that is not set would let it out.
#[test]
fn a_reused_socket_follows_its_destination() -> Result<()> {
    let trio = Trio::strict("reuse")?;
    let (web, api, out) = (&trio.web, &trio.api, &trio.out);
    let (_mesh, outside) = (api.serve(8080, &[])?, out.serve(8080, &[])?);
    let (_a, _b) = trio.start()?;
    let (mesh, plain) = (api.at(8080).to_string(), out.at(8080).to_string());
    for (to, firsts, seen) in [
        (out.at(8080), vec![&mesh], true),
        (out.at(8080), vec![&plain, &mesh], true),
        (api.at(8080), vec![&plain], false),
        (api.at(8080), vec![&mesh, &plain], false),
    ] {
        let mut how = vec!["--kind", "reuse"];
        how.extend(firsts.iter().flat_map(|first| ["--first", first.as_str()]));
        let veth = Capture::start(&trio.lab.a.netns, &web.veth)?;
        let outcome = web.connect(to, &[&TEXT[..], &how].concat())?;
        assert!(outcome.echoed(), "{to} after {firsts:?}: {outcome:?}");
        assert_eq!(veth.stop()?.contains(TEXT[1].as_bytes())?, seen, "{to} after {firsts:?}");
        if seen {
            outside.wait(Duration::from_secs(5), |event| accepted_from(event) == outcome.local)?;
        }
    }
    Ok(())
}

/// A documented limit: raw sockets pass every hook; what they send leaves in plaintext, and the peer's STRICT refuses it.
#[test]
fn a_raw_socket_is_refused_by_the_peer() -> Result<()> {
    let trio = Trio::strict("raw")?;
    let (web, api) = (&trio.web, &trio.api);
    let server = api.serve(8080, &[])?;
    let (_a, _b) = trio.start()?;
    let veth = Capture::start(&trio.lab.a.netns, &web.veth)?;
    for (port, end) in [(8080, End::Enough), (81, End::Reset), (15001, End::Reset)] {
        let (to, from) = (api.at(port).to_string(), web.at(23456).to_string());
        let raw: Outcome = web.testpod(&["raw", "--to", &to, "--from", &from, "--text", TEXT[1]])?;
        assert_eq!((raw.end, raw.error), (end, None), "port {port}");
    }
    assert!(
        veth.stop()?.packets.iter().any(|packet| packet.payload == TEXT[1].as_bytes()),
        "the limit is no longer one"
    );
    assert_eq!(server.events().len(), 1, "only that it listens");
    Ok(())
}

/// CAP_NET_ADMIN in the pod can undo the loop: it is restored, and the pod shown as not contained.
#[test]
fn a_rule_that_the_pod_deletes_is_restored_and_shown() -> Result<()> {
    let trio = Trio::strict("contained")?;
    let (web, api) = (&trio.web, &trio.api);
    let _server = api.serve(8080, &[])?;
    let (a, _b) = trio.start()?;
    assert!(contained(&a)?);
    let shown = || {
        let shown = ["rule", "-6 rule", "route show table 24225", "-6 route show table 24225"];
        shown.map(|args| web.netns.ip_show(args).unwrap_or_default())
    };
    let before = shown();
    assert!(before.iter().all(|text| text.contains("24225") || text.contains("local default")), "{before:?}");
    for attack in [
        "rule del fwmark 0x20000000/0x20000000",
        "-6 rule del fwmark 0x20000000/0x20000000",
        "route flush table 24225",
        "-6 route flush table 24225",
    ] {
        web.netns.ip_show(attack)?;
        poll::until_true(&format!("undone: {attack}"), Duration::from_secs(10), || shown() == before)?;
        poll::until_true("shown", Duration::from_secs(5), || contained(&a).is_ok_and(|contained| !contained))?;
    }
    for to in [api.at(8080), api.at6(8080)] {
        assert!(web.connect(to, &TEXT)?.echoed());
    }
    Ok(())
}

/// Whether `/state` says that web never undid its capture.
fn contained(agent: &Agent) -> Result<bool> {
    Ok(agent.state()?["pods"][0]["contained"] == true)
}

fn wait_for_routes(trio: &Trio, link: &str) -> Result<()> {
    poll::until_true("a route over the new link", Duration::from_secs(10), || {
        ["-4", "-6"].iter().all(|family| {
            let routes = trio.web.netns.ip_show(&format!("{family} route show table 24225"));
            routes.is_ok_and(|routes| ["lo", "eth0", link].iter().all(|link| routes.contains(&format!("dev {link} "))))
        })
    })
}
