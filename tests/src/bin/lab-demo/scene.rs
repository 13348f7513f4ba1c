//! What the demo plays on: pods, policy, agents, a web server.

use std::fs::{self, File};
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use sealane_tests::agent::Agent;
use sealane_tests::config::{Mesh, spiffe_id};
use sealane_tests::lab::Lab;
use sealane_tests::pod::Pod;
use sealane_tests::poll;
use serde_json::json;

/// What the web server answers with, so that it can be looked for on the wire.
pub const MARKER: &str = "the-answer-in-plaintext";
/// Where nginx listens.
pub const PORT: u16 = 8080;
/// The service's virtual address.
pub const VIP: &str = "172.20.0.10";

/// Everything that is up; fields are dropped in this order.
pub struct Scene {
    /// nginx, in `api`.
    _server: Server,
    /// The agent of node-a.
    pub agent_a: Agent,
    /// The agent of node-b.
    pub agent_b: Agent,
    /// Enrolled, on node-a, and allowed to call `api`.
    pub web: Pod,
    /// Enrolled, on node-a, and not allowed to.
    pub batch: Pod,
    /// Not enrolled, on node-a.
    pub stranger: Pod,
    /// Enrolled, on node-b, STRICT.
    pub api: Pod,
    /// The nodes.
    pub lab: Lab,
}

/// A child that dies with the scene.
pub struct Server(Child);

impl Scene {
    /// Brings it up.
    pub fn set(name: &str) -> Result<Self> {
        say("two nodes, joined by one wire; four pods");
        let lab = Lab::named(name)?;
        let (web, batch, stranger) = (lab.a.pod("web", 10)?, lab.a.pod("batch", 12)?, lab.a.pod("stranger", 66)?);
        let api = lab.b.pod("api", 11)?;
        say("nginx in the pod api, on node-b");
        let server = nginx(&lab, &api)?;
        say("an agent on each node");
        let mut mesh = Mesh::new(&lab);
        for pod in [&web, &batch, &api] {
            mesh.enrol(pod);
        }
        mesh.service("api", &[VIP], &[(80, PORT)], &[&api])?;
        mesh.policy(
            "api",
            json!({ "listener": { "mode": "STRICT", "allow": [{ "from": [spiffe_id("web")], "ports": [PORT] }] } }),
        );
        let (mut agent_a, mut agent_b) = mesh.start()?;
        agent_a.show_log = false;
        agent_b.show_log = false;
        Ok(Self { _server: server, agent_a, agent_b, web, batch, stranger, api, lab })
    }
}

/// curl inside a pod.
pub fn curl(pod: &Pod, url: &str) -> Result<Output> {
    let mut curl = pod.command("curl");
    curl.args(["--silent", "--show-error", "--max-time", "5", url]).stdin(Stdio::null());
    curl.output().context("cannot run curl")
}

/// Progress.
pub fn say(what: &str) {
    eprintln!("==> {what}");
}

fn nginx(lab: &Lab, pod: &Pod) -> Result<Server> {
    let dir = lab.dir().join("nginx");
    fs::create_dir_all(&dir)?;
    let dir = dir.display();
    let config = format!(
        "daemon off; master_process off; pid {dir}/pid; error_log stderr;
         events {{}}
         http {{
           access_log off;
           client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fastcgi;
           uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;
           server {{
             listen {PORT}; listen [::]:{PORT};
             location / {{ default_type text/plain; return 200 \"{MARKER}: hello $remote_addr\\n\"; }}
           }}
         }}\n"
    );
    let file = lab.dir().join("nginx.conf");
    fs::write(&file, config)?;
    let log = File::create(lab.dir().join("nginx.log"))?;
    let mut nginx = pod.command("nginx");
    nginx.arg("-c").arg(&file).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let server = Server(nginx.spawn().context("cannot start nginx")?);
    let url = format!("http://{}/", pod.at(PORT));
    let up = poll::until_true("nginx answers", Duration::from_secs(10), || {
        curl(pod, &url).is_ok_and(|out| out.status.success())
    });
    up.with_context(|| fs::read_to_string(lab.dir().join("nginx.log")).unwrap_or_default())?;
    Ok(server)
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
