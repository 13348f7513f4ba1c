//! The one task that changes anything: merges what arrives into a new snapshot, publishes it, then brings kernel and pods
//! in line. The data path never waits for it.

mod lifecycle;
pub mod status;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sealane_common::reason::Reason;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};

use self::lifecycle::Life;
use self::status::{PodStatus, Status};
use crate::config::Config;
use crate::config::watch::Reload;
use crate::kernel::{Kernel, KernelError, Writer};
use crate::proxy::Ctx;
use crate::snapshot::{IdentityState, LocalWorkload, Publisher, Snapshot};
use crate::source::{IdentityUpdate, Sources};
use crate::tls::WorkloadTls;
use crate::workload::{Mode, Workload, WorkloadKey};

/// How often pods that wait, leave or are gone are looked at.
const TICK: Duration = Duration::from_millis(200);
/// How often the set of listening ports is reconciled: a port that closed is refused with the agent's reset until then.
const RECOUNT: Duration = Duration::from_secs(2);

/// What the control task starts with.
pub struct Control {
    /// The configuration in force.
    pub config: Config,
    /// Where it was read, to read it again.
    pub config_path: std::path::PathBuf,
    /// The kernel's side.
    pub kernel: Kernel,
    /// Where identities come from.
    pub sources: Sources,
    /// To the data path.
    pub publisher: Publisher,
    /// For the pods' listeners.
    pub ctx: Arc<Ctx>,
    /// For the admin endpoint.
    pub status: Arc<Status>,
    /// Set when another agent has taken over: this one writes nothing from then on.
    pub superseded: watch::Sender<bool>,
}

/// What arrives.
pub struct Inputs {
    /// The file changed, or SIGHUP.
    pub reloads: mpsc::Receiver<Reload>,
    /// From the identity sources.
    pub identities: mpsc::Receiver<IdentityUpdate>,
    /// The process ends: close what is open with this reason.
    pub stop: watch::Receiver<Option<Reason>>,
}

struct Task {
    control: Control,
    identities: HashMap<WorkloadKey, IdentityState>,
    pods: HashMap<WorkloadKey, Life>,
    previous: Arc<Snapshot>,
    changes: mpsc::Sender<u32>,
    started: Instant,
    recounted: Instant,
    expired: HashSet<WorkloadKey>,
    took_over: bool,
}

impl Control {
    /// Runs until `stop` is set; returns when every connection of every pod has ended.
    pub async fn run(self, first: Arc<Snapshot>, mut inputs: Inputs) {
        let (changes, mut changed) = mpsc::channel(256);
        let mut task = Task {
            control: self,
            identities: HashMap::new(),
            pods: HashMap::new(),
            previous: first,
            changes,
            started: Instant::now(),
            recounted: Instant::now(),
            expired: HashSet::new(),
            took_over: false,
        };
        for workload in task.control.config.workloads.clone() {
            task.control.sources.watch(&workload);
        }
        task.apply().await;
        // The file may have changed between the first reading and the watch.
        task.reload().await;
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                Some(_) = inputs.reloads.recv() => task.reload().await,
                Some(update) = inputs.identities.recv() => {
                    task.identity(update);
                    while let Ok(update) = inputs.identities.try_recv() {
                        task.identity(update);
                    }
                    task.apply().await;
                }
                Some(pod_id) = changed.recv() => task.network_changed(pod_id).await,
                _ = tick.tick() => task.tick().await,
                _ = inputs.stop.changed() => break,
            }
        }
        let reason = inputs.stop.borrow().unwrap_or(Reason::Draining);
        task.close(reason).await;
    }
}

impl Task {
    async fn reload(&mut self) {
        let loaded = Config::load(&self.control.config_path)
            .and_then(|new| Config::reload_check(&self.control.config, &new).map(|()| new));
        match loaded {
            Err(errors) => {
                tracing::error!(%errors, "configuration refused; the old one stays in force");
                self.control.status.set_config_error(Some(errors.to_string()));
            }
            Ok(new) if new == self.control.config => self.control.status.set_config_error(None),
            Ok(new) => {
                self.control.status.set_config_error(None);
                let stays = |key: &WorkloadKey| new.workloads.iter().any(|workload| workload.key == *key);
                for workload in self.control.config.workloads.iter().filter(|workload| !stays(&workload.key)) {
                    self.control.sources.forget(&workload.key);
                }
                for workload in new.workloads.iter().filter(|w| !self.control.config.workloads.contains(w)) {
                    self.control.sources.watch(workload);
                }
                self.control.config = new;
                tracing::info!("configuration reloaded");
                self.apply().await;
            }
        }
    }

    fn identity(&mut self, update: IdentityUpdate) {
        let state = match update.identity {
            Ok(identity) => match WorkloadTls::new(identity) {
                Ok(tls) => IdentityState::Ready(Arc::new(tls)),
                Err(error) => {
                    tracing::error!(workload = %update.workload, %error, "the new SVID cannot be used; the old one stays");
                    return;
                }
            },
            Err(Reason::IdentityWithdrawn) => IdentityState::Withdrawn,
            // A source that begins anew has nothing yet; that takes nothing back.
            Err(_) if self.identities.contains_key(&update.workload) => return,
            Err(_) => IdentityState::Pending,
        };
        match &state {
            IdentityState::Ready(tls) => {
                tracing::info!(workload = %update.workload, id = %tls.identity().svid.id, "SVID");
            }
            IdentityState::Pending => tracing::warn!(workload = %update.workload, "no SVID yet"),
            IdentityState::Withdrawn => tracing::warn!(workload = %update.workload, "SVID withdrawn"),
        }
        self.identities.insert(update.workload, state);
    }

    /// New snapshot, published; then pods and maps follow it.
    async fn apply(&mut self) {
        self.publish();
        let writer = match self.control.kernel.writer() {
            Ok(writer) => writer,
            Err(error) => return self.lost(error),
        };
        self.leave_removed(&writer);
        if self.enrol_waiting(&writer).await {
            self.publish();
        }
        self.follow_policy(&writer);
        self.sync_mesh(&writer);
        self.finish_takeover(&writer);
        self.let_orphans_go(&writer).await;
        drop(writer);
        self.show();
    }

    fn publish(&mut self) {
        let announced = self.announced();
        let mut config = self.control.config.clone();
        let configured = |workload: &&Workload| self.control.config.workloads.iter().any(|w| w.key == workload.key);
        config.workloads.extend(self.pods.values().filter_map(Life::leaving).filter(|w| !configured(w)).cloned());
        let epoch = self.previous.epoch + 1;
        let mut snapshot = Snapshot::build(epoch, &config, &self.identities, &announced, Some(&self.previous));
        // A pod that leaves accepts both, whatever its policy: its peers learn of it at different moments.
        for workload in self.pods.values().filter_map(Life::leaving) {
            if let Some(local) = snapshot.workloads.get(&workload.key) {
                let open = LocalWorkload {
                    workload: local.workload.clone(),
                    identity: local.identity.clone(),
                    listener: local.listener.clone().with_mode(Mode::Permissive),
                };
                snapshot.workloads.insert(workload.key.clone(), Arc::new(open));
            }
        }
        self.previous = Arc::new(snapshot);
        self.control.publisher.publish(Arc::clone(&self.previous));
    }

    /// A map that is full leaves a destination out of the mesh: tried again until it fits, and the node is not ready.
    fn sync_mesh(&mut self, writer: &Writer) {
        let written = self.control.kernel.sync_mesh(writer, &self.previous);
        if let Err(error) = &written {
            tracing::error!(%error, "mesh destinations");
        }
        self.control.status.set_failure("mesh", written.err().map(|error| error.to_string()));
    }

    /// The programs are replaced once every pod that could be taken over has been.
    fn finish_takeover(&mut self, writer: &Writer) {
        if self.took_over {
            return;
        }
        let finished = self.control.kernel.finish_takeover(writer);
        self.took_over = finished.is_ok();
        if let Err(error) = &finished {
            tracing::error!(%error, "takeover");
        }
        self.control.status.set_failure("takeover", finished.err().map(|error| error.to_string()));
    }

    async fn tick(&mut self) {
        if *self.control.superseded.borrow() {
            return self.follow_uninstall();
        }
        let writer = match self.control.kernel.writer() {
            Ok(writer) => writer,
            Err(error) => return self.lost(error),
        };
        if self.recounted.elapsed() >= RECOUNT {
            self.recounted = Instant::now();
            self.recount(&writer).await;
            self.reattach(&writer);
            if self.control.status.has_failed("mesh") {
                self.sync_mesh(&writer);
            }
            self.finish_takeover(&writer);
        }
        let left = self.progress_leaving(&writer).await;
        let gone = self.drop_gone();
        let enrolled = self.enrol_waiting(&writer).await;
        drop(writer);
        let now = SystemTime::now();
        let expired = |(key, state): (&WorkloadKey, &IdentityState)| {
            (state.usable(now).err() == Some(Reason::SvidExpired)).then(|| key.clone())
        };
        let expired: HashSet<_> = self.identities.iter().filter_map(expired).collect();
        let newly_expired = expired != self.expired;
        self.expired = expired;
        if left || gone || enrolled || newly_expired {
            self.apply().await;
        } else {
            self.show();
        }
    }

    /// A pods' cgroup that was made anew has no programs.
    fn reattach(&mut self, writer: &Writer) {
        let attached = self.control.kernel.reattach(writer);
        match &attached {
            Ok(false) => {}
            Ok(true) => tracing::error!("the pods' cgroup was replaced: capture was off until now"),
            Err(error) => tracing::error!(%error, "the capture is off"),
        }
        self.control.status.set_failure("programs", attached.err().map(|error| error.to_string()));
    }

    /// Where it was `sealane uninstall` that took over, nobody comes after: what it left of this agent's connections ends.
    fn follow_uninstall(&self) {
        if !self.control.kernel.is_installed() {
            self.end(Reason::Unenrolled);
        }
    }

    /// Another agent writes now; this one serves what is open.
    fn lost(&mut self, error: KernelError) {
        if !matches!(error, KernelError::Superseded) {
            tracing::error!(%error, "the maps cannot be written");
        } else if !self.control.superseded.send_replace(true) {
            tracing::info!("another agent has taken over; this one only drains from here on");
        }
    }

    fn show(&self) {
        let waited = self.started.elapsed() >= self.control.config.timeouts.svid_wait;
        let settled = |w: &Workload| !w.netns.exists() || matches!(self.pods.get(&w.key), Some(Life::Enrolled(_)));
        let ready = waited || self.control.config.workloads.iter().all(settled);
        let pods: Vec<PodStatus> = self.pods.iter().map(|(key, life)| life.status(key)).collect();
        self.control.status.set_pods(pods, ready);
    }
}
