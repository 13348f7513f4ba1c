//! An agent as a process on a lab's node, and what it tells about itself.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::config::Config;
use crate::http::{self, Response};
use crate::lab::{Node, command};
use crate::metrics::Metrics;
use crate::poll;
use crate::testpod::binary;

/// How long an agent has to come up, or to end.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Lines of its log that a failed test shows.
const SHOWN: usize = 150;

static STARTED: AtomicU32 = AtomicU32::new(0);

/// A running agent; dropping it kills the process and shows the end of its log (which the test harness prints for failed
/// tests alone).
#[derive(Debug)]
pub struct Agent {
    /// The node that it serves.
    pub node: Arc<Node>,
    /// Where its log goes.
    pub log_file: PathBuf,
    /// Show the log when dropped.
    pub show_log: bool,
    admin: SocketAddr,
    child: Child,
}

impl Agent {
    /// Starts it and waits until it is ready and serves its workloads.
    pub fn start(node: &Arc<Node>, config: &Config) -> Result<Self> {
        let agent = Self::spawn(node, config)?;
        agent.wait_ready()?;
        agent.wait_enrolled(config)?;
        Ok(agent)
    }

    /// Starts it in a cgroup of its own beside the pods'.
    pub fn spawn(node: &Arc<Node>, config: &Config) -> Result<Self> {
        let cgroup = node.cgroup().join("agent");
        fs::create_dir_all(&cgroup)?;
        Self::spawn_in(node, config, &cgroup)
    }

    /// Starts it in this cgroup, which must exist.
    pub fn spawn_in(node: &Arc<Node>, config: &Config, cgroup: &Path) -> Result<Self> {
        write(node, &config.yaml()?)?;
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        // Not beside the configuration: the agent watches that directory, and would wake for every line.
        let logs = node.dir().join("logs");
        fs::create_dir_all(&logs)?;
        let log_file = logs.join(format!("{}-agent-{number}.log", node.name));
        let log = File::create(&log_file)?;
        let mut agent = sealane(node, cgroup, "agent")?;
        agent.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = agent.spawn().context("cannot start the agent")?;
        Ok(Self { node: Arc::clone(node), log_file, show_log: true, admin: config.admin.listen, child })
    }

    /// Waits until `/readyz` answers 200; fails at once where the process has ended.
    pub fn wait_ready(&self) -> Result<()> {
        let ready = poll::until("the agent is ready", PATIENCE, || {
            if !self.is_alive() {
                return Some(Err(anyhow::anyhow!("the agent has ended")));
            }
            self.get("/readyz").is_ok_and(|answer| answer.status == 200).then_some(Ok(()))
        });
        ready.and_then(|inner| inner).with_context(|| format!("{}:\n{}", self.node.name, self.log_tail()))
    }

    /// Waits until it serves every workload of `config`, each with its SVID.
    pub fn wait_enrolled(&self, config: &Config) -> Result<()> {
        let keys: Vec<_> = config.workloads.iter().map(|w| format!("{}/{}", w.namespace, w.name)).collect();
        let served = |state: &Value, key: &str| {
            let mut pods = state["pods"].as_array().into_iter().flatten();
            pods.any(|pod| pod["workload"] == key && pod["state"] == "enrolled")
                && state["workloads"][key]["identity"]["state"] == "ready"
        };
        let all = poll::until_true("every workload is enrolled and has an SVID", PATIENCE, || {
            self.state().is_ok_and(|state| keys.iter().all(|key| served(&state, key)))
        });
        all.with_context(|| format!("{}: {:?}\n{}", self.node.name, self.state(), self.log_tail()))
    }

    /// Rewrites the configuration and sends SIGHUP; the effect comes when it comes.
    pub fn reload(&self, config: &Config) -> Result<()> {
        self.reload_text(&config.yaml()?)
    }

    /// The same with any text.
    pub fn reload_text(&self, text: &str) -> Result<()> {
        write(&self.node, text)?;
        self.signal(Signal::SIGHUP)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(self.pid(), signal)?)
    }

    /// SIGTERM, and its end.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait_end(PATIENCE)
    }

    /// SIGKILL, and its end.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill()?;
        Ok(self.child.wait()?)
    }

    /// Waits for the process to end.
    pub fn wait_end(&mut self, within: Duration) -> Result<ExitStatus> {
        let child = &mut self.child;
        poll::until("the agent has ended", within, || child.try_wait().transpose())?
            .context("cannot wait for the agent")
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// What it holds in memory (VmRSS), in KiB.
    pub fn rss_kib(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    /// GET from the admin listener, from within the node.
    pub fn get(&self, path: &str) -> Result<Response> {
        self.node.netns.run(|| http::get(self.admin, path))
    }

    /// `/metrics`.
    pub fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics::parse(&self.ok("/metrics")?))
    }

    /// `/state`.
    pub fn state(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.ok("/state")?)?)
    }

    /// Everything that it has logged; lines that are not JSON are left out.
    pub fn log(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.log_file).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The access log: one object for each connection that has ended or was refused.
    pub fn access(&self) -> Vec<Value> {
        self.log().into_iter().filter(|line| line["target"] == "access").collect()
    }

    /// Waits for an entry of the access log, old or new, that `matches`.
    pub fn wait_access(&self, what: &str, matches: impl Fn(&Value) -> bool) -> Result<Value> {
        let found = poll::until(what, PATIENCE, || self.access().into_iter().find(&matches));
        found.with_context(|| format!("access log of {}: {:#?}", self.node.name, self.access()))
    }

    /// Runs `attempt` and waits for the connection of that direction which ends next. Fails unless the access log and the
    /// metrics agree that it, and it alone, was refused for this reason. Yields its entry.
    pub fn refuses(&self, direction: &str, reason: &str, attempt: impl FnOnce() -> Result<()>) -> Result<Value> {
        let (seen, counted) = (self.access().len(), self.metrics()?.refused(direction, reason));
        attempt().with_context(|| reason.to_owned())?;
        let next = || self.access().into_iter().skip(seen).find(|entry| entry["direction"] == direction);
        let entry = poll::until("a refusal in the access log", PATIENCE, next).with_context(|| reason.to_owned())?;
        ensure!(entry["outcome"] == reason && entry["mode"].is_null(), "{reason} expected: {entry}");
        let now = self.metrics()?.refused(direction, reason);
        ensure!(now == counted + 1.0, "{reason} counted {counted} times before, {now} after");
        Ok(entry)
    }

    /// The end of the log, as text.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log_file).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(SHOWN)..].join("\n")
    }

    fn ok(&self, path: &str) -> Result<String> {
        let answer = self.get(path)?;
        ensure!(answer.status == 200, "{path}: {} {}", answer.status, answer.body);
        Ok(answer.body)
    }

    /// A zombie, which only [`Self::wait_end`] reaps, counts as ended.
    fn is_alive(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if self.show_log {
            eprintln!("--- {} ({})\n{}", self.node.name, self.log_file.display(), self.log_tail());
        }
    }
}

/// `sealane uninstall` with the configuration last written for the node.
pub fn uninstall(node: &Node) -> Result<()> {
    let out = sealane(node, &node.cgroup().join("system"), "uninstall")?.output()?;
    if !out.status.success() {
        bail!("sealane uninstall: {}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
    }
    Ok(())
}

/// Where the node's configuration lies.
pub fn config_file(node: &Node) -> PathBuf {
    node.dir().join(format!("{}.yaml", node.name))
}

fn sealane(node: &Node, cgroup: &Path, subcommand: &str) -> Result<Command> {
    let mut sealane = command(cgroup, &node.netns, &binary("sealane")?);
    sealane.arg(subcommand).arg("--config").arg(config_file(node));
    Ok(sealane)
}

/// Whole or not at all: the agent watches the file.
fn write(node: &Node, text: &str) -> Result<()> {
    let path = config_file(node);
    let fresh = path.with_extension("new");
    fs::write(&fresh, text)?;
    Ok(fs::rename(fresh, path)?)
}
