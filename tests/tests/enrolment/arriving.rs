//! Enrolment while connections are open: only what policy forbids is reset.

use std::fs;
use std::net::TcpListener;

use anyhow::Result;
use sealane_tests::agent::Agent;
use sealane_tests::poll;
use sealane_tests::report::{End, Event, Outcome, Pings};
use sealane_tests::testpod::{Running, Server};
use sealane_tests::trio::Trio;
use serde_json::json;

use crate::{SOON, TEXT, wait_open};

/// Plaintext connections of every age from `out` to `api`, made before there is an agent.
struct Before {
    server: Server,
    /// Accepted by the application.
    accepted: Running,
    /// Complete, in the queue of a listener that never accepts.
    queued: Running,
    _never_accepts: TcpListener,
    /// The SYN-ACK is lost for now.
    half_open: Running,
    late_server: Server,
}

impl Before {
    fn open(trio: &Trio) -> Result<Self> {
        let (api, out, lab) = (&trio.api, &trio.out, &trio.lab);
        let (server, late_server) = (api.serve(8080, &[])?, api.serve(8082, &[])?);
        let never_accepts = api.netns.run(|| Ok(TcpListener::bind("[::]:8081")?))?;
        let accepted = ping(trio)?;
        let to = api.at(8081).to_string();
        let queued = out.start_testpod(&["connect", "--to", &to, "--text", "x", "--limit", "60000"])?;
        lab.a.netns.ip_show(LOSE_ANSWER)?;
        let to = api.at(8082).to_string();
        let half_open = out.start_testpod(&[&["connect", "--to", &to, "--limit", "60000"], &TEXT[..]].concat())?;
        server.wait(SOON, |event| matches!(event, Event::Accepted { .. }))?;
        poll::until_true("one connection is queued, one half open", SOON, || {
            let sockets = api.netns.run(|| Ok(fs::read_to_string("/proc/thread-self/net/tcp6")?)).unwrap_or_default();
            has(&sockets, 8081, "01") && has(&sockets, 8082, "03")
        })?;
        Ok(Self { server, accepted, queued, _never_accepts: never_accepts, half_open, late_server })
    }
}

/// A rule of node-a's: what comes back from port 8082 vanishes.
const LOSE_ANSWER: &str = "rule add iif wire ipproto tcp sport 8082 pref 10 blackhole";

#[test]
fn strict_resets_the_plaintext_that_it_finds() -> Result<()> {
    let trio = Trio::strict("found")?;
    let before = Before::open(&trio)?;
    // From the pod to itself: inside the pod's boundary, and the mesh's own business never.
    let own = trio.api.start_testpod(&["ping", "--to", "127.0.0.1:8080", "--millis", "4000"])?;
    let own_address = trio.api.start_testpod(&["ping", "--to", &trio.api.at(8080).to_string(), "--millis", "4000"])?;
    before.server.wait(SOON, |_| accepted(&before.server) == 3)?;
    let _b = Agent::start(&trio.lab.b, &trio.mesh.config(&trio.lab.b))?;
    let pings: Pings = before.accepted.result()?;
    assert!(pings.rounds > 0 && pings.error.as_deref() == Some("ECONNRESET"), "{pings:?}");
    let outcome: Outcome = before.queued.result()?;
    assert!(outcome.connected && outcome.end == End::Reset, "in the queue: {outcome:?}");
    trio.lab.a.netns.ip_show(&LOSE_ANSWER.replace("add", "del"))?;
    let outcome: Outcome = before.half_open.result()?;
    assert!(outcome.refused(), "half open: {outcome:?}");
    assert_eq!(before.late_server.events().len(), 1, "half open: {:?}", before.late_server.events());
    for pings in [own, own_address] {
        let pings: Pings = pings.result()?;
        assert!(pings.rounds > 0 && pings.error.is_none(), "the pod's own: {pings:?}");
    }
    Ok(())
}

#[test]
fn permissive_leaves_them_until_the_policy_turns_strict() -> Result<()> {
    let mut trio = Trio::new("turn", json!({ "mode": "PERMISSIVE" }))?;
    let before = Before::open(&trio)?;
    let b = Agent::start(&trio.lab.b, &trio.mesh.config(&trio.lab.b))?;
    // Plaintext that the agent carries.
    let carried = ping(&trio)?;
    wait_open(&b, "inbound", 1.0)?;
    trio.lab.a.netns.ip_show(&LOSE_ANSWER.replace("add", "del"))?;
    let outcome: Outcome = before.half_open.result()?;
    assert!(outcome.echoed(), "half open: {outcome:?}");
    assert!(!before.server.events().iter().any(|event| matches!(event, Event::Closed { .. })), "left alone");

    trio.mesh = sealane_tests::config::Mesh::new(&trio.lab);
    trio.mesh.enrol(&trio.web);
    trio.mesh.enrol(&trio.api);
    trio.mesh.policy("api", json!({ "listener": { "mode": "STRICT" } }));
    b.reload(&trio.mesh.config(&trio.lab.b))?;
    for (what, pings) in [("accepted before", before.accepted), ("carried by the agent", carried)] {
        let pings: Pings = pings.result()?;
        assert!(pings.rounds > 0 && pings.error.as_deref() == Some("ECONNRESET"), "{what}: {pings:?}");
    }
    let outcome: Outcome = before.queued.result()?;
    assert!(outcome.connected && outcome.end == End::Reset, "in the queue: {outcome:?}");
    b.wait_access("the carried one", |entry| entry["outcome"] == "policy_changed")?;
    assert!(trio.out.connect(trio.api.at(8080), &TEXT)?.refused());
    Ok(())
}

/// A connection from `out` to `api` that stays open and busy.
fn ping(trio: &Trio) -> Result<Running> {
    trio.out.start_testpod(&["ping", "--to", &trio.api.at(8080).to_string(), "--millis", "60000"])
}

fn accepted(server: &Server) -> usize {
    server.events().iter().filter(|event| matches!(event, Event::Accepted { .. })).count()
}

/// A line of /proc/net/tcp6 with this local port and state.
fn has(sockets: &str, port: u16, state: &str) -> bool {
    sockets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|fields| {
        matches!(fields[..], [_, local, _, shown, ..] if shown == state && local.ends_with(&format!(":{port:04X}")))
    })
}
