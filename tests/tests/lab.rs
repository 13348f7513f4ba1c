//! The lab itself, without agents: pods reach each other, captures see it, and nothing is left behind.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use sealane_tests::lab::{Lab, WIRE};
use sealane_tests::report::{End, Event};
use sealane_tests::wire::Capture;
use sealane_tests::{cgroup, netns, poll};

const MARKER: &str = "a-marker-that-nobody-else-sends";

#[test]
fn pods_reach_each_other_and_the_wire_shows_it() -> Result<()> {
    let lab = Lab::new("reach")?;
    let (web, api) = (lab.a.pod("web", 10)?, lab.b.pod("api", 11)?);
    let server = api.serve(8080, &["--mode", "echo"])?;
    for (from, to) in [(web.at(0), api.at(8080)), (web.at6(0), api.at6(8080))] {
        let capture = Capture::start(&lab.a.netns, WIRE)?;
        let big = web.connect(to, &["--bytes", "3000000", "--half-close"])?;
        let marked = web.connect(to, &["--text", MARKER, "--half-close"])?;
        let trace = capture.stop()?;
        assert!(big.echoed() && big.sent == 3_000_000, "{to}: {big:?}");
        assert_eq!((marked.text.as_str(), marked.end), (MARKER, End::Eof), "{to}");
        assert!(trace.contains(MARKER.as_bytes())?, "{to}: the capture does not show the marker");
        assert!(!trace.contains(b"a-marker-that-was-never-sent")?);
        assert!(trace.to_port(8080).any(|flow| flow.data.len() == 3_000_000 && flow.missing == 0 && flow.fin));
        assert!(trace.to_port(8080).all(|flow| flow.src.ip() == from.ip()));
    }
    for ip in [web.at(0).ip(), web.at6(0).ip()] {
        server.wait(Duration::from_secs(5), |event| match event {
            Event::Accepted { peer, getpeername, .. } => peer.ip() == ip && *getpeername == Some(*peer),
            Event::Listening { .. } | Event::Closed { .. } => false,
        })?;
    }
    Ok(())
}

#[test]
fn pods_of_one_node_and_the_node_itself_reach_a_pod() -> Result<()> {
    let lab = Lab::new("local")?;
    let (web, api) = (lab.a.pod("web", 10)?, lab.a.pod("api", 11)?);
    let _server = api.serve(8080, &["--mode", "hash"])?;
    let args = ["--text", "x", "--half-close"];
    for (who, outcome) in [("pod", web.connect(api.at(8080), &args)?), ("node", lab.a.connect(api.at(8080), &args)?)] {
        let digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881";
        assert_eq!((outcome.text.trim(), outcome.end), (digest, End::Eof), "{who}");
    }
    Ok(())
}

#[test]
fn a_pod_dies_whole_and_its_name_and_address_are_free_again() -> Result<()> {
    let lab = Lab::new("reuse")?;
    let web = lab.a.pod("web", 10)?;
    for _ in 0..3 {
        let api = lab.b.pod("api", 11)?;
        let server = api.serve(8080, &[])?;
        assert!(web.connect(api.at(8080), &["--text", "x", "--half-close"])?.echoed());
        let pid = server.pid().to_string();
        drop(api);
        poll::until_true("the server died with its pod", Duration::from_secs(5), || has_ended(&pid))?;
    }
    Ok(())
}

#[test]
fn nothing_is_left_behind_not_even_by_a_panic() -> Result<()> {
    let name = std::thread::spawn(|| {
        let lab = Lab::new("panic").unwrap();
        let pod = lab.a.pod("web", 10).unwrap();
        let _server = pod.serve(8080, &[]).unwrap();
        fs::create_dir(&lab.a.bpffs).unwrap();
        std::panic::resume_unwind(Box::new(lab.name().to_owned()));
    });
    let name = *name.join().unwrap_err().downcast::<String>().unwrap();
    for dir in [Path::new(netns::DIR), &cgroup::root()?, Path::new("/sys/fs/bpf"), &std::env::temp_dir()] {
        let left = fs::read_dir(dir)?.flatten().find(|entry| entry.file_name().to_string_lossy().starts_with(&name));
        assert!(left.is_none(), "{left:?}");
    }
    Ok(())
}

/// Runs itself as the process that is killed.
#[test]
fn what_a_killed_run_left_is_swept() -> Result<()> {
    const CHILD: &str = "SEALANE_LAB_TO_BE_KILLED";
    if std::env::var_os(CHILD).is_some() {
        let lab = Lab::new("orphan")?;
        let pod = lab.a.pod("web", 10)?;
        let server = pod.serve(8080, &[])?;
        println!("\nleft {} {}", lab.name(), server.pid());
        loop {
            std::thread::park();
        }
    }
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--exact", "what_a_killed_run_left_is_swept", "--nocapture"])
        .env(CHILD, "1")
        .stdout(Stdio::piped())
        .spawn()?;
    let out = BufReader::new(child.stdout.take().context("stdout")?);
    let left =
        out.lines().map_while(Result::ok).find(|line| line.starts_with("left ")).context("the child said nothing")?;
    child.kill()?;
    child.wait()?;
    let (name, pid) = left["left ".len()..].split_once(' ').context("two words")?;
    assert!(cgroup::root()?.join(name).exists());
    let _lab = Lab::new("sweeper")?;
    assert!(!cgroup::root()?.join(name).exists());
    assert!(!Path::new(netns::DIR).join(format!("{name}-node-a-web")).exists());
    assert!(!std::env::temp_dir().join(name).exists());
    poll::until_true("the server has died", Duration::from_secs(5), || has_ended(pid))
}

fn has_ended(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}
