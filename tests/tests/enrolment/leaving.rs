//! Un-enrolment and uninstall with connections open: no byte of a captured connection leaves in plaintext, and nothing stays.

use anyhow::Result;
use sealane_tests::agent::{self, Agent};
use sealane_tests::config::Config;
use sealane_tests::poll;
use sealane_tests::report::{Outcome, Pings};
use sealane_tests::testpod::Running;
use sealane_tests::trio::Trio;
use sealane_tests::wire::{Capture, Trace};
use serde_json::json;

use crate::footprint::{Footprint, entries};
use crate::{SOON, TEXT, pod_state, wait_open};

const OUT: &str = "a marker that web sends to api over and over";
const IN: &str = "a marker that api sends to web over and over";

/// Captured connections both ways, busy, and one that is silent.
struct Captured {
    to_api: Running,
    to_web: Running,
    silent: Running,
}

impl Captured {
    fn open(trio: &Trio, a: &Agent) -> Result<Self> {
        let (web, api) = (&trio.web, &trio.api);
        let (to_web, to_api) = (web.at(8080).to_string(), api.at(8080).to_string());
        let ping = |to, text| ["ping", "--every", "1", "--millis", "60000", "--to", to, "--text", text];
        let captured = Self {
            to_api: web.start_testpod(&ping(&to_api, OUT))?,
            to_web: api.start_testpod(&ping(&to_web, IN))?,
            silent: web.start_testpod(&["connect", "--to", &to_api, "--text", OUT, "--limit", "60000"])?,
        };
        wait_open(a, "outbound", 2.0)?;
        wait_open(a, "inbound", 1.0)?;
        Ok(captured)
    }

    /// All have ended, and not one marker was seen.
    fn ended(self, seen: &Trace) -> Result<()> {
        for (what, pings) in [("outbound", self.to_api), ("inbound", self.to_web)] {
            let pings: Pings = pings.result()?;
            assert!(pings.rounds > 0 && pings.error.is_some(), "{what}: {pings:?}");
        }
        let silent: Outcome = self.silent.result()?;
        assert!(silent.connected && !silent.echoed(), "{silent:?}");
        for marker in [OUT, IN] {
            assert!(!seen.contains(marker.as_bytes())?, "{marker:?} left in plaintext");
        }
        Ok(())
    }
}

#[test]
fn unenrolment_ends_what_is_captured_and_leaves_nothing() -> Result<()> {
    let trio = Trio::new("leave", json!({ "mode": "PERMISSIVE" }))?;
    let (web, api, lab) = (&trio.web, &trio.api, &trio.lab);
    let before = Footprint::of(&web.netns)?;
    let _servers = [api.serve(8080, &[])?, web.serve(8080, &[])?];
    let (a, b) = trio.mesh.start_with(soon)?;
    assert!(!before.differs(&Footprint::of(&web.netns)?).is_empty(), "the footprint shows an enrolment");
    for round in 0..2 {
        let captured = Captured::open(&trio, &a)?;
        let veth = Capture::start(&lab.a.netns, &web.veth)?;
        let [mut own, mut others] = configs(&trio);
        own.workloads.clear();
        others.peers.clear();
        a.reload(&own)?;
        b.reload(&others)?;
        poll::until_true("web has left", SOON, || pod_state(&a, "web").is_ok_and(|pod| pod.is_null()))?;
        captured.ended(&veth.stop()?)?;
        assert_eq!(before.differs(&Footprint::of(&web.netns)?), Vec::<String>::new(), "round {round}");
        assert_eq!(entries(&lab.a)?, Vec::<String>::new(), "round {round}");
        // An ordinary pod again.
        let veth = Capture::start(&lab.a.netns, &web.veth)?;
        let marked = ["--mark-after", "0"];
        for outcome in [web.connect(api.at(8080), &[&TEXT[..], &marked].concat())?, api.connect(web.at6(8080), &TEXT)?]
        {
            assert!(outcome.echoed() && outcome.option_error.is_none(), "{outcome:?}");
        }
        let trace = veth.stop()?;
        assert!(trace.to_port(8080).all(|flow| flow.data == TEXT[1].as_bytes()), "{trace:?}");
        // And back.
        let [own, others] = configs(&trio);
        a.reload(&own)?;
        b.reload(&others)?;
        a.wait_enrolled(&own)?;
        poll::until_true("b knows web again", SOON, || {
            b.state().is_ok_and(|state| state["peers"]["10.9.0.10"].is_object())
        })?;
    }
    Ok(())
}

/// A pod that is enrolled again before it has left keeps its identity.
#[test]
fn a_pod_may_come_back_while_it_leaves() -> Result<()> {
    let trio = Trio::new("back", json!({ "mode": "PERMISSIVE" }))?;
    let (a, b) = trio.mesh.start_with(soon)?;
    let _servers = [trio.api.serve(8080, &[])?, trio.web.serve(8080, &[])?];
    let captured = Captured::open(&trio, &a)?;
    let [full, _] = configs(&trio);
    let mut without = full.clone();
    without.workloads.clear();
    a.reload(&without)?;
    poll::until_true("web leaves", SOON, || pod_state(&a, "web").is_ok_and(|pod| pod["state"] == "leaving"))?;
    let veth = Capture::start(&trio.lab.a.netns, &trio.web.veth)?;
    a.reload(&full)?;
    poll::until_true("web is back", SOON, || pod_state(&a, "web").is_ok_and(|pod| pod["state"] == "enrolled"))?;
    a.wait_enrolled(&full)?;
    let outcome = trio.web.connect(trio.api.at(8080), &TEXT)?;
    assert!(outcome.echoed(), "{outcome:?}");
    drop((captured.to_api, captured.to_web, captured.silent));
    let trace = veth.stop()?;
    for marker in [TEXT[1], OUT, IN] {
        assert!(!trace.contains(marker.as_bytes())?, "{marker:?} left in plaintext");
    }
    drop(b);
    Ok(())
}

#[test]
fn uninstall_leaves_nothing_whether_the_agent_lives_or_not() -> Result<()> {
    let trio = Trio::new("uninstall", json!({ "mode": "PERMISSIVE" }))?;
    let (web, api, lab) = (&trio.web, &trio.api, &trio.lab);
    let before = Footprint::of(&web.netns)?;
    let _servers = [api.serve(8080, &[])?, web.serve(8080, &[])?];
    let [own, others] = configs(&trio);
    let _b = Agent::start(&lab.b, &others)?;
    for alive in [true, false] {
        let mut a = Agent::start(&lab.a, &own)?;
        let captured = Captured::open(&trio, &a)?;
        let veth = Capture::start(&lab.a.netns, &web.veth)?;
        if !alive {
            a.kill()?;
        }
        agent::uninstall(&lab.a)?;
        captured.ended(&veth.stop()?)?;
        assert!(!lab.a.bpffs.exists(), "alive: {alive}");
        assert_eq!(before.differs(&Footprint::of(&web.netns)?), Vec::<String>::new(), "alive: {alive}");
        if alive {
            let says = |line: &serde_json::Value| line.to_string().contains("another agent has taken over");
            poll::until_true("the agent knows", SOON, || a.log().iter().any(says))?;
            a.kill()?;
        }
        // Again with nothing installed: no error, nothing made.
        agent::uninstall(&lab.a)?;
        assert!(!lab.a.bpffs.exists());
        // api is still enrolled and PERMISSIVE; web speaks plaintext to it. The other node's agent is none of ours.
        let veth = Capture::start(&lab.a.netns, &web.veth)?;
        assert!(web.connect(api.at(8080), &TEXT)?.echoed());
        assert!(veth.stop()?.contains(TEXT[1].as_bytes())?);
        assert!(!entries(&lab.b)?.is_empty(), "several agents on one host are kept apart");
    }
    Ok(())
}

/// Both nodes' configurations, with short bounds.
fn configs(trio: &Trio) -> [Config; 2] {
    [&trio.lab.a, &trio.lab.b].map(|node| {
        let mut config = trio.mesh.config(node);
        soon(&mut config);
        config
    })
}

fn soon(config: &mut Config) {
    config.timeouts.insert("unenrolGrace".into(), "300ms".into());
    config.timeouts.insert("drain".into(), "1s".into());
}
