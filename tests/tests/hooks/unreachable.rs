//! Fail closed: addresses that are not the pod's, and an agent that is not there.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use sealane_tests::lab::WIRE;
use sealane_tests::poll;
use sealane_tests::report::End;
use sealane_tests::trio::Trio;
use sealane_tests::wire::Capture;

use crate::{TEXT, refused_at_once};

/// Under PERMISSIVE too: an application that listens on all addresses would get plaintext on addresses that no policy knows.
#[test]
fn a_local_address_that_is_not_configured_is_refused() -> Result<()> {
    let trio = Trio::strict("anyip")?;
    let (web, out, a) = (&trio.web, &trio.out, &trio.lab.a);
    let _server = web.serve(8080, &[])?;
    // Reachable without being configured: AnyIP, and loopback from outside with route_localnet.
    let veth = &web.veth;
    a.netns.ip(&format!("route add 10.9.0.99 dev {veth}\nroute add fd09:0::99 via {} dev {veth}\n", web.v6))?;
    web.netns.ip("route add local 10.9.0.99 dev lo\nroute add local fd09:0::99 dev lo\n")?;
    a.netns.ip(&format!("route add unicast 127.9.9.9 dev {} table local src {}\n", web.veth, a.v4))?;
    a.netns.sysctl(&format!("net/ipv4/conf/{}/route_localnet", web.veth), "1")?;
    web.netns.sysctl("net/ipv4/conf/eth0/route_localnet", "1")?;
    let addresses: [SocketAddr; 3] =
        ["10.9.0.99:8080".parse()?, "[fd09:0::99]:8080".parse()?, "127.9.9.9:8080".parse()?];
    let connect = |to: SocketAddr| if to.ip().is_loopback() { a.connect(to, &TEXT) } else { out.connect(to, &TEXT) };
    for to in addresses {
        let outcome = connect(to)?;
        assert!(outcome.echoed(), "before the enrolment, {to}: {outcome:?}");
    }
    let (agent, _b) = trio.start()?;
    assert!(out.connect(web.at(8080), &TEXT)?.echoed());
    for to in addresses {
        let outcome = connect(to)?;
        assert!(refused_at_once(&outcome), "{to}: {outcome:?}");
    }
    let metrics = agent.metrics()?;
    assert_eq!((metrics.kernel("foreign_source"), metrics.kernel("unknown_local")), (2.0, 1.0));
    Ok(())
}

/// A marked SYN with a source that the agent does not know must reach neither listener: the outbound one would lend it the
/// pod's identity, the inbound one would dial in plaintext.
#[test]
fn a_captured_connection_from_a_foreign_source_is_dropped() -> Result<()> {
    let trio = Trio::strict("foreign")?;
    let (web, api) = (&trio.web, &trio.api);
    let (a, b) = trio.start()?;
    let server = api.serve(8080, &[])?;
    for key in ["ipv4", "ipv6"] {
        web.netns.sysctl(&format!("net/{key}/ip_nonlocal_bind"), "1")?;
    }
    let veth = Capture::start(&trio.lab.a.netns, &web.veth)?;
    for (to, source) in
        [(api.at(8080), "127.0.0.1:0"), (api.at(8080), "10.9.0.99:0"), (api.at6(8080), "[fd09:0::99]:0")]
    {
        let outcome = web.connect(to, &[&TEXT[..], &["--bind", source, "--limit", "700"]].concat())?;
        assert!(!outcome.connected && outcome.end == End::Never, "{source}: {outcome:?}");
    }
    assert!(web.connect(api.at(8080), &["--text", "encrypted", "--half-close"])?.echoed());
    let trace = veth.stop()?;
    assert!(!trace.contains(TEXT[1].as_bytes())? && trace.to_port(8080).count() == 1, "{trace:?}");
    let metrics = a.metrics()?;
    // The kernel itself drops the IPv6 one, which it cannot route.
    assert!(metrics.kernel("foreign_source") >= 2.0, "{:?}", metrics.lines("sealane_kernel"));
    assert_eq!(b.metrics()?.sum("sealane_connections_refused_total", &[]), 0.0);
    assert_eq!(server.events().len(), 3);
    Ok(())
}

/// The redirection outlives the agent, so that its death opens nothing; what is not the mesh's notices nothing.
#[test]
fn without_an_agent_nothing_passes_in_plaintext() -> Result<()> {
    let trio = Trio::strict("dead")?;
    let (web, api, out) = (&trio.web, &trio.api, &trio.out);
    let (mut a, mut b) = trio.start()?;
    let (server, own, _outside) = (api.serve(8080, &[])?, web.serve(8080, &[])?, out.serve(8080, &[])?);
    a.kill()?;
    b.kill()?;
    let veth = Capture::start(&trio.lab.a.netns, &web.veth)?;
    let wire = Capture::start(&trio.lab.a.netns, WIRE)?;
    for to in [api.at(8080), api.at6(8080), web.at(8080), web.at6(8080)] {
        let outcome = out.connect(to, &TEXT)?;
        assert!(refused_at_once(&outcome), "from outside to {to}: {outcome:?}");
    }
    for to in [api.at(8080), api.at6(8080)] {
        let outcome = web.connect(to, &[&TEXT[..], &["--limit", "700"]].concat())?;
        assert!(!outcome.connected, "from an enrolled pod to {to}: {outcome:?}");
    }
    for trace in [veth.stop()?, wire.stop()?] {
        assert!(!trace.contains(TEXT[1].as_bytes())?);
    }
    assert_eq!((server.events().len(), own.events().len()), (1, 1), "only that they listen");
    assert!(web.connect(out.at(8080), &TEXT)?.echoed(), "to a pod that is not the mesh's");
    assert!(web.connect(web.at(8080), &TEXT)?.echoed(), "to itself");
    poll::until_true("its own connection", Duration::from_secs(5), || own.events().len() > 1)
}
