//! Two pods on two nodes, and the server of the load in one of them. Each subject has one of its own, all made alike.

use std::io;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sealane_tests::lab::Lab;
use sealane_tests::pod::Pod;
use sealane_tests::poll;
use sealane_tests::report::Sample;
use sealane_tests::testpod::binary;

/// Where the server listens.
pub const PORT: u16 = 8080;

const START: Duration = Duration::from_secs(20);

/// The place of one subject; fields are dropped in this order.
#[derive(Debug)]
pub struct Site {
    _server: Daemon,
    /// Runs the clients; `web`.
    pub client: Pod,
    /// Runs the server; `api`.
    pub server: Pod,
    /// The nodes.
    pub lab: Lab,
}

/// A process that dies with its owner.
#[derive(Debug)]
pub struct Daemon(Child);

impl Site {
    /// Brings it up.
    pub fn new(name: &str) -> Result<Self> {
        let lab = Lab::new(name)?;
        let (client, server) = (lab.a.pod("web", 10)?, lab.b.pod("api", 11)?);
        for pod in [&client, &server] {
            tune(pod)?;
        }
        let mut serve = server.command(binary("loadgen")?);
        serve.args(["serve", "--listen", &format!("0.0.0.0:{PORT}")]);
        Ok(Self { _server: Daemon::start(serve)?, client, server, lab })
    }

    /// Waits until the server answers through whatever stands at this address.
    pub fn wait_for(&self, to: SocketAddr) -> Result<()> {
        poll::until_true(&format!("an echo from {to}"), START, || self.load("crr", to, 1, 0.0).is_ok())
    }

    /// Runs `loadgen` in the client's pod.
    pub fn load(&self, subcommand: &str, to: SocketAddr, connections: usize, seconds: f64) -> Result<Sample> {
        let mut load = self.client.command(binary("loadgen")?);
        load.args([subcommand, "--to", &to.to_string(), "--connections", &connections.to_string()]);
        let out = load.args(["--seconds", &seconds.to_string()]).stdin(Stdio::null()).output()?;
        ensure!(out.status.success(), "loadgen {subcommand}: {}", String::from_utf8_lossy(&out.stderr).trim());
        Ok(serde_json::from_slice(&out.stdout)?)
    }
}

impl Daemon {
    /// Starts it; its output goes nowhere, its errors to ours.
    pub fn start(mut command: Command) -> Result<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Ok(Self(child.with_context(|| format!("cannot start {command:?}"))?))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _: io::Result<()> = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The routes of a captured connection, which come with the pod's enrolment, get the congestion control of all others.
pub fn tune_captured(pod: &Pod) -> Result<()> {
    pod.netns.ip(&format!("route change local default dev lo table 24225 src {} metric 100 congctl cubic\n", pod.v4))
}

/// Cubic, by route, since a machine may have bbr, which paces veth and loopback and hides what is between; and ports
/// for many short connections.
fn tune(pod: &Pod) -> Result<()> {
    let ip = pod.v4;
    pod.netns.ip(&format!(
        "route change default via 169.254.1.1 dev eth0 congctl cubic
         route change local {ip} dev eth0 table local proto kernel scope host src {ip} congctl cubic
         route change local 127.0.0.0/8 dev lo table local proto kernel scope host src 127.0.0.1 congctl cubic
         route change local 127.0.0.1 dev lo table local proto kernel scope host src 127.0.0.1 congctl cubic\n"
    ))?;
    pod.netns.sysctl("net/ipv4/ip_local_port_range", "16384 65535")?;
    pod.netns.sysctl("net/ipv4/tcp_tw_reuse", "1")
}
