//! What is compared.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use sealane_tests::agent::Agent;
use sealane_tests::config::{Mesh, spiffe_id};
use sealane_tests::lab::WIRE;
use sealane_tests::report::{ECHO, Sample};
use sealane_tests::wire::Capture;
use sealane_tests::wire::tls::{self, TLS13, X25519_MLKEM768};
use serde_json::json;

use crate::envoy;
use crate::site::{Daemon, PORT, Site, tune_captured};
use crate::usage;
use crate::workload::Workload;

/// RFC 8446, section 4.2.7.
const X25519: u16 = 0x001d;

/// One of them, at its place; fields are dropped in this order.
#[derive(Debug)]
pub struct Subject {
    /// As the table and the numbers show it.
    pub name: &'static str,
    /// Client's side first.
    proxies: Vec<Proxy>,
    /// Where the client connects to.
    to: SocketAddr,
    /// The server's port on the wire.
    port: u16,
    site: Site,
}

#[derive(Debug)]
enum Proxy {
    Envoy(Daemon),
    Sealane(Agent),
}

impl Subject {
    /// Nothing in between.
    pub fn raw() -> Result<Self> {
        let site = Site::new("raw")?;
        Self { name: "raw", proxies: Vec::new(), to: site.server.at(PORT), port: PORT, site }.ready()
    }

    /// A sidecar in each pod.
    pub fn envoy(binary: &Path) -> Result<Self> {
        let site = Site::new("envoy")?;
        let (pair, to) = envoy::pair(binary, &site)?;
        let proxies = pair.into_iter().map(Proxy::Envoy).collect();
        Self { name: "Envoy", proxies, to, port: envoy::TLS_PORT, site }.ready()
    }

    /// An agent on each node; the pods are enrolled, STRICT, and the server's allows the client alone.
    pub fn sealane() -> Result<Self> {
        let site = Site::new("sealane")?;
        let mut mesh = Mesh::new(&site.lab);
        mesh.enrol(&site.client);
        mesh.enrol(&site.server);
        mesh.policy("api", json!({ "listener": { "mode": "STRICT", "allow": [{ "from": [spiffe_id("web")] }] } }));
        let (mut a, mut b) = mesh.start()?;
        a.show_log = false;
        b.show_log = false;
        for pod in [&site.client, &site.server] {
            tune_captured(pod)?;
        }
        let proxies = [a, b].map(Proxy::Sealane).into();
        Self { name: "Sealane", proxies, to: site.server.at(PORT), port: PORT, site }.ready()
    }

    /// Runs it under this load.
    pub fn load(&self, workload: &Workload, seconds: f64) -> Result<Sample> {
        let done = self.site.load(workload.kind.subcommand(), self.to, workload.connections, seconds);
        done.with_context(|| format!("{}: {}", self.name, workload.name))
    }

    /// What passes between the nodes: fails where a proxy does not encrypt, which would make its figures void.
    pub fn on_the_wire(&self) -> Result<String> {
        let capture = Capture::start(&self.site.lab.a.netns, WIRE)?;
        self.site.load("crr", self.to, 1, 0.0)?;
        let trace = capture.stop()?;
        let plaintext = trace.flows.iter().any(|flow| flow.data.windows(ECHO.len()).any(|window| window == ECHO));
        if self.proxies.is_empty() {
            ensure!(plaintext, "{}: the echo did not pass the wire as it is", self.name);
            return Ok("plaintext".to_owned());
        }
        ensure!(!plaintext, "{} lets plaintext pass between the nodes", self.name);
        // An earlier connection may still be ending: its flow has no hello.
        let answers = trace.from_port(self.port).filter_map(tls::read).filter(|tls| tls.whole);
        let hello = answers.filter_map(|tls| tls.hello).next();
        let hello = hello.with_context(|| format!("{} does not speak TLS between the nodes", self.name))?;
        ensure!(hello.version == TLS13, "{}: not TLS 1.3 but {:#06x}", self.name, hello.version);
        let group = match hello.group {
            Some(X25519_MLKEM768) => "X25519MLKEM768".to_owned(),
            Some(X25519) => "X25519".to_owned(),
            other => format!("group {other:04x?}"),
        };
        Ok(format!("TLS 1.3, {group}"))
    }

    /// CPU time of both proxies so far.
    pub fn cpu_seconds(&self) -> Result<f64> {
        self.proxies.iter().map(|proxy| usage::cpu_seconds(proxy.pid())).sum()
    }

    /// Resident memory of each proxy, in KiB.
    pub fn memory(&self) -> Result<Vec<u64>> {
        self.proxies.iter().map(|proxy| usage::resident_kib(proxy.pid())).collect()
    }

    /// The cgroup of all its processes.
    pub fn cgroup(&self) -> PathBuf {
        let node = self.site.lab.a.cgroup();
        node.parent().unwrap_or(node).to_owned()
    }

    fn ready(self) -> Result<Self> {
        self.site.wait_for(self.to).with_context(|| self.name)?;
        Ok(self)
    }
}

impl Proxy {
    fn pid(&self) -> u32 {
        match self {
            Self::Envoy(daemon) => daemon.pid(),
            Self::Sealane(agent) => agent.pid().as_raw().cast_unsigned(),
        }
    }
}
