//! A pod's way into the mesh and out of it, with connections open: what is reset, what is left alone, and that nothing stays
//! behind.

mod arriving;
mod cgroups;
mod footprint;
mod leaving;
mod pods;

use std::time::Duration;

use anyhow::Result;
use sealane_tests::agent::Agent;
use sealane_tests::poll;

/// Bounds on what the agents do within a tick or two, and on this machine's load.
const SOON: Duration = Duration::from_secs(15);

/// Sends some text and reads the answer to its end.
const TEXT: [&str; 3] = ["--text", "in plain words", "--half-close"];

/// Waits until the agent carries so many connections.
fn wait_open(agent: &Agent, direction: &str, count: f64) -> Result<()> {
    poll::until_true(&format!("{count} {direction} connections"), SOON, || {
        let open = |metrics: &sealane_tests::metrics::Metrics| {
            metrics.sum("sealane_connections_open", &[("direction", direction)])
        };
        agent.metrics().is_ok_and(|metrics| open(&metrics) == count)
    })
}

/// What `/state` says of a pod; null where it does not name it.
fn pod_state(agent: &Agent, name: &str) -> Result<serde_json::Value> {
    let state = agent.state()?;
    let pod = state["pods"].as_array().into_iter().flatten().find(|pod| pod["workload"] == format!("shop/{name}"));
    Ok(pod.cloned().unwrap_or_default())
}
