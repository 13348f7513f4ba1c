//! `sealane uninstall`: lets every pod go, in the order that leaks nothing, and removes pins, rules, routes and settings.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::{Instant, sleep};

use crate::config::Config;
use crate::kernel::{self, Kernel, cgroup};
use crate::workload::WorkloadKey;

/// Takes over from a running agent, which only drains from then on, and lets go what it had enrolled.
pub fn run(config_path: &Path) -> anyhow::Result<()> {
    let config = Config::load(config_path)?;
    if !kernel::has_pins(&config.capture.bpffs) {
        tracing::info!(bpffs = %config.capture.bpffs.display(), "nothing is installed");
        return Ok(kernel::remove_pins(&config.capture.bpffs)?);
    }
    let leaf = cgroup::enter_leaf(&config.capture.cgroup)?;
    let kernel = Kernel::open(config.capture.clone(), leaf)?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(release_all(&config, kernel))
}

async fn release_all(config: &Config, mut kernel: Kernel) -> anyhow::Result<()> {
    let writer = kernel.writer()?;
    let mut pods = Vec::new();
    for (id, record) in kernel.enrolled() {
        let key = WorkloadKey { namespace: "uninstall".into(), name: id.to_string().into() };
        match kernel.adopt(id, &record, &key).await? {
            Some((workload, pod)) => {
                kernel.capture_off(&writer, &pod)?;
                pods.push((workload, pod));
            }
            None => kernel.forget_gone(&writer, id, &record)?,
        }
    }
    // Nobody waits for the lock while connections drain: the agent's thread would carry nothing meanwhile.
    drop(writer);
    let deadline = Instant::now() + config.timeouts.drain;
    for (workload, pod) in &pods {
        loop {
            let open = kernel.captured_sockets(pod)?.len();
            if open == 0 || Instant::now() >= deadline {
                tracing::info!(netns = %workload.netns.display(), open, "letting go");
                break;
            }
            sleep(Duration::from_millis(100)).await;
        }
        let writer = kernel.writer()?;
        kernel.release(&writer, pod).await.with_context(|| format!("pod at {}", workload.netns.display()))?;
    }
    kernel::remove_pins(&config.capture.bpffs).context("removing pins")
}
