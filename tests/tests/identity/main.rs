//! Identities that come, change, expire and go while connections are open.

mod endings;
mod first;
mod policy;
mod rotation;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use sealane_tests::agent::Agent;
use sealane_tests::ca::{Ca, Svid};
use sealane_tests::config::Config;
use sealane_tests::files::Files;
use sealane_tests::pod::Pod;
use sealane_tests::poll;
use sealane_tests::report::{End, Outcome, Pings};
use sealane_tests::testpod::Running;
use sealane_tests::trio::Trio;
use serde_json::Value;

/// Bounds on what the agents do within a tick or two, and on this machine's load.
const SOON: Duration = Duration::from_secs(30);

/// What must not be seen on the wire.
const MARKER: &str = "a-marker-that-must-not-be-seen";

/// Sends it and reads the answer to its end.
const SEND: [&str; 3] = ["--text", MARKER, "--half-close"];

/// `web` and a STRICT `api` whose identities shall come from files; there are none yet.
fn scene(name: &str) -> Result<(Trio, Files)> {
    let trio = Trio::strict(name)?;
    let files = Files::new(&trio.lab)?;
    Ok((trio, files))
}

/// The same with sound SVIDs, and both agents.
fn started(name: &str) -> Result<(Trio, Files, Agent, Agent)> {
    let (trio, files) = scene(name)?;
    files.give_sound(&["web", "api"])?;
    let (a, b) = trio.mesh.start_with(|config| edit(&files, config))?;
    Ok((trio, files, a, b))
}

/// The files, and time enough for a handshake on a machine that is busy.
fn edit(files: &Files, config: &mut Config) {
    files.feed(config);
    config.timeouts.insert("handshake".into(), "30s".into());
}

/// A connection that stays open and busy.
fn ping(from: &Pod, to: &Pod) -> Result<Running> {
    let to = to.at(8080).to_string();
    from.start_testpod(&["ping", "--to", &to, "--text", MARKER, "--millis", "120000", "--limit", "30000"])
}

/// It echoed, and a reset ended it.
fn reset_in_the_end(ping: Running) -> Result<()> {
    let pings: Pings = ping.result()?;
    ensure!(pings.rounds > 0 && pings.error.as_deref() == Some("ECONNRESET"), "{pings:?}");
    Ok(())
}

/// The client saw a reset and not one byte.
fn reset(outcome: &Outcome) -> Result<()> {
    // Whichever of its writer and its reader came first has the error; the other sees an end.
    let reset = outcome.end == End::Reset || outcome.error.as_deref() == Some("ECONNRESET");
    ensure!(outcome.received == 0 && reset, "{outcome:?}");
    Ok(())
}

/// Waits until the agent carries so many connections of a pod.
fn wait_open(agent: &Agent, pod: &str, count: f64) -> Result<()> {
    poll::until_true(&format!("{count} connections of {pod}"), SOON, || {
        let labels = [("workload", &*format!("shop/{pod}"))];
        agent.metrics().is_ok_and(|metrics| metrics.sum("sealane_connections_open", &labels) == count)
    })
}

/// Waits until some ten echoes more have come back to a pod.
fn wait_echoes(agent: &Agent, pod: &str) -> Result<()> {
    let labels = [("workload", &*format!("shop/{pod}")), ("side", "peer")];
    let begun = agent.metrics()?.sum("sealane_bytes_total", &labels);
    poll::until_true(&format!("echoes to {pod}"), SOON, || {
        let bytes = agent.metrics().map_or(0.0, |metrics| metrics.sum("sealane_bytes_total", &labels));
        bytes >= begun + 10.0 * MARKER.len() as f64
    })
}

/// What `/state` says of a pod's identity.
fn identity(agent: &Agent, pod: &str) -> Result<Value> {
    Ok(agent.state()?["workloads"][format!("shop/{pod}")]["identity"].take())
}

fn wait_identity(agent: &Agent, pod: &str, key: &str, value: &Value) -> Result<()> {
    poll::until_true(&format!("{pod}: {key} {value}"), SOON, || {
        identity(agent, pod).is_ok_and(|identity| identity[key] == *value)
    })
}

/// Ends of connections that were not in order.
fn failures(agent: &Agent) -> Vec<Value> {
    agent.access().into_iter().filter(|entry| entry["outcome"] != "done").collect()
}

/// So many hours from now, in seconds since 1970.
fn hours(count: u64) -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() + count * 3600
}

/// An SVID with this expiry, in seconds since 1970, by which `/state` tells it from others.
fn svid_until(ca: &Ca, pod: &str, not_after: u64) -> Result<Svid> {
    ca.svid_with(pod, |params| {
        params.not_after = (UNIX_EPOCH + Duration::from_secs(not_after)).into();
        Ok(())
    })
}
