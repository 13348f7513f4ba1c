//! The agent killed, replaced, reloaded and stopped: nothing goes out in plaintext, nothing broken looks whole, and a
//! replacement is not noticed.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use sealane_tests::agent::{Agent, PATIENCE, config_file};
use sealane_tests::ca::Ca;
use sealane_tests::config::{Config, Mesh, NAMESPACE, TRUST_DOMAIN};
use sealane_tests::lab::{Lab, WIRE};
use sealane_tests::pod::Pod;
use sealane_tests::report::{End, Event, Load, Outcome, Pings};
use sealane_tests::wire::{Capture, Trace};
use sealane_tests::{http, poll};
use serde_json::{Value, json};

const MARKER: &str = "a-marker-that-must-never-be-on-the-wire";
/// Enough for anything here on a slow machine.
const LONG: Duration = Duration::from_secs(60);

/// `web` on node-a calls `api` on node-b, which is STRICT; `stranger` on node-a and `other` on node-b are not enrolled.
struct Scene {
    web: Pod,
    api: Pod,
    stranger: Pod,
    other: Pod,
    mesh: Mesh,
    lab: Lab,
}

impl Scene {
    fn new(name: &str) -> Result<Self> {
        let lab = Lab::new(name)?;
        let (web, api) = (lab.a.pod("web", 10)?, lab.b.pod("api", 11)?);
        let (stranger, other) = (lab.a.pod("stranger", 20)?, lab.b.pod("other", 21)?);
        let mut mesh = Mesh::new(&lab);
        mesh.enrol(&web);
        mesh.enrol(&api);
        mesh.policy("api", json!({ "listener": { "mode": "STRICT" } }));
        Ok(Self { web, api, stranger, other, mesh, lab })
    }

    fn config_a(&self) -> Config {
        self.mesh.config(&self.lab.a)
    }

    /// The wire, and both enrolled pods' own links.
    fn captures(&self) -> Result<Vec<Capture>> {
        let (a, b) = (&self.lab.a.netns, &self.lab.b.netns);
        Ok(vec![Capture::start(a, WIRE)?, Capture::start(a, &self.web.veth)?, Capture::start(b, &self.api.veth)?])
    }

    fn calls(&self) -> Result<Outcome> {
        self.web.connect(self.api.at(8080), &["--text", MARKER, "--half-close"])
    }

    /// A short attempt, for when the agent is not there.
    fn tries(&self, from: &Pod) -> Result<Outcome> {
        from.connect(self.api.at(8080), &["--text", MARKER, "--half-close", "--limit", "1500"])
    }

    /// A file that ends what was started with `--until` it.
    fn signal_file(&self) -> PathBuf {
        self.lab.dir().join("enough")
    }
}

#[test]
fn a_killed_agent_leaks_nothing_and_resets_what_was_open() -> Result<()> {
    let scene = Scene::new("kill")?;
    let (mut a, mut b) = scene.mesh.start()?;
    let echo = scene.api.serve(8080, &[])?;
    let _quiet = scene.api.serve(8081, &["--quiet"])?;
    let _hold = scene.api.serve(8082, &["--mode", "hold", "--quiet"])?;
    let enough = scene.signal_file();
    let until = enough.to_string_lossy();
    // Nobody widens a pod's ports that is not enrolled, and the loop is long. It pauses, since the captures hold it too.
    scene.stranger.netns.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
    let _others = scene.other.serve(9090, &["--quiet", "--limit", "600"])?;
    let others = |args: &[&str]| {
        let to = scene.other.at(9090).to_string();
        scene.stranger.start_testpod(&[args, &["--to", &to, "--until", &until, "--millis", "600000"]].concat())
    };
    let (other_ping, other_load) = (others(&["ping"])?, others(&["load", "--workers", "2", "--every", "5"])?);

    for victim in ["a", "b"] {
        let captures = scene.captures()?;
        let before = echo.events().len();
        let start = |args: &[&str], port| {
            let to = scene.api.at(port).to_string();
            scene.web.start_testpod(&[args, &["--to", &to]].concat())
        };
        // One that exchanges, one whose buffers are full of what it wants to send, and many that come and go.
        let bytes = |agent: &Agent| agent.metrics().map_or(0.0, |m| m.sum("sealane_bytes_total", &[("side", "app")]));
        let earlier = bytes(&a);
        let pings = start(&["ping", "--millis", "600000"], 8080)?;
        poll::until_true("the pings go", LONG, || bytes(&a) > earlier + 16.0)?;
        let stuffed = start(&["connect", "--text", MARKER, "--repeat", "1000000", "--limit", "60000"], 8082)?;
        let load = start(&["load", "--text", MARKER, "--workers", "4", "--millis", "5000", "--limit", "1000"], 8081)?;
        poll::until_true("much is under way", LONG, || bytes(&a) > earlier + 1e6)?;
        let ended = if victim == "a" { a.kill()? } else { b.kill()? };
        assert!(!ended.success());

        let pings: Pings = pings.result()?;
        assert!(pings.rounds > 0 && pings.error.as_deref() == Some("ECONNRESET"), "{victim}: {pings:?}");
        let stuffed: Outcome = stuffed.result()?;
        // The kernel tells it once: to the thread that writes, or to the one that reads.
        assert_eq!((stuffed.error.as_deref(), stuffed.received), (Some("ECONNRESET"), 0), "{victim}: {stuffed:?}");
        let closed = poll::until("the server sees an end", LONG, || {
            echo.events().into_iter().skip(before).find(|event| matches!(event, Event::Closed { .. }))
        })?;
        assert!(matches!(closed, Event::Closed { end: End::Reset, .. }), "{victim}: the server saw {closed:?}");
        let load: Load = load.result()?;
        println!("{victim} killed under {load:?}");
        assert!(load.ok > 0 && load.ok < load.attempts, "{victim}: {load:?}");
        assert!(!load.failures.contains_key("cut short") && !load.failures.contains_key("wrong bytes"), "{load:?}");

        // The capture holds without the agent: nobody gets through, in either direction.
        let tried = scene.tries(&scene.web)?;
        assert!(tried.received == 0 && tried.error.is_some(), "{victim}: {tried:?}");
        let tried = scene.tries(&scene.stranger)?;
        assert!(tried.refused(), "{victim}: {tried:?}");
        let traces = stop(captures)?;
        // The stranger's own words are on the wire where somebody is there to take them: only the enrolled pods count.
        for trace in &traces {
            nothing_of(trace, &scene.web)?;
        }

        if victim == "a" {
            a = Agent::start(&scene.lab.a, &scene.config_a())?;
        } else {
            b = Agent::start(&scene.lab.b, &scene.mesh.config(&scene.lab.b))?;
        }
        assert!(scene.calls()?.echoed(), "{victim} has returned");
    }

    fs::write(&enough, "")?;
    let pings: Pings = other_ping.result()?;
    assert!(pings.connected && pings.error.is_none(), "{pings:?}");
    let load: Load = other_load.result()?;
    assert!(load.ok > 100 && load.ok == load.attempts, "{load:?}");
    Ok(())
}

/// Five times on each node. There are ports for two generations, so the one before the last is ended, when nothing of it is
/// needed any more, before the next begins.
#[test]
fn five_replacements_under_load_refuse_and_reset_nothing() -> Result<()> {
    let scene = Scene::new("replace")?;
    let configs = [&scene.lab.a, &scene.lab.b].map(|node| scene.mesh.config(node));
    let (a, b) = scene.mesh.start()?;
    let idle = [sockets(&a), sockets(&b)];
    let _echo = scene.api.serve(8080, &["--quiet", "--limit", "600"])?;
    let file = |name: &str| scene.lab.dir().join(name);
    let start = |args: &[&str], until: &PathBuf| {
        let (to, until) = (scene.api.at(8080).to_string(), until.to_string_lossy());
        scene.web.start_testpod(&[args, &["--to", &to, "--until", &until, "--millis", "600000"]].concat())
    };
    let load = start(&["load", "--workers", "16"], &file("load"))?;

    let asked = Asked::default();
    let _last = std::thread::scope(|scope| -> Result<_> {
        let askers = [&a, &b].map(|agent| {
            let (node, address, asked) = (Arc::clone(&agent.node), configs[0].admin.listen, &asked);
            scope.spawn(move || node.netns.run(|| Ok(asked.ask(address))))
        });
        let mut current = [a, b];
        let outcome = (0..5).try_for_each(|round| -> Result<()> {
            let done = file(&format!("round-{round}"));
            let ping = start(&["ping"], &done)?;
            poll::until_true("connections are open", LONG, || open(&current[1]) > 0.0)?;
            let mut olds = Vec::new();
            for ((current, config), idle) in current.iter_mut().zip(&configs).zip(idle) {
                // Either order must do: a rolling update starts the new one first, a service manager stops the old one first.
                if round % 2 == 1 {
                    current.signal(Signal::SIGTERM)?;
                }
                let new = replace(current, config)?;
                if round % 2 == 0 {
                    current.signal(Signal::SIGTERM)?;
                }
                olds.push((std::mem::replace(current, new), idle));
            }
            fs::write(done, "")?;
            let ping: Pings = ping.result()?;
            ensure!(ping.rounds > 0 && ping.error.is_none(), "round {round}: {ping:?}");
            for (old, idle) in &mut olds {
                poll::until_true("the old agent holds no connection", LONG, || sockets(old) <= *idle)?;
                ensure!(!old.kill()?.success(), "the old agent has ended by itself:\n{}", old.log_tail());
            }
            Ok(())
        });
        asked.enough.store(true, Ordering::Relaxed);
        for asker in askers {
            let failure = asker.join().map_err(|_| anyhow!("panicked"))??;
            ensure!(failure.is_none(), "the admin port was not there: {failure:?}");
        }
        outcome?;
        Ok(current)
    })?;
    fs::write(file("load"), "")?;
    let load: Load = load.result()?;
    println!("{:.0} new connections a second under ten replacements: {load:?}", load.ok as f64 / load.seconds);
    println!("{} answers of /healthz meanwhile", asked.answers.load(Ordering::Relaxed));
    assert!(load.ok > 0 && load.ok == load.attempts, "{load:?}");
    assert!(asked.answers.load(Ordering::Relaxed) > 100);
    Ok(())
}

/// The ports are enough for two generations. A third must leave the pods to the second, captured, and take them when the first
/// has ended. Nor may it forget that the pods of its node are in the mesh.
#[test]
fn a_third_generation_waits_for_ports_and_lets_no_pod_go() -> Result<()> {
    let mut scene = Scene::new("third")?;
    let db = scene.lab.a.pod("db", 12)?;
    scene.mesh.enrol(&db);
    let _db = db.serve(8080, &["--quiet"])?;
    let (mut first, _b) = scene.mesh.start()?;
    let _echo = scene.api.serve(8080, &["--quiet"])?;
    let config = scene.config_a();
    let second = replace(&first, &config)?;
    let third = Agent::spawn(&scene.lab.a, &config)?;
    poll::until_true("the third has no ports", LONG, || said(&third, "not enrolled"))?;
    let captures = scene.captures()?;
    for _ in 0..20 {
        assert!(scene.calls()?.echoed());
        assert!(scene.web.connect(db.at(8080), &["--text", MARKER, "--half-close"])?.echoed());
    }
    for trace in stop(captures)? {
        nothing_of(&trace, &scene.web)?;
    }
    second.wait_access("it still serves", |entry| entry["outcome"] == "done")?;
    first.kill()?;
    third.wait_enrolled(&config)?;
    assert!(scene.calls()?.echoed());
    third.wait_access("it serves", |entry| entry["outcome"] == "done")?;
    Ok(())
}

/// The old name leaves and the new one comes, in the same network namespace: the end of the one must not undo the other.
#[test]
fn a_renamed_workload_stays_captured() -> Result<()> {
    let scene = Scene::new("rename")?;
    let quick = |config: &mut Config| {
        config.timeouts.insert("unenrolGrace".into(), "200ms".into());
        config.timeouts.insert("drain".into(), "1s".into());
    };
    let (a, _b) = scene.mesh.start_with(quick)?;
    let _echo = scene.api.serve(8080, &["--quiet"])?;
    let mut config = scene.config_a();
    quick(&mut config);
    config.workload("web").name = "front".into();
    a.reload(&config)?;
    a.wait_enrolled(&config)?;
    poll::until_true("the old name has left", LONG, || said(&a, "left"))?;
    a.wait_enrolled(&config)?;
    let captures = scene.captures()?;
    assert!(scene.calls()?.echoed());
    for trace in stop(captures)? {
        nothing_of(&trace, &scene.web)?;
    }
    Ok(())
}

/// A restart must not call a pod of its own node in plaintext because that pod's SVID is not there yet.
#[test]
fn a_restart_without_svids_calls_nobody_in_plaintext() -> Result<()> {
    let lab = Lab::new("svidless")?;
    let (web, db) = (lab.a.pod("web", 10)?, lab.a.pod("db", 11)?);
    let mut mesh = Mesh::new(&lab);
    mesh.enrol(&web);
    mesh.enrol(&db);
    mesh.service("db", &["172.20.0.11"], &[(80, 8080)], &[&db])?;
    let source = lab.dir().join("identities");
    let ca = Ca::new(TRUST_DOMAIN)?;
    for name in ["web", "db"] {
        ca.svid(name)?.write(&source, NAMESPACE, name)?;
    }
    let mut config = mesh.config(&lab.a);
    config.identity = json!({ "source": "files", "files": { "dir": source } });
    config.workloads.iter_mut().for_each(|workload| workload.spiffe_id = None);
    config.timeouts.insert("svidWait".into(), "1s".into());
    let mut agent = Agent::start(&lab.a, &config)?;
    let _echo = db.serve(8080, &["--quiet"])?;
    let ways = [db.at(8080), db.at6(8080), "172.20.0.11:80".parse()?];
    for to in ways {
        assert!(web.connect(to, &["--text", MARKER, "--half-close"])?.echoed(), "{to}");
    }
    agent.kill()?;
    let svid = source.join(NAMESPACE).join("db");
    fs::rename(&svid, source.join("aside"))?;
    let agent = Agent::spawn(&lab.a, &config)?;
    agent.wait_ready()?;
    let captures = [Capture::start(&lab.a.netns, &web.veth)?, Capture::start(&lab.a.netns, &db.veth)?];
    for to in ways {
        let outcome = web.connect(to, &["--text", MARKER, "--half-close", "--limit", "5000"])?;
        assert!(outcome.received == 0 && outcome.error.is_some(), "{to}: {outcome:?}");
    }
    for trace in stop(captures)? {
        nothing_of(&trace, &web)?;
    }
    agent.wait_access("the callee's ID is not known", |entry| entry["outcome"] == "identity_pending")?;
    fs::rename(source.join("aside"), svid)?;
    agent.wait_enrolled(&config)?;
    for to in ways {
        assert!(web.connect(to, &["--text", MARKER, "--half-close"])?.echoed(), "{to}");
    }
    Ok(())
}

#[test]
fn a_stopped_agent_leaves_its_pods_captured() -> Result<()> {
    let scene = Scene::new("stop")?;
    let short = |config: &mut Config| drop(config.timeouts.insert("drain".into(), "500ms".into()));
    let (mut a, mut b) = scene.mesh.start_with(short)?;
    let _echo = scene.api.serve(8080, &["--quiet"])?;
    assert!(scene.calls()?.echoed());
    let to = scene.api.at(8080).to_string();
    let open = scene.web.start_testpod(&["ping", "--to", &to, "--millis", "600000"])?;
    poll::until_true("it is open", LONG, || self::open(&a) > 0.0)?;
    assert!(a.stop()?.success());
    let pings: Pings = open.result()?;
    assert_eq!(pings.error.as_deref(), Some("ECONNRESET"), "{pings:?}");
    assert!(b.stop()?.success());
    let captures = scene.captures()?;
    let tried = scene.tries(&scene.web)?;
    assert!(!tried.connected, "{tried:?}");
    let tried = scene.tries(&scene.stranger)?;
    assert_eq!((tried.connected, tried.error.as_deref()), (false, Some("ECONNREFUSED")), "{tried:?}");
    for trace in stop(captures)? {
        assert!(!trace.contains(MARKER.as_bytes())?);
    }
    let (_a, _b) = scene.mesh.start_with(short)?;
    assert!(scene.calls()?.echoed());
    Ok(())
}

#[test]
fn a_changed_file_is_followed_and_a_bad_one_refused() -> Result<()> {
    let scene = Scene::new("reload")?;
    let (_a, b) = scene.mesh.start()?;
    let _echo = scene.api.serve(8080, &["--quiet"])?;
    let good = scene.mesh.config(&scene.lab.b);
    let mut closed = good.clone();
    closed.policies[0]["listener"]["allow"] = json!([]);
    let serves = |wanted: bool| {
        poll::until_true("the policy holds", LONG, || scene.calls().is_ok_and(|outcome| outcome.echoed() == wanted))
    };
    serves(true)?;
    // Without a signal; then by one.
    fs::write(config_file(&scene.lab.b), closed.yaml()?)?;
    serves(false)?;
    b.reload(&good)?;
    serves(true)?;

    let errors = || {
        b.log()
            .into_iter()
            .filter(|line| line["level"] == "ERROR")
            .filter_map(|line| line["errors"].as_str().map(str::to_owned))
    };
    let refused = |what: &str, text: &str, words: &str| -> Result<()> {
        let before = errors().count();
        b.reload_text(text)?;
        let error = poll::until(what, PATIENCE, || errors().nth(before))?;
        ensure!(error.contains(words), "{what}: {error}");
        Ok(())
    };
    let text = closed.yaml()?;
    let line = text.lines().count() + 1;
    refused("an unknown field", &format!("{text}colour: blue\n"), &format!("{}.yaml:{line}:", b.node.name))?;
    refused("no YAML", "trustDomain: [", ":1:")?;
    let mut moved = closed.clone();
    moved.capture.listen_ports = Some("16001-16004".into());
    refused("another capture", &moved.yaml()?, "capture changed")?;
    // Each of the refused files would have closed the port.
    assert!(scene.calls()?.echoed());
    assert_eq!(b.state()?["workloads"]["shop/api"]["listener"]["default"]["mode"], "STRICT");
    Ok(())
}

#[test]
fn metrics_log_and_state_tell_what_happened() -> Result<()> {
    let scene = Scene::new("tell")?;
    let (a, b) = scene.mesh.start()?;
    let _echo = scene.api.serve(8080, &["--quiet"])?;
    for _ in 0..10 {
        assert!(scene.web.connect(scene.api.at(8080), &["--bytes", "1000", "--half-close"])?.echoed());
    }
    for _ in 0..3 {
        assert!(scene.stranger.connect(scene.api.at(8080), &["--text", "GET / HTTP/1.1\r\n\r\n"])?.refused());
    }
    for (agent, direction, workload) in [(&a, "outbound", "shop/web"), (&b, "inbound", "shop/api")] {
        let here = [("direction", direction), ("workload", workload)];
        let sum = |name: &str, label: (&'static str, &'static str)| -> Result<f64> {
            Ok(agent.metrics()?.sum(name, &[here[0], here[1], label]))
        };
        poll::until_true("the last has ended", PATIENCE, || open(agent) == 0.0)?;
        assert_eq!(sum("sealane_connections_opened_total", ("mode", "mtls"))?, 10.0);
        assert_eq!(sum("sealane_connections_closed_total", ("reason", "done"))?, 10.0);
        assert_eq!(sum("sealane_bytes_total", ("side", "app"))?, 10_000.0);
        assert_eq!(sum("sealane_bytes_total", ("side", "peer"))?, 10_000.0);
        let refused = if direction == "inbound" { 3.0 } else { 0.0 };
        assert_eq!(sum("sealane_connections_refused_total", ("reason", "not_tls"))?, refused);
        assert_eq!(agent.metrics()?.sum("sealane_connections_refused_total", &[]), refused);
        assert_eq!(agent.metrics()?.sum("sealane_pods_enrolled", &[]), 1.0);
        let access = agent.access();
        let with = |outcome: &str| access.iter().filter(|entry| entry["outcome"] == outcome).count();
        assert_eq!((with("done"), with("not_tls") as f64, access.len()), (10, refused, 10 + refused as usize));
        let bytes = |field: &str| access.iter().filter_map(|entry| entry[field].as_u64()).sum::<u64>();
        assert_eq!((bytes("bytes_from_app"), bytes("bytes_from_peer")), (10_000, 10_000));
        let ready = agent.get("/readyz")?;
        assert_eq!((ready.status, ready.body.as_str()), (200, "ready\n"));
        no_keys(&agent.state()?)?;
    }
    Ok(())
}

/// The one key on disk is the development CA's; an SVID's would show by its name or by its length.
fn no_keys(state: &Value) -> Result<()> {
    match state {
        Value::Object(fields) => fields.iter().try_for_each(|(name, value)| {
            let name = name.to_lowercase();
            ensure!(!["key", "private", "secret", "pem"].iter().any(|word| name.contains(word)), "a field {name:?}");
            no_keys(value)
        }),
        Value::Array(values) => values.iter().try_for_each(no_keys),
        Value::String(text) => {
            ensure!(!text.contains("PRIVATE") && text.len() < 100, "{text:?}");
            Ok(())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => Ok(()),
    }
}

/// A successor, started and in charge. Its admin port does not tell, since both answer on it until it is.
fn replace(old: &Agent, config: &Config) -> Result<Agent> {
    let new = Agent::spawn(&old.node, config)?;
    let served = config.workloads.len();
    poll::until_true("the successor has taken over", PATIENCE, || {
        let enrolled = new.log().iter().filter(|line| line["message"] == "enrolled").count();
        enrolled == served && said(old, "another agent has taken over")
    })
    .with_context(|| new.log_tail())?;
    Ok(new)
}

/// A client of the admin port.
#[derive(Default)]
struct Asked {
    enough: AtomicBool,
    answers: AtomicU64,
}

impl Asked {
    /// Asks until it is enough; the first failure, if any.
    fn ask(&self, admin: SocketAddr) -> Option<String> {
        while !self.enough.load(Ordering::Relaxed) {
            match http::get(admin, "/healthz") {
                Ok(answer) if answer.status == 200 => drop(self.answers.fetch_add(1, Ordering::Relaxed)),
                Ok(answer) => return Some(format!("{answer:?}")),
                Err(error) => return Some(format!("after {:?} answers: {error:#}", self.answers)),
            }
        }
        None
    }
}

/// How many sockets it holds, listeners among them.
fn sockets(agent: &Agent) -> usize {
    let fds = fs::read_dir(format!("/proc/{}/fd", agent.pid())).into_iter().flatten().flatten();
    fds.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))).count()
}

fn open(agent: &Agent) -> f64 {
    agent.metrics().map_or(-1.0, |metrics| metrics.sum("sealane_connections_open", &[]))
}

fn said(agent: &Agent, words: &str) -> bool {
    agent.log().iter().any(|line| line["message"].as_str().is_some_and(|message| message.contains(words)))
}

fn stop(captures: impl IntoIterator<Item = Capture>) -> Result<Vec<Trace>> {
    captures.into_iter().map(Capture::stop).collect()
}

/// The marker is in nothing that the pod sent or received, and the capture is whole.
fn nothing_of(trace: &Trace, pod: &Pod) -> Result<()> {
    let own = [pod.at(0).ip(), pod.at6(0).ip()];
    let mut flows = trace.flows.iter().filter(|flow| own.contains(&flow.src.ip()) || own.contains(&flow.dst.ip()));
    flows.try_for_each(|flow| {
        let marked = flow.data.windows(MARKER.len()).any(|window| window == MARKER.as_bytes());
        ensure!(!marked, "the marker is in {} -> {}", flow.src, flow.dst);
        Ok(())
    })
}
