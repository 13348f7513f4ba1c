//! Every kind of client of `testpod` works on a plain network: a test that sees one refused by an agent then means something.

use anyhow::Result;
use sealane_tests::ca::{Ca, Flaw};
use sealane_tests::lab::Lab;
use sealane_tests::report::{End, Load, Outcome, Pings, TlsOutcome};
use sealane_tests::testpod::{Server, binary};

const TEXT: [&str; 3] = ["--text", "some text", "--half-close"];

#[test]
fn every_kind_of_client_gets_its_echo() -> Result<()> {
    let lab = Lab::new("kinds")?;
    let (web, api) = (lab.a.pod("web", 10)?, lab.b.pod("api", 11)?);
    let _server = api.serve(8080, &["--mode", "echo"])?;
    let first = api.at(8080).to_string();
    let kinds: &[&[&str]] = &[
        &["--kind", "plain"],
        &["--kind", "mapped"],
        &["--kind", "mptcp"],
        &["--kind", "fastopen-connect"],
        &["--kind", "msg-fastopen"],
        &["--kind", "nonblocking"],
        &["--kind", "uring"],
        &["--kind", "uring-sqpoll"],
        &["--kind", "reuse", "--first", &first],
        &["--kind", "reuse", "--first", &first, "--first", &first],
        &["--long-option"],
        &["--device", "eth0"],
        &["--device-after", "eth0"],
        &["--mark", "7"],
        &["--mark-after", "0"],
        &["--bind", "10.9.0.10:0"],
        &["--bind", "10.9.0.10:33333"],
    ];
    for kind in kinds {
        let outcome = web.connect(api.at(8080), &[&TEXT[..], kind].concat())?;
        assert!(outcome.echoed() && outcome.text == "some text", "{kind:?}: {outcome:?}");
        assert_eq!((outcome.error.as_deref(), outcome.option_error.as_deref()), (None, None), "{kind:?}");
    }
    for kind in ["plain", "mptcp", "fastopen-connect", "msg-fastopen", "uring"] {
        let outcome = web.connect(api.at6(8080), &[&TEXT[..], &["--kind", kind]].concat())?;
        assert!(outcome.echoed(), "{kind} over IPv6: {outcome:?}");
    }
    Ok(())
}

#[test]
fn failures_have_their_names() -> Result<()> {
    let lab = Lab::new("names")?;
    let (web, api) = (lab.a.pod("web", 10)?, lab.b.pod("api", 11)?);
    let refused = web.connect(api.at(81), &[])?;
    assert_eq!((refused.error.as_deref(), refused.end), (Some("ECONNREFUSED"), End::Never));
    let gateway = web.connect(api.at(81), &["--dontroute"])?;
    assert_eq!(gateway.error.as_deref(), Some("ENETUNREACH"));
    let _hold = api.serve(8081, &["--mode", "hold"])?;
    let silent = web.connect(api.at(8081), &["--text", "x", "--limit", "300"])?;
    assert_eq!((silent.connected, silent.end), (true, End::Timeout));
    let _reset = api.serve(8082, &["--mode", "reset"])?;
    let reset = web.connect(api.at(8082), &["--text", "x"])?;
    assert_eq!((reset.error.as_deref(), reset.end), (Some("ECONNRESET"), End::Reset));
    api.netns.ip("route add blackhole 10.9.0.0/24\n")?;
    let dropped = web.connect(api.at(8081), &["--limit", "300"])?;
    assert_eq!((dropped.error.as_deref(), dropped.end), (Some("TIMEOUT"), End::Never));
    Ok(())
}

#[test]
fn load_pings_raw_and_datagrams() -> Result<()> {
    let lab = Lab::new("rest")?;
    let (web, api) = (lab.a.pod("web", 10)?, lab.b.pod("api", 11)?);
    let _server = api.serve(8080, &["--mode", "echo", "--quiet"])?;
    let to = api.at(8080).to_string();
    let all: Load = web.testpod(&["load", "--to", &to, "--workers", "200", "--together", "--bytes", "1000"])?;
    assert_eq!((all.attempts, all.ok), (200, 200), "{all:?}");
    let some: Load = web.testpod(&["load", "--to", &to, "--workers", "4", "--count", "100"])?;
    assert_eq!((some.attempts, some.ok), (100, 100), "{some:?}");
    let none: Load = web.testpod(&["load", "--to", &api.at(81).to_string(), "--count", "3"])?;
    assert_eq!((none.ok, none.failures.get("connect ECONNREFUSED")), (0, Some(&3)));
    let pings: Pings = web.testpod(&["ping", "--to", &to, "--millis", "300"])?;
    assert!(pings.connected && pings.rounds > 3 && pings.error.is_none(), "{pings:?}");
    let pings: Pings = web.testpod(&["ping", "--to", &to, "--millis", "300", "--text", "some text"])?;
    assert!(pings.connected && pings.rounds > 3 && pings.error.is_none(), "{pings:?}");
    for (port, end) in [("8080", End::Enough), ("81", End::Reset)] {
        let to = format!("{}:{port}", api.v4);
        let raw: Outcome = web.testpod(&["raw", "--to", &to, "--from", "10.9.0.10:23456", "--text", "x"])?;
        assert_eq!((raw.end, raw.error), (end, None));
    }
    let _udp = Server::start(api.command(binary("testpod")?), "udp-serve", "[::]:53", &[])?;
    let to = format!("{}:53", api.v4);
    for connect in [&["--connect"][..], &[]] {
        let udp: Outcome = web.testpod(&[&["udp", "--to", &to, "--text", "x"], connect].concat())?;
        assert_eq!((udp.text.as_str(), udp.end), ("x", End::Enough));
    }
    Ok(())
}

#[test]
fn tls_with_any_certificate() -> Result<()> {
    let lab = Lab::new("tls")?;
    let (web, api) = (lab.a.pod("web", 10)?, lab.b.pod("api", 11)?);
    let ca = Ca::new("lab.example")?;
    let (cert, key) = ca.svid("api")?.write_pair(&lab.dir(), "api")?;
    let pair = ["--cert", &cert.to_string_lossy(), "--key", &key.to_string_lossy()];
    let _server = Server::start(api.command(binary("testpod")?), "tls-serve", "[::]:443", &pair)?;
    let to = api.at(443).to_string();
    for flaw in Flaw::ALL {
        let (cert, key) = ca.flawed("web", flaw)?.write_pair(&lab.dir(), "web")?;
        let pair = ["--cert", &cert.to_string_lossy(), "--key", &key.to_string_lossy()];
        let tls: TlsOutcome = web.testpod(&[&["tls", "--to", &to, "--text", "x"], &pair[..]].concat())?;
        assert_eq!((tls.handshake, tls.text.as_str(), tls.error), (true, "x", None), "{flaw:?}");
        assert_eq!(tls.version.as_deref(), Some("TLSv1_3"));
        assert_eq!(tls.peer_ids, ["spiffe://lab.example/api"]);
    }
    Ok(())
}
