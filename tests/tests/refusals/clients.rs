//! Clients from a pod that is not enrolled, across the wire.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sealane_tests::agent::Agent;
use sealane_tests::pod::Pod;
use sealane_tests::poll;
use sealane_tests::report::{End, Event, TlsOutcome};
use sealane_tests::testpod::Server;
use serde_json::json;

use crate::{MARKER, SEND, SOON, Scene, accepted, camel};

/// A TLS record, 383 bytes long, in which a ClientHello begins.
const HELLO_BEGINS: &[u8] = &[22, 3, 1, 1, 0x7f, 1, 0, 1, 0x7b, 3, 3];

#[test]
fn a_client_with_a_bad_certificate_is_refused_and_never_falls_back_to_plaintext() -> Result<()> {
    let allow = json!([{ "from": ["spiffe://lab.example/web", "spiffe://lab.example/out"] }]);
    let ports = json!([{ "port": 8081, "mode": "STRICT" }]);
    let scene = Scene::new("clients", json!({ "mode": "PERMISSIVE", "ports": ports, "allow": allow }))?;
    let (api, out, dir) = (&scene.trio.api, &scene.trio.out, scene.trio.lab.dir());
    let servers = [api.serve(8080, &[])?, api.serve(8081, &[])?];
    let (_a, b) = scene.start()?;

    let mut bad: Vec<_> =
        scene.bad_svids("out")?.into_iter().map(|(svid, reason, alert)| (Some(svid), reason, alert)).collect();
    bad.push((Some(scene.files.ca.svid("nobody")?), "not_allowed", "access_denied"));
    bad.push((None, "certificate_missing", "certificate_required"));
    for (number, (svid, reason, alert)) in bad.iter().enumerate() {
        let pair = svid.as_ref().map(|svid| svid.write_pair(&dir, &number.to_string())).transpose()?;
        let pair = pair.as_ref().map(|(cert, key)| (cert.as_path(), key.as_path()));
        for to in [api.at(8080), api.at6(8080), api.at(8081), api.at6(8081)] {
            let entry = b.refuses("inbound", reason, || {
                let outcome = tls(out, to, pair, &[])?;
                let told = outcome.error.as_ref().is_some_and(|error| error.ends_with(&camel(alert)));
                ensure!(told && outcome.text.is_empty(), "{alert} expected: {outcome:?}");
                Ok(())
            })?;
            assert_eq!((&entry["peer_id"], &entry["local_id"]), (&json!(null), &json!("spiffe://lab.example/api")));
        }
    }
    for to in [api.at(8080), api.at(8081)] {
        b.refuses("inbound", "tls_version", || {
            let outcome = tls(out, to, None, &["--tls12"])?;
            let told = outcome.error.as_ref().is_some_and(|error| error.ends_with("ProtocolVersion"));
            ensure!(told && !outcome.handshake, "{outcome:?}");
            Ok(())
        })?;
    }
    assert_eq!(servers.each_ref().map(accepted), [0, 0], "accepted nothing of it");

    // It is the flaw alone that was refused, and the agent lives.
    let (cert, key) = scene.files.ca.svid("out")?.write_pair(&dir, "sound")?;
    for (to, server) in [(api.at(8080), &servers[0]), (api.at6(8081), &servers[1])] {
        let outcome = tls(out, to, Some((&cert, &key)), &[])?;
        assert_eq!((outcome.text.as_str(), outcome.error), (MARKER, None), "{to}");
        assert_eq!(outcome.peer_ids, ["spiffe://lab.example/api"]);
        lives(&scene, to, server, 2)?;
    }
    Ok(())
}

#[test]
fn what_is_no_handshake_is_reset_without_an_answer() -> Result<()> {
    let scene = Scene::new("garbage", json!({ "mode": "STRICT" }))?;
    let (api, out) = (&scene.trio.api, &scene.trio.out);
    let server = api.serve(8080, &[])?;
    let (_a, b) = scene.start()?;
    let noise: Vec<u8> = (0..4096_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8 | 0x80).collect();
    for to in [api.at(8080), api.at6(8080)] {
        for bytes in [&noise, &noise[..1], b"GET / HTTP/1.1\r\nHost: api\r\n\r\n", b"\n", b"\x80\x2e\x01\0\x02"] {
            unanswered(&b, out, "not_tls", |_| speak(to, bytes))?;
        }
    }
    b.refuses("inbound", "handshake_closed", || {
        out.netns.run(|| {
            TcpStream::connect(api.at(8080))?.write_all(HELLO_BEGINS)?;
            Ok(())
        })
    })?;
    // Longer than a handshake message can be, in record after record.
    b.refuses("inbound", "tls_misbehaved", || {
        out.netns.run(|| {
            let mut stream = dial(api.at(8080))?;
            let record = [&[22, 3, 1, 0x40, 0][..], &[1, 0xff, 0xff, 0xff], &[0; 0x4000 - 4]].concat();
            while stream.write_all(&record).is_ok() {}
            Ok(())
        })
    })?;
    assert_eq!(accepted(&server), 0, "accepted nothing of it");
    lives(&scene, api.at(8080), &server, 1)
}

#[test]
fn a_hello_that_never_ends_is_reset_in_the_end() -> Result<()> {
    let scene = Scene::new("endless", json!({ "mode": "STRICT" }))?;
    let (api, out) = (&scene.trio.api, &scene.trio.out);
    let server = api.serve(8080, &[])?;
    let (_a, b) = scene.trio.mesh.start_with(|config| scene.hasten(config))?;
    for to in [api.at(8080), api.at6(8080)] {
        unanswered(&b, out, "handshake_timeout", |_| speak(to, b""))?;
        unanswered(&b, out, "handshake_timeout", |_| speak(to, HELLO_BEGINS))?;
        unanswered(&b, out, "handshake_timeout", |_| dribble(to))?;
    }
    assert_eq!(accepted(&server), 0, "accepted nothing of it");
    // Whose own handshake may be late as well, where the machine is busy.
    poll::until_true("the agent lives", SOON, || {
        scene.trio.web.connect(api.at(8080), &SEND).is_ok_and(|outcome| outcome.echoed())
    })
}

/// A call of `web`'s is carried, and its connection is the `count`th that the application has accepted.
fn lives(scene: &Scene, to: SocketAddr, server: &Server, count: usize) -> Result<()> {
    let outcome = scene.trio.web.connect(to, &SEND)?;
    assert!(outcome.echoed(), "{to}: {outcome:?}");
    server.wait(SOON, |event| matches!(event, Event::Closed { .. }) && accepted(server) >= count)?;
    assert_eq!(accepted(server), count);
    Ok(())
}

fn tls(from: &Pod, to: SocketAddr, pair: Option<(&Path, &Path)>, more: &[&str]) -> Result<TlsOutcome> {
    let (to, mut args) = (to.to_string(), vec!["tls"]);
    args.extend(["--to", &to, "--text", MARKER]);
    args.extend(more);
    let pair = pair.map(|(cert, key)| (cert.to_string_lossy(), key.to_string_lossy()));
    if let Some((cert, key)) = &pair {
        args.extend(["--cert", cert, "--key", key]);
    }
    from.testpod(&args)
}

/// The agent refuses for this reason what `attempt` does in the pod's namespace; there is a reset and not one byte.
fn unanswered(
    agent: &Agent,
    from: &Pod,
    reason: &str,
    attempt: impl FnOnce(&Pod) -> Result<(usize, End)> + Send,
) -> Result<()> {
    agent.refuses("inbound", reason, || {
        let (received, end) = from.netns.run(|| attempt(from))?;
        ensure!((received, end) == (0, End::Reset), "{received} bytes, {end:?}");
        Ok(())
    })?;
    Ok(())
}

fn dial(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, SOON)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.set_write_timeout(Some(SOON))?;
    Ok(stream)
}

/// Writes, then reads to the end.
fn speak(to: SocketAddr, bytes: &[u8]) -> Result<(usize, End)> {
    let mut stream = dial(to)?;
    stream.write_all(bytes)?;
    let mut received = Vec::new();
    let reset = |error: &std::io::Error| error.kind() == ErrorKind::ConnectionReset;
    let end = match stream.read_to_end(&mut received) {
        Ok(_) => End::Eof,
        Err(error) if reset(&error) => End::Reset,
        Err(_) => End::Error,
    };
    Ok((received.len(), end))
}

/// A ClientHello, a byte at a time, for as long as somebody listens.
fn dribble(to: SocketAddr) -> Result<(usize, End)> {
    let mut stream = dial(to)?;
    stream.set_read_timeout(Some(Duration::from_millis(20)))?;
    stream.write_all(HELLO_BEGINS)?;
    let deadline = Instant::now() + SOON;
    while Instant::now() < deadline {
        match stream.read(&mut [0; 64]) {
            Ok(size) => return Ok((size, End::Eof)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => drop(stream.write_all(&[0])),
            Err(_) => return Ok((0, End::Reset)),
        }
    }
    Ok((0, End::Timeout))
}
