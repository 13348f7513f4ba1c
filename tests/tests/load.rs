//! Much, many, long, slow and broken: nothing is lost, and every end arrives as what it was.

use std::time::Duration;

use anyhow::{Result, anyhow};
use sealane_tests::agent::Agent;
use sealane_tests::config::Mesh;
use sealane_tests::lab::Lab;
use sealane_tests::pod::Pod;
use sealane_tests::poll;
use sealane_tests::report::{End, Event, Load, Outcome};
use serde_json::json;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// Enough for anything here on a slow machine.
const LONG: Duration = Duration::from_secs(60);

/// `web` on node-a calls `api` on node-b, both enrolled.
struct Pair {
    web: Pod,
    api: Pod,
    a: Agent,
    b: Agent,
    lab: Lab,
}

impl Pair {
    fn new(name: &str, mode: &str) -> Result<Self> {
        let lab = Lab::new(name)?;
        let (web, api) = (lab.a.pod("web", 10)?, lab.b.pod("api", 11)?);
        let mut mesh = Mesh::new(&lab);
        mesh.enrol(&web);
        mesh.enrol(&api);
        mesh.policy("api", json!({ "listener": { "mode": mode } }));
        let (a, b) = mesh.start()?;
        Ok(Self { web, api, a, b, lab })
    }

    fn agents(&self) -> [&Agent; 2] {
        [&self.a, &self.b]
    }
}

#[test]
fn a_gibibyte_each_way_arrives_whole() -> Result<()> {
    let pair = Pair::new("bulk", "STRICT")?;
    let _server = pair.api.serve(8080, &["--limit", "600"])?;
    let outcome =
        pair.web.connect(pair.api.at(8080), &["--bytes", &GIB.to_string(), "--half-close", "--limit", "600000"])?;
    assert!(outcome.echoed(), "{outcome:?}");
    assert_eq!((outcome.sent, outcome.received, outcome.end), (GIB, GIB, End::Eof));
    Ok(())
}

#[test]
fn two_thousand_connections_at_once_are_all_served() -> Result<()> {
    let pair = Pair::new("crowd", "STRICT")?;
    let _server = pair.api.serve(8080, &["--quiet"])?;
    let to = pair.api.at(8080).to_string();
    let load: Load = pair.web.testpod(&["load", "--to", &to, "--workers", "2000", "--together", "--limit", "60000"])?;
    println!("{load:?}");
    assert_eq!((load.ok, load.attempts), (2_000, 2_000), "{load:?}");
    Ok(())
}

/// With a narrow port range of the pods' own, which the agent must leave alone, ports come round again within a minute: without
/// the reuse of TIME_WAIT they would run out.
#[test]
fn twenty_thousand_connections_one_after_the_other_are_all_served() -> Result<()> {
    let lab = Lab::new("series")?;
    let (web, api) = (lab.a.pod("web", 10)?, lab.b.pod("api", 11)?);
    for pod in [&web, &api] {
        pod.netns.sysctl("net/ipv4/ip_local_port_range", "20000 25999")?;
    }
    let mut mesh = Mesh::new(&lab);
    mesh.enrol(&web);
    mesh.enrol(&api);
    mesh.policy("api", json!({ "listener": { "mode": "STRICT" } }));
    let (_a, _b) = mesh.start()?;
    let _server = api.serve(8080, &["--quiet"])?;
    let to = api.at(8080).to_string();
    let load: Load = web.testpod(&["load", "--to", &to, "--count", "20000", "--millis", "600000"])?;
    println!("{:.0} connections a second, one at a time: {load:?}", load.ok as f64 / load.seconds);
    assert_eq!((load.ok, load.attempts), (20_000, 20_000), "{load:?}");
    Ok(())
}

#[test]
fn a_client_that_closes_its_side_first_still_gets_the_answer() -> Result<()> {
    let pair = Pair::new("half", "STRICT")?;
    let server = pair.api.serve(8080, &["--mode", "hash"])?;
    let outcome = pair.web.connect(pair.api.at(8080), &["--bytes", "5000000", "--half-close"])?;
    assert_eq!((outcome.text.trim_end(), outcome.end), (outcome.sent_sha256.as_str(), End::Eof), "{outcome:?}");
    let closed = server.wait(LONG, |event| matches!(event, Event::Closed { .. }))?;
    assert!(matches!(closed, Event::Closed { received: 5_000_000, end: End::Eof, .. }), "{closed:?}");
    Ok(())
}

#[test]
fn a_server_may_speak_first() -> Result<()> {
    for mode in ["STRICT", "PERMISSIVE"] {
        let pair = Pair::new(&format!("first-{}", mode.to_lowercase()), mode)?;
        let stranger = pair.lab.a.pod("stranger", 12)?;
        let _server = pair.api.serve(8080, &["--mode", "first", "--text", "220 welcome"])?;
        let outcome = pair.web.connect(pair.api.at(8080), &["--expect", "11"])?;
        assert_eq!((outcome.text.as_str(), outcome.end), ("220 welcome", End::Enough), "{mode}: {outcome:?}");
        let plain = stranger.connect(pair.api.at(8080), &["--expect", "11"])?;
        if mode == "STRICT" {
            assert!(plain.refused(), "{plain:?}");
        } else {
            assert_eq!((plain.text.as_str(), plain.end), ("220 welcome", End::Enough), "{plain:?}");
        }
        pair.b.wait_access("mTLS", |entry| entry["mode"] == "mtls" && entry["client"].is_string())?;
    }
    Ok(())
}

#[test]
fn a_reset_passes_both_ways_as_a_reset() -> Result<()> {
    let pair = Pair::new("reset", "STRICT")?;
    let _resets = pair.api.serve(8080, &["--mode", "reset"])?;
    let outcome = pair.web.connect(pair.api.at(8080), &["--bytes", "100"])?;
    assert_eq!((outcome.end, outcome.error.as_deref()), (End::Reset, Some("ECONNRESET")), "{outcome:?}");
    pair.a.wait_access("the server's reset", |entry| {
        entry["outcome"] == "peer_reset" || entry["outcome"] == "peer_truncated"
    })?;
    pair.b.wait_access("the server's reset", |entry| entry["outcome"] == "app_reset")?;

    // A client that ends with bytes unread resets.
    let echo = pair.api.serve(8081, &[])?;
    let to = pair.api.at(8081).to_string();
    let outcome: Outcome =
        pair.web.testpod(&["connect", "--to", &to, "--bytes", "50000000", "--expect", "1", "--limit", "2000"])?;
    assert_eq!((outcome.end, outcome.error.as_deref()), (End::Enough, Some("EAGAIN")), "{outcome:?}");
    let closed = echo.wait(LONG, |event| matches!(event, Event::Closed { .. }))?;
    // The server learns it when it reads, or when it writes.
    assert!(matches!(closed, Event::Closed { end: End::Reset | End::Error, .. }), "{closed:?}");
    Ok(())
}

/// What the kernel's buffers hold, in both pods and between them, may be taken from the client; not more, and next to nothing
/// of it by the agents.
#[test]
fn a_server_that_does_not_read_blocks_its_client_and_fills_no_agent() -> Result<()> {
    let pair = Pair::new("pressure", "STRICT")?;
    let _holds = pair.api.serve(8080, &["--mode", "hold", "--limit", "120"])?;
    let _echo = pair.api.serve(8081, &[])?;
    assert!(pair.web.connect(pair.api.at(8081), &["--text", "warm", "--half-close"])?.echoed());
    let rss = |agent: &Agent| agent.rss_kib();
    let before = pair.agents().map(rss);
    let blocked = pair.web.start_testpod(&[
        "connect",
        "--to",
        &pair.api.at(8080).to_string(),
        "--bytes",
        &(512 * MIB).to_string(),
        "--limit",
        "8000",
    ])?;
    let carried = || {
        let bytes = pair.agents().map(|agent| agent.metrics().map(|m| m.sum("sealane_bytes_total", &[])));
        bytes.into_iter().sum::<Result<f64>>()
    };
    // Blocked: nothing moves any more between two looks, while others are served.
    let mut last = -1.0;
    poll::until_true("the stream stands still", LONG, || {
        let now = carried().unwrap_or(-2.0);
        let still = now == last && now > MIB as f64;
        last = now;
        still
    })?;
    let during = pair.agents().map(rss);
    assert!(pair.web.connect(pair.api.at(8081), &["--text", "others", "--half-close"])?.echoed());
    let outcome: Outcome = blocked.result()?;
    println!("the client could send {} KiB", outcome.sent / 1024);
    assert_eq!((outcome.connected, outcome.error.as_deref()), (true, Some("EAGAIN")), "{outcome:?}");
    assert!(outcome.sent < 100 * MIB, "{outcome:?}");
    for (before, during) in before.into_iter().zip(during) {
        let (before, during) = (before?, during?);
        println!("agent: {before} KiB before, {during} KiB while blocked");
        assert!(during < before + 8 * 1024, "{before} -> {during} KiB");
    }
    Ok(())
}

/// The bound is generous: it finds a buffer that is kept, not a field that was added.
#[test]
fn an_idle_connection_costs_little_memory() -> Result<()> {
    const COUNT: u64 = 1_000;
    const MOST_KIB: f64 = 64.0;
    let pair = Pair::new("idle", "STRICT")?;
    let _server = pair.api.serve(8080, &["--quiet", "--limit", "600"])?;
    let to = pair.api.at(8080).to_string();
    let idle = |sum: u64| -> Result<_> {
        let more = pair.web.start_testpod(&["idle", "--to", &to, "--count", &COUNT.to_string()])?;
        let open = |agent: &Agent| agent.metrics().is_ok_and(|m| m.sum("sealane_connections_open", &[]) >= sum as f64);
        poll::until_true("all are open", LONG, || pair.agents().into_iter().all(open))?;
        Ok(more)
    };
    // The first ones use up what the start has left free.
    let _first = idle(COUNT)?;
    let before = pair.agents().map(Agent::rss_kib);
    let _second = idle(2 * COUNT)?;
    for ((agent, before), side) in pair.agents().into_iter().zip(before).zip(["client's", "server's"]) {
        let grown = agent.rss_kib()?.checked_sub(before?).ok_or_else(|| anyhow!("it has shrunk"))?;
        let each = grown as f64 / COUNT as f64;
        println!("{side} agent: {each:.1} KiB for each idle connection");
        assert!(each < MOST_KIB, "{side}: {each:.1} KiB");
    }
    Ok(())
}
