//! What there is to see.

use std::fs;
use std::io::{IsTerminal, stdout};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use sealane_tests::agent::Agent;
use sealane_tests::config::spiffe_id;
use sealane_tests::lab::WIRE;
use sealane_tests::pod::Pod;
use sealane_tests::wire::tls::{self, TLS13, X25519_MLKEM768};
use sealane_tests::wire::{Capture, Trace};
use serde_json::Value;

use crate::scene::{MARKER, PORT, Scene, VIP, curl};

/// Plays it.
pub fn all(scene: &Scene) -> Result<()> {
    let capture = Capture::start(&scene.lab.b.netns, WIRE)?;
    answer(scene)?;
    wire(&capture.stop()?)?;
    identities(scene)?;
    not_allowed(scene)?;
    no_identity(scene)?;
    metrics(scene)
}

/// curl talks plain HTTP to nginx, and gets its answer.
fn answer(scene: &Scene) -> Result<()> {
    head("The application notices nothing: plain curl, plain nginx");
    for url in [format!("http://{}/", scene.api.at(PORT)), format!("http://{VIP}/"), v6(scene)] {
        let out = curl(&scene.web, &url)?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        ensure!(out.status.success() && text.starts_with(MARKER), "{url}: {out:?}");
        println!("web$ curl {url}\n{}", text.trim_end());
        let own = if url.contains('[') { scene.web.v6.to_string() } else { scene.web.v4.to_string() };
        ensure!(text.trim_end().ends_with(&format!(" {own}")), "nginx did not see the client's address {own}: {text}");
    }
    println!("(nginx sees the addresses of the pod web, {} and {}, not the agent's)", scene.web.v4, scene.web.v6);
    Ok(())
}

/// What an onlooker between the nodes sees of it.
fn wire(trace: &Trace) -> Result<()> {
    head("On the wire between the nodes there is only TLS 1.3");
    ensure!(!trace.contains(MARKER.as_bytes())?, "the answer passed the wire in plaintext");
    ensure!(!trace.contains(b"GET / HTTP")?, "the request passed the wire in plaintext");
    let (requests, answers): (Vec<_>, Vec<_>) = (trace.to_port(PORT).collect(), trace.from_port(PORT).collect());
    ensure!(!requests.is_empty() && !answers.is_empty(), "nothing passed the wire to port {PORT}");
    for flow in requests.iter().chain(&answers) {
        let tls = tls::read(flow).with_context(|| format!("{} -> {} is no TLS", flow.src, flow.dst))?;
        ensure!(tls.whole, "{} -> {} is not TLS to its end", flow.src, flow.dst);
        let hello = tls.hello.with_context(|| format!("{} -> {} has no hello", flow.src, flow.dst))?;
        ensure!(hello.version == TLS13, "version {:#06x}", hello.version);
        let group = match hello.group {
            Some(X25519_MLKEM768) => "X25519MLKEM768".to_owned(),
            other => format!("{other:?}"),
        };
        let (who, verb) = if hello.client { ("client", "offers") } else { ("server", "chooses") };
        println!(
            "{:>21} -> {:<21} {who} {verb} TLS 1.3, {group}; then {} encrypted bytes",
            flow.src.to_string(),
            flow.dst.to_string(),
            tls.encrypted
        );
    }
    println!("(neither \"GET / HTTP\" nor {MARKER:?} is in any of its {} packets)", trace.packets.len());
    Ok(())
}

/// TLS 1.3 encrypts certificates: the wire cannot show them.
fn identities(scene: &Scene) -> Result<()> {
    head("Both ends proved their SPIFFE IDs (TLS 1.3 encrypts certificates, so this is from the agents' access logs)");
    let (web, api) = (spiffe_id("web"), spiffe_id("api"));
    for (agent, own, peer, direction) in
        [(&scene.agent_a, &web, &api, "outbound"), (&scene.agent_b, &api, &web, "inbound")]
    {
        let entry = agent.wait_access("the connection in the access log", |entry| {
            entry["direction"] == direction && entry["outcome"] == "done" && entry["peer_id"].is_string()
        })?;
        ensure!(entry["local_id"] == **own && entry["peer_id"] == **peer, "{entry}");
        print_entry(agent, &entry, &["direction", "local_id", "peer_id", "tls", "group", "outcome"]);
    }
    Ok(())
}

/// An identity that the policy does not name.
fn not_allowed(scene: &Scene) -> Result<()> {
    head("A pod with another identity is refused: the policy of api allows web alone");
    refused(&scene.batch, scene)?;
    let entry =
        scene.agent_b.wait_access("the refusal", |e| is_from(e, &scene.batch) && e["outcome"] == "not_allowed")?;
    print_entry(&scene.agent_b, &entry, &["direction", "client", "peer_id", "outcome", "message"]);
    let entry = scene.agent_a.wait_access("the other side's view", |e| e["outcome"] == "refused_by_peer")?;
    print_entry(&scene.agent_a, &entry, &["direction", "workload", "outcome", "alert", "message"]);
    Ok(())
}

/// No identity at all.
fn no_identity(scene: &Scene) -> Result<()> {
    head("A pod without an identity is refused: api is STRICT");
    refused(&scene.stranger, scene)?;
    let entry =
        scene.agent_b.wait_access("the refusal", |e| is_from(e, &scene.stranger) && e["outcome"] == "not_tls")?;
    print_entry(&scene.agent_b, &entry, &["direction", "client", "destination", "outcome", "message"]);
    Ok(())
}

fn refused(pod: &Pod, scene: &Scene) -> Result<()> {
    let url = format!("http://{}/", scene.api.at(PORT));
    let out = curl(pod, &url)?;
    ensure!(!out.status.success() && out.stdout.is_empty(), "{} got an answer: {out:?}", pod.name);
    println!("{}$ curl {url}\n{}", pod.name, String::from_utf8_lossy(&out.stderr).trim_end());
    Ok(())
}

fn is_from(entry: &Value, pod: &Pod) -> bool {
    let client = entry["client"].as_str().and_then(|client| client.parse::<SocketAddr>().ok());
    client.is_some_and(|client| client.ip() == pod.v4)
}

fn metrics(scene: &Scene) -> Result<()> {
    head("The metrics tell it all");
    for agent in [&scene.agent_a, &scene.agent_b] {
        println!("{}$ curl http://127.0.0.1:15000/metrics", agent.node.name);
        for line in agent.metrics()?.lines("sealane_connections") {
            println!("  {line}");
        }
    }
    Ok(())
}

/// For --keep.
pub fn how_to_look_around(scene: &Scene) -> Result<()> {
    let dir = scene.lab.dir().join("in");
    fs::create_dir_all(&dir)?;
    for pod in [&scene.web, &scene.batch, &scene.stranger, &scene.api] {
        let enter = format!(
            "#!/bin/sh\necho $$ >{}/cgroup.procs\nexec nsenter --net={} -- \"$@\"\n",
            pod.cgroup().display(),
            pod.netns.path().display()
        );
        let file = dir.join(&pod.name);
        fs::write(&file, enter)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    }
    head("It stays up");
    let (dir, files) = (dir.display(), scene.lab.dir());
    let (files, node) = (files.display(), scene.lab.a.netns.path());
    println!("run something in a pod:    {dir}/web curl http://{VIP}/      (also batch, stranger, api)");
    println!("ask an agent:              nsenter --net={} curl http://127.0.0.1:15000/state", node.display());
    println!("watch the wire:            nsenter --net={} tcpdump -ni {WIRE} -X tcp port {PORT}", node.display());
    println!("the agents' files, logs:   {files}/node-a.yaml, {}", scene.agent_a.log_file.display());
    println!("take it down:              cargo xtask demo --down");
    Ok(())
}

fn print_entry(agent: &Agent, entry: &Value, fields: &[&str]) {
    println!("{}:", agent.node.name);
    for field in fields.iter().filter(|field| !entry[**field].is_null()) {
        let value = entry[*field].as_str().map_or_else(|| entry[*field].to_string(), str::to_owned);
        println!("  {field:<12} {value}");
    }
}

fn v6(scene: &Scene) -> String {
    format!("http://{}/", scene.api.at6(PORT))
}

fn head(text: &str) {
    let (bold, plain) = if stdout().is_terminal() { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
    println!("\n{bold}{text}{plain}");
}
