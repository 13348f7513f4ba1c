//! Wiring: builds the parts, runs them, and ends them in order. No logic of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use sealane_common::reason::Reason;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::admin::{self, Admin};
use crate::config::{Config, watch as config_watch};
use crate::control::status::Status;
use crate::control::{Control, Inputs};
use crate::kernel::{Kernel, cgroup, maps};
use crate::metrics::Metrics;
use crate::proxy::Ctx;
use crate::snapshot::{Publisher, Snapshot};
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
    let kernel = Kernel::open(config.capture.clone(), leaf)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(config, config_path, kernel))
}

async fn serve(config: Config, config_path: &Path, kernel: Kernel) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let drain = config.timeouts.drain;
    let (identities_tx, identities) = mpsc::channel(256);
    let first = Snapshot::build(0, &config, &Default::default(), &Default::default(), None);
    let (publisher, reader) = Publisher::new(first);
    let first = Arc::clone(&reader.borrow());
    let events_dir = kernel.dir().to_owned();
    let metrics = Arc::new(Metrics::new(move || maps::events(&events_dir).unwrap_or_default()));
    let status = Arc::new(Status::default());
    let ctx = Arc::new(Ctx { snapshots: reader.clone(), metrics: Arc::clone(&metrics) });
    let _admin = admin::start(Admin {
        listen: config.admin,
        metrics_listen: config.metrics,
        node: config.node.clone(),
        snapshots: reader,
        metrics,
        status: Arc::clone(&status),
    })
    .context("admin")?;
    let sources = Sources::new(
        SourcesConfig {
            trust_domain: config.trust_domain.clone(),
            embedded_dir: Some(config.identity.embedded_dir.clone()),
            files_dir: Some(config.identity.files_dir.clone()),
        },
        identities_tx,
    );
    let reloads = config_watch::watch(config_path)?;
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

    let mut since_takeover = None;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = taken_over.wait_for(|taken| *taken) => {
            since_takeover = Some(Instant::now());
            status.set_superseded();
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        }
    }
    status.set_stopping();
    let bound = Instant::now() + drain;
    tracing::info!(?drain, "stopping: enrolled pods stay captured (`sealane uninstall` lets them go)");
    tokio::select! {
        () = sleep_until(bound), if since_takeover.is_none() => {}
        _ = taken_over.wait_for(|taken| *taken), if since_takeover.is_none() => since_takeover = Some(Instant::now()),
        () = std::future::ready(()), if since_takeover.is_some() => {}
    }
    if let Some(since) = since_takeover {
        status.set_superseded();
        sleep_until(bound.max(since + HANDOVER)).await;
    }
    stop_tx.send_replace(Some(Reason::Draining));
    control.await.context("control")
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
