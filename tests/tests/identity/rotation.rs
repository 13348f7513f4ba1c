//! New SVIDs and new roots in place of the old.

use std::fs;

use anyhow::{Context, Result, anyhow};
use sealane_tests::agent::Agent;
use sealane_tests::ca::{Ca, Svid};
use sealane_tests::config::{TRUST_DOMAIN, spiffe_id};
use sealane_tests::files::Files;
use sealane_tests::pod::Pod;
use sealane_tests::poll;
use sealane_tests::report::{Load, TlsOutcome};
use sealane_tests::trio::Trio;
use serde_json::{Value, json};

use crate::{
    MARKER, SEND, SOON, failures, hours, identity, ping, reset_in_the_end, started, svid_until, wait_echoes,
    wait_identity, wait_open,
};

#[test]
fn new_connections_use_the_new_svid_at_once_and_none_is_lost() -> Result<()> {
    const COUNT: u64 = 1_000;
    let (trio, files, a, b) = started("rotation")?;
    let _server = trio.api.serve(8080, &[])?;
    let long = ping(&trio.web, &trio.api)?;
    wait_open(&b, "api", 1.0)?;
    let (to, count) = (trio.api.at(8080).to_string(), COUNT.to_string());
    let load = ["load", "--to", &to, "--workers", "4", "--count", &count, "--limit", "20000"];
    let load = trio.web.start_testpod(&load)?;
    let (load, rotations) = std::thread::scope(|scope| {
        let load = scope.spawn(|| load.result::<Load>());
        let mut rotations = 0;
        while !load.is_finished() {
            rotations += 1;
            let expiry = hours(1 + rotations);
            for (agent, pod) in [(&a, "web"), (&b, "api")] {
                files.give(pod, &svid_until(&files.ca, pod, expiry)?)?;
                wait_identity(agent, pod, "notAfter", &json!(expiry))?;
                let shown = agent
                    .metrics()?
                    .sum("sealane_svid_expiry_timestamp_seconds", &[("workload", &format!("shop/{pod}"))]);
                assert_eq!(shown, expiry as f64, "{pod}");
            }
            assert_eq!(stranger(&trio, &files.ca)?.peer_not_after, i64::try_from(expiry).ok());
        }
        Ok::<_, anyhow::Error>((load.join().map_err(|_| anyhow!("panicked"))??, rotations))
    })?;
    println!("{rotations} rotations, {load:?}");
    assert!(load.ok == COUNT && load.failures.is_empty(), "{load:?}");
    assert!(rotations >= 3, "{rotations} rotations under load");
    wait_echoes(&a, "web")?;
    assert_eq!((failures(&a), failures(&b)), (vec![], vec![]));
    for (agent, local, peer) in [(&a, "web", "api"), (&b, "api", "web")] {
        agent.wait_access("both IDs", |e| e["local_id"] == *spiffe_id(local) && e["peer_id"] == *spiffe_id(peer))?;
    }
    drop(long);
    Ok(())
}

#[test]
fn a_root_that_leaves_the_clients_bundle_takes_its_connections_along() -> Result<()> {
    root_leaves("root-a", "web")
}

#[test]
fn a_root_that_leaves_the_servers_bundle_takes_its_connections_along() -> Result<()> {
    root_leaves("root-b", "api")
}

/// The old root leaves `first`'s bundle before the other's.
fn root_leaves(lab: &str, first: &str) -> Result<()> {
    let (trio, files, a, b) = started(lab)?;
    let _server = trio.api.serve(8080, &[])?;
    let (old, new) = (&files.ca, Ca::new(TRUST_DOMAIN)?);
    let both = [old.bundle(), new.bundle()].concat();
    let mut agents = [(&a, "web"), (&b, "api")];
    agents.sort_by_key(|(_, pod)| *pod != first);
    let [forgets, follows] = agents;
    let by_old = ping(&trio.web, &trio.api)?;
    wait_open(&b, "api", 1.0)?;
    for (number, signer) in [(2, old), (3, &new)] {
        for (agent, pod) in agents {
            give(&files, agent, pod, signer, &both, hours(number))?;
        }
    }
    let _by_new = ping(&trio.web, &trio.api)?;
    wait_open(&a, "web", 2.0)?;
    wait_open(&b, "api", 2.0)?;

    give(&files, forgets.0, forgets.1, &new, new.bundle(), hours(4))?;
    forgets.0.wait_access("the end of what rests on the old root", |entry| entry["outcome"] == "bundle_changed")?;
    reset_in_the_end(by_old)?;
    wait_open(&a, "web", 1.0)?;
    wait_open(&b, "api", 1.0)?;
    wait_echoes(&a, "web")?;
    if first == "api" {
        forgets.0.refuses("inbound", "certificate_untrusted", || {
            let outcome = stranger(&trio, old)?;
            anyhow::ensure!(outcome.text.is_empty(), "{outcome:?}");
            Ok(())
        })?;
    }
    let ended = failures(&a).len() + failures(&b).len();
    give(&files, follows.0, follows.1, &new, new.bundle(), hours(5))?;
    wait_echoes(&a, "web")?;
    assert!(trio.web.connect(trio.api.at(8080), &SEND)?.echoed());
    assert_eq!(failures(&a).len() + failures(&b).len(), ended, "nothing else ended");
    Ok(())
}

#[test]
fn a_set_that_is_not_whole_changes_nothing_but_the_log() -> Result<()> {
    let (trio, files, a, b) = started("half")?;
    let _server = trio.api.serve(8080, &[])?;
    let _long = ping(&trio.web, &trio.api)?;
    let now = svid_until(&files.ca, "api", hours(2))?;
    files.give("api", &now)?;
    wait_identity(&b, "api", "state", &json!("ready"))?;
    let expiry = poll::until("the first rotation", SOON, || {
        let expiry = identity(&b, "api").ok()?["notAfter"].clone();
        (expiry.as_u64()? > hours(1) + 60).then_some(expiry)
    })?;

    // In an order in which no mixture of two neighbours is a set, should the agent look between two writes.
    let later = hours(3);
    let next = svid_until(&files.ca, "api", later)?;
    let chain_alone = Svid { key: now.key.clone(), ..next.clone() };
    let half_a_chain = Svid { chain: next.chain[..next.chain.len() / 2].to_owned(), ..now.clone() };
    let no_key = Svid { key: String::new(), ..next.clone() };
    let leaf_as_root = Svid { bundle: now.chain.clone(), ..now.clone() };
    for (set, file) in [
        (chain_alone, "key.pem: the private key is not the leaf's"),
        (half_a_chain, "svid.pem"),
        (no_key, "key.pem"),
        (leaf_as_root, "bundle.pem: certificate 1"),
    ] {
        let seen = b.log().len();
        files.give("api", &set)?;
        complains(&b, seen, file)?;
        unharmed(&trio, &b, &expiry)?;
    }
    for file in ["bundle.pem", "key.pem"] {
        files.give("api", &now)?;
        let seen = b.log().len();
        fs::remove_file(files.set("api").join(file))?;
        complains(&b, seen, file)?;
        unharmed(&trio, &b, &expiry)?;
    }
    files.give("api", &next)?;
    wait_identity(&b, "api", "notAfter", &json!(later))?;
    unharmed(&trio, &b, &json!(later))?;
    wait_echoes(&a, "web")?;
    assert_eq!((failures(&a), failures(&b)), (vec![], vec![]));
    Ok(())
}

/// The agent logs, after the lines it had `seen`, that it refused a set, and why.
fn complains(agent: &Agent, seen: usize, why: &str) -> Result<()> {
    let says = |line: &Value, key: &str, text: &str| line[key].as_str().is_some_and(|found| found.contains(text));
    let refused = |line: &Value| says(line, "message", "set of identity files is refused") && says(line, "error", why);
    poll::until_true(why, SOON, || agent.log().iter().skip(seen).any(refused)).with_context(|| agent.log_tail())
}

fn unharmed(trio: &Trio, b: &Agent, expiry: &Value) -> Result<()> {
    let shown = identity(b, "api")?;
    assert!(shown["state"] == "ready" && shown["notAfter"] == *expiry, "{shown}");
    let outcome = trio.web.connect(trio.api.at(8080), &SEND)?;
    assert!(outcome.echoed(), "{outcome:?}");
    Ok(())
}

/// Gives a pod an SVID and a bundle, and waits until its agent has them.
fn give(files: &Files, agent: &Agent, pod: &str, signer: &Ca, bundle: &str, expiry: u64) -> Result<()> {
    files.give(pod, &Svid { bundle: bundle.to_owned(), ..svid_until(signer, pod, expiry)? })?;
    wait_identity(agent, pod, "notAfter", &json!(expiry))
}

/// A call of `api` by a TLS client outside the mesh with an SVID of this CA's.
fn stranger(trio: &Trio, ca: &Ca) -> Result<TlsOutcome> {
    let out: &Pod = &trio.out;
    let (cert, key) = ca.svid("out")?.write_pair(&trio.lab.dir(), "out")?;
    let (to, cert, key) = (trio.api.at(8080).to_string(), cert.to_string_lossy(), key.to_string_lossy());
    out.testpod(&["tls", "--to", &to, "--text", MARKER, "--cert", &cert, "--key", &key])
}
