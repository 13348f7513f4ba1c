//! Wiring: builds the parts, runs them, and ends them in order. No logic of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use sealane_common::reason::Reason;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::admin::{self, Admin, AdminConfig, Providers};
use crate::config::{Config, watch as config_watch};
use crate::control::status::Status;
use crate::control::{Control, Inputs};
use crate::kernel::cgroup::{self, Leaf};
use crate::kernel::{self, Kernel, maps};
use crate::metrics::Metrics;
use crate::proxy::Ctx;
use crate::snapshot::{Publisher, Reader, Snapshot};
use crate::source::{Sources, SourcesConfig};

/// How long an agent that was replaced keeps its listeners open: a handshake that was half done at the takeover completes on
/// the old listener, after up to six retries of the SYN-ACK.
const HANDOVER: Duration = Duration::from_secs(65);

/// `sealane agent`: runs until SIGTERM or SIGINT, then drains.
pub fn run(config_path: &Path) -> anyhow::Result<()> {
    let config = Config::load(config_path)?;
    harden()?;
    // Before any thread or socket: both belong to the cgroup they were made in.
    let leaf = cgroup::enter_leaf(&config.capture.cgroup)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(config, config_path, leaf))
}

async fn serve(config: Config, config_path: &Path, leaf: Leaf) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let drain = config.timeouts.drain;
    let first = Snapshot::build(0, &config, &Default::default(), &Default::default(), None);
    let (publisher, snapshots) = Publisher::new(first);
    let first = Arc::clone(&snapshots.borrow());
    let pins = kernel::layout_dir(&config.capture.bpffs);
    let metrics = Arc::new(Metrics::new(snapshots.clone(), Arc::new(move || maps::events(&pins).unwrap_or_default())));
    let status = Arc::new(Status::default());
    let reloads = config_watch::watch(config_path)?;
    // Everything that can fail comes before the takeover. The pages too: after it, the agent before closes its own.
    let admin = start_admin(&config, &snapshots, &metrics, &status).context("admin.listen")?;
    let kernel = Kernel::open(config.capture.clone(), leaf)?;
    let ctx = Arc::new(Ctx { snapshots, metrics });
    let (identities_tx, identities) = mpsc::channel(256);
    let sources = Sources::new(
        SourcesConfig {
            trust_domain: config.trust_domain.clone(),
            embedded_dir: Some(config.identity.embedded_dir.clone()),
            files_dir: Some(config.identity.files_dir.clone()),
        },
        identities_tx,
    );
    let (stop_tx, stop) = watch::channel(None);
    let (superseded, mut taken_over) = watch::channel(false);
    tracing::info!(node = %config.node, generation = kernel.generation(), "sealane agent");
    let control = Control {
        config,
        config_path: config_path.to_owned(),
        kernel,
        sources,
        publisher,
        ctx,
        status: Arc::clone(&status),
        superseded,
    };
    let control = tokio::spawn(control.run(first, Inputs { reloads, identities, stop }));

    let handover = tokio::spawn(async move {
        taken_over.wait_for(|taken| *taken).await.ok();
        let since = Instant::now();
        status.set_superseded();
        // Blocks for as long as an open page takes; the data path has other threads.
        drop(tokio::task::spawn_blocking(|| admin.stop()));
        since
    });
    tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    let bound = Instant::now() + drain;
    tracing::info!(?drain, "stopping: enrolled pods stay captured (`sealane uninstall` lets them go)");
    // Listeners stay in the maps and go on accepting until a successor has put its own there.
    if let Ok(Ok(since)) = timeout_at(bound, handover).await {
        sleep_until(bound.max(since + HANDOVER)).await;
    }
    stop_tx.send_replace(Some(Reason::Draining));
    control.await.context("control")
}

fn start_admin(
    config: &Config,
    snapshots: &Reader,
    metrics: &Arc<Metrics>,
    status: &Arc<Status>,
) -> std::io::Result<Admin> {
    let (not_ready, pods) = (Arc::clone(status), Arc::clone(status));
    admin::start(
        AdminConfig { listen: config.admin, metrics_listen: config.metrics },
        Providers {
            snapshots: snapshots.clone(),
            metrics: Arc::clone(metrics),
            not_ready: Arc::new(move || not_ready.not_ready()),
            pods: Arc::new(move || serde_json::json!(pods.pods())),
        },
    )
}

/// Keys must not reach a core file or a debugger of another user, and descriptors must not run out at two per connection.
fn harden() -> anyhow::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    nix::sys::prctl::set_dumpable(false)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let wanted = hard.max(1_048_576);
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_err() {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        tracing::warn!(limit = hard, "RLIMIT_NOFILE could not be raised: two descriptors per connection and side");
    }
    Ok(())
}
