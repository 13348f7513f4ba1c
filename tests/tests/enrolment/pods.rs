//! Pods that come late and pods that are deleted.

use anyhow::Result;
use sealane_tests::agent::Agent;
use sealane_tests::config::Mesh;
use sealane_tests::lab::Lab;
use sealane_tests::poll;
use sealane_tests::report::Event;
use serde_json::json;

use crate::footprint::{entries, maps};
use crate::{SOON, TEXT, pod_state, wait_open};

#[test]
fn a_pod_may_come_late_and_go_and_come_again() -> Result<()> {
    let lab = Lab::new("late")?;
    let (api, other) = (lab.b.pod("api", 11)?, lab.a.pod("other", 13)?);
    let mut mesh = Mesh::new(&lab);
    mesh.enrol(&api);
    mesh.enrol(&other);
    mesh.policy("api", json!({ "listener": { "mode": "STRICT" } }));
    let netns = {
        let web = lab.a.pod("web", 10)?;
        mesh.enrol(&web);
        web.netns.name().to_owned()
    };
    let own = mesh.config(&lab.a);
    let server = api.serve(8080, &[])?;
    let _b = Agent::start(&lab.b, &mesh.config(&lab.b))?;
    let a = Agent::spawn(&lab.a, &own)?;
    a.wait_ready()?;
    let shown = pod_state(&a, "web")?;
    assert_eq!(shown["state"], "pending", "{shown}");
    assert!(shown["detail"].as_str().is_some_and(|why| why.contains(&netns)), "{shown}");

    let to = api.at(8080).to_string();
    let staying = other.start_testpod(&["ping", "--to", &to, "--millis", "60000"])?;
    wait_open(&a, "outbound", 1.0)?;
    let of_other = entries(&lab.a)?;
    for round in 0..3 {
        let web = lab.a.pod("web", 10)?;
        a.wait_enrolled(&own)?;
        let outcome = web.connect(api.at(8080), &TEXT)?;
        assert!(outcome.echoed(), "round {round}: {outcome:?}");
        let ids: Vec<u32> = maps(&lab.a)?.pods.iter().flatten().map(|(_, pod)| pod.pod_id).collect();
        assert!(matches!(ids[..], [one, another] if one != another), "a number each: {ids:?}");
        // Deleted with a connection open.
        let open = web.start_testpod(&["ping", "--to", &to, "--millis", "60000"])?;
        wait_open(&a, "outbound", 2.0)?;
        drop(web);
        drop(open);
        poll::until_true("the pod is gone", SOON, || pod_state(&a, "web").is_ok_and(|pod| pod["state"] == "pending"))?;
        poll::until_true("only the other pod's entries are left", SOON, || {
            entries(&lab.a).is_ok_and(|left| left == of_other)
        })?;
        wait_open(&a, "outbound", 1.0)?;
    }
    assert!(!server.events().iter().any(|event| matches!(event, Event::Closed { peer, .. } if peer.ip() == other.v4)));
    drop(staying);
    Ok(())
}
