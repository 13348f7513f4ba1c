//! A pod's way: waiting for its netns and its SVID, enrolled, leaving in the order that leaks nothing.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::{fs, io};

use sealane_common::reason::Reason;
use tokio::net::TcpListener;
use tokio::time::Instant;

use super::Task;
use super::status::PodStatus;
use crate::kernel::netns::NetNs;
use crate::kernel::pod::{Pod, PodSockets, Uncovered};
use crate::kernel::{Kernel, Writer};
use crate::proxy::{PodListeners, Serving, serve_pod};
use crate::snapshot::IdentityState;
use crate::workload::{Mode, Workload, WorkloadKey};

/// Where a pod of this node stands.
pub(super) enum Life {
    /// Not captured, and why.
    Waiting(String),
    /// Captured.
    Enrolled(Box<Active>),
    /// On its way out.
    Leaving(Box<Active>, Phase),
}

pub(super) struct Active {
    workload: Workload,
    pod: Pod,
    /// `None` where an agent before this one owns the listeners.
    handle: Option<Serving>,
    modes: Vec<(u16, Mode)>,
    contained: bool,
    uncovered: Uncovered,
}

/// Un-enrolment's steps, each until a moment.
#[derive(Clone, Copy)]
pub(super) enum Phase {
    /// No longer announced; both are accepted.
    Grace(Instant),
    /// Capture is off; captured connections may end by themselves.
    Draining(Instant),
}

impl Life {
    pub(super) fn leaving(&self) -> Option<&Workload> {
        match self {
            Self::Leaving(active, _) => Some(&active.workload),
            Self::Waiting(_) | Self::Enrolled(_) => None,
        }
    }

    fn active(&self) -> Option<&Active> {
        match self {
            Self::Enrolled(active) | Self::Leaving(active, _) => Some(active),
            Self::Waiting(_) => None,
        }
    }

    pub(super) fn status(&self, key: &WorkloadKey) -> PodStatus {
        let (state, detail) = match self {
            Self::Waiting(why) => ("pending", Some(why.clone())),
            Self::Enrolled(_) => ("enrolled", None),
            Self::Leaving(_, Phase::Grace(_)) => ("leaving", Some("accepts both".to_owned())),
            Self::Leaving(_, Phase::Draining(_)) => ("leaving", Some("draining".to_owned())),
        };
        let active = self.active();
        let connections = active.and_then(|active| active.handle.as_ref()).map_or(0, Serving::open);
        PodStatus {
            workload: key.to_string(),
            state,
            detail,
            connections,
            contained: active.is_none_or(|active| active.contained),
            uncovered: active.map_or_else(Uncovered::default, |active| active.uncovered),
        }
    }
}

impl Task {
    /// Configured pods that are captured: by this agent, or by one before it and not taken over yet. Without the latter a
    /// takeover would begin by calling them in plaintext.
    pub(super) fn announced(&self) -> HashSet<WorkloadKey> {
        let captured = |workload: &&Workload| match self.pods.get(&workload.key) {
            Some(Life::Enrolled(_)) => true,
            Some(Life::Leaving(..)) => false,
            Some(Life::Waiting(_)) | None => self.control.kernel.is_captured(&workload.netns),
        };
        self.control.config.workloads.iter().filter(captured).map(|workload| workload.key.clone()).collect()
    }

    /// Enrols what can be; true where something was.
    pub(super) async fn enrol_waiting(&mut self, writer: &Writer) -> bool {
        let mut enrolled = false;
        for workload in self.control.config.workloads.clone() {
            if matches!(self.pods.get(&workload.key), Some(Life::Enrolled(_) | Life::Leaving(..))) {
                continue;
            }
            let life = match self.enrol(writer, &workload).await {
                Ok(active) => {
                    tracing::info!(workload = %workload.key, "enrolled");
                    enrolled = true;
                    Life::Enrolled(Box::new(active))
                }
                Err(why) => {
                    if !matches!(self.pods.get(&workload.key), Some(Life::Waiting(before)) if *before == why) {
                        tracing::warn!(workload = %workload.key, why, "not enrolled");
                    }
                    Life::Waiting(why)
                }
            };
            self.pods.insert(workload.key.clone(), life);
        }
        enrolled
    }

    async fn enrol(&mut self, writer: &Writer, workload: &Workload) -> Result<Active, String> {
        let Some(local) = self.previous.workloads.get(&workload.key).cloned() else {
            return Err("not in the snapshot".to_owned());
        };
        let Some(inode) = inode(&workload.netns) else {
            return Err(format!("no network namespace at {}", workload.netns.display()));
        };
        let taken = |(_, life): &(&WorkloadKey, &Life)| life.active().is_some_and(|a| a.pod.netns_inode() == inode);
        if let Some((key, _)) = self.pods.iter().find(taken) {
            return Err(format!("its network namespace is that of {key}"));
        }
        // A peer is told, and a pod captured, only when it can keep its word: an SVID, or STRICT, where waiting is right. One
        // that is captured already stays with the agent that serves it, if any, until this one can.
        let strict = modes(&local.listener).iter().any(|(_, mode)| *mode == Mode::Strict);
        let ready = matches!(local.identity, IdentityState::Ready(_));
        let kernel = &self.control.kernel;
        let may_wait = if kernel.is_captured(&workload.netns) { kernel.is_served(&workload.netns) } else { !strict };
        if may_wait && !ready {
            return Err(Reason::IdentityPending.words().to_owned());
        }
        let enrolled = self.control.kernel.enrol(writer, workload, &local.listener, &self.changes).await;
        let (pod, sockets) = enrolled.map_err(|error| error.to_string())?;
        let handle = self.serve(&pod, sockets).map_err(|error| error.to_string())?;
        let modes = modes(&local.listener);
        let uncovered = Uncovered::default();
        Ok(Active { workload: workload.clone(), pod, handle: Some(handle), modes, contained: true, uncovered })
    }

    fn serve(&self, pod: &Pod, sockets: PodSockets) -> std::io::Result<Serving> {
        let listeners = PodListeners {
            net: pod.net.clone(),
            inbound: TcpListener::from_std(sockets.inbound)?,
            outbound: TcpListener::from_std(sockets.outbound)?,
        };
        Ok(serve_pod(self.control.ctx.clone(), listeners))
    }

    /// Pods that the configuration no longer has begin to leave; those that it has again are taken back.
    pub(super) fn leave_removed(&mut self, writer: &Writer) {
        let configured = &self.control.config.workloads;
        let grace = Instant::now() + self.control.config.timeouts.unenrol_grace;
        let mut gone = Vec::new();
        for (key, life) in &mut self.pods {
            let same_netns = |netns: &Path| life.active().is_none_or(|a| inode(netns) == Some(a.pod.netns_inode()));
            // A netns that is not there any more is another matter: see `drop_gone`.
            let stays = configured.iter().any(|w| w.key == *key && (same_netns(&w.netns) || !w.netns.exists()));
            *life = match std::mem::replace(life, Life::Waiting(String::new())) {
                Life::Enrolled(active) if !stays => {
                    tracing::info!(workload = %key, "leaving");
                    Life::Leaving(active, Phase::Grace(grace))
                }
                Life::Leaving(active, phase) if stays && active.handle.is_some() => {
                    match self.control.kernel.capture_on(writer, &active.pod) {
                        Ok(()) => Life::Enrolled(active),
                        Err(error) => {
                            tracing::error!(workload = %key, %error, "taking a leaving pod back");
                            Life::Leaving(active, phase)
                        }
                    }
                }
                Life::Waiting(_) if !stays => {
                    gone.push(key.clone());
                    continue;
                }
                life @ (Life::Waiting(_) | Life::Enrolled(_) | Life::Leaving(..)) => life,
            };
        }
        gone.iter().for_each(|key| drop(self.pods.remove(key)));
    }

    /// Moves leaving pods on; true where one has left.
    pub(super) async fn progress_leaving(&mut self, writer: &Writer) -> bool {
        let now = Instant::now();
        let drain = self.control.config.timeouts.drain;
        let mut left = Vec::new();
        for (key, life) in &mut self.pods {
            let Life::Leaving(active, phase) = life else { continue };
            match *phase {
                Phase::Grace(until) if now >= until => {
                    if let Err(error) = self.control.kernel.capture_off(writer, &active.pod) {
                        tracing::error!(workload = %key, %error, "un-enrolment");
                        continue;
                    }
                    *phase = Phase::Draining(now + drain);
                }
                Phase::Draining(until) => {
                    let idle = active.handle.as_ref().is_none_or(|handle| handle.open() == 0);
                    let captured = self.control.kernel.captured_sockets(&active.pod).is_ok_and(|s| !s.is_empty());
                    if (captured || !idle) && now < until {
                        continue;
                    }
                    match self.control.kernel.release(writer, &active.pod).await {
                        Ok(()) => left.push(key.clone()),
                        Err(error) => tracing::error!(workload = %key, %error, "un-enrolment"),
                    }
                }
                Phase::Grace(_) => {}
            }
        }
        for key in &left {
            if let Some(Life::Leaving(active, _)) = self.pods.remove(key)
                && let Some(handle) = &active.handle
            {
                handle.close(Reason::Unenrolled);
            }
            // One that is to come back needs it: its source has said it already.
            if !self.control.config.workloads.iter().any(|workload| workload.key == *key) {
                self.identities.remove(key);
            }
            self.control.ctx.metrics.forget(key);
            tracing::info!(workload = %key, "left");
        }
        !left.is_empty()
    }

    /// Drops pods whose netns is no longer where it was: deleted, or replaced by a new pod's. True where there was one.
    ///
    /// Nothing in the kernel is undone: processes may live on in a namespace without a name, and they stay captured, with
    /// nobody to serve them, until it ends ([`Self::let_orphans_go`] then removes its entries).
    pub(super) fn drop_gone(&mut self) -> bool {
        let gone = |life: &Life| {
            life.active().is_some_and(|active| match fs::metadata(&active.workload.netns) {
                Ok(meta) => meta.ino() != active.pod.netns_inode(),
                Err(error) => error.kind() == io::ErrorKind::NotFound,
            })
        };
        let keys: Vec<WorkloadKey> =
            self.pods.iter().filter(|(_, life)| gone(life)).map(|(key, _)| key.clone()).collect();
        for key in &keys {
            if let Some(Life::Enrolled(active) | Life::Leaving(active, _)) = self.pods.remove(key)
                && let Some(handle) = &active.handle
            {
                handle.close(Reason::UnknownWorkload);
            }
            self.control.ctx.metrics.forget(key);
            tracing::info!(workload = %key, "the pod is gone");
        }
        !keys.is_empty()
    }

    /// Enrolments that an agent before made and the configuration does not have are let go in the usual order. A configured
    /// pod that cannot be served at the moment is none of them: it stays captured.
    pub(super) async fn let_orphans_go(&mut self, writer: &Writer) {
        let configured: HashSet<u64> =
            self.control.config.workloads.iter().filter_map(|workload| cookie(&workload.netns)).collect();
        for (id, record) in self.control.kernel.enrolled() {
            let active = self.pods.values().filter_map(Life::active).any(|active| active.pod.id == id);
            if active || configured.contains(&record.cookie) {
                continue;
            }
            let key = WorkloadKey { namespace: "orphan".into(), name: id.to_string().into() };
            match self.control.kernel.adopt(id, &record, &key).await {
                Ok(Some((workload, pod))) => {
                    let (modes, uncovered) = Default::default();
                    let active = Active { workload, pod, handle: None, modes, contained: true, uncovered };
                    let phase = Phase::Grace(Instant::now());
                    self.pods.insert(key, Life::Leaving(Box::new(active), phase));
                }
                Ok(None) => {
                    if let Err(error) = self.control.kernel.forget_gone(writer, id, &record) {
                        tracing::error!(%error, id, "removing a pod that is gone");
                    }
                }
                Err(error) => tracing::error!(%error, id, "an earlier enrolment cannot be opened"),
            }
        }
    }

    /// Takes over what the configuration changed of enrolled pods, and writes modes that changed.
    pub(super) fn follow_policy(&mut self, writer: &Writer) {
        for (key, life) in &mut self.pods {
            let Some(local) = self.previous.workloads.get(key) else { continue };
            let Life::Enrolled(active) = life else { continue };
            if active.workload != local.workload {
                active.workload = local.workload.clone();
                active.pod.follow(&local.workload);
            }
            let modes = modes(&local.listener);
            if modes == active.modes {
                continue;
            }
            match self.control.kernel.update(writer, &active.pod, &local.listener) {
                Ok(()) => active.modes = modes,
                Err(error) => tracing::error!(workload = %key, %error, "policy"),
            }
        }
    }

    /// A pod's addresses, links, rules or routes changed.
    pub(super) async fn network_changed(&mut self, pod_id: u32) {
        let writer = match self.control.kernel.writer() {
            Ok(writer) => writer,
            Err(error) => return self.lost(error),
        };
        for (key, life) in &mut self.pods {
            if let Life::Enrolled(active) | Life::Leaving(active, _) = life
                && active.pod.id == pod_id
            {
                active.refresh(&mut self.control.kernel, &writer, key).await;
            }
        }
    }

    /// What netlink may have kept from us, the listening ports, and what the capture does not cover.
    pub(super) async fn recount(&mut self, writer: &Writer) {
        let kernel = &mut self.control.kernel;
        let pods_cgroups = kernel.pods_cgroups();
        let counted = kernel.listening();
        for (key, life) in &mut self.pods {
            let (Life::Enrolled(active) | Life::Leaving(active, _)) = life else { continue };
            active.refresh(kernel, writer, key).await;
            if let Err(error) = kernel.count_listeners(&active.pod, &counted) {
                tracing::error!(workload = %key, %error, "listening ports");
            }
            match kernel.uncovered(&active.pod, &pods_cgroups) {
                Ok(uncovered) => active.uncovered = uncovered,
                Err(error) => tracing::error!(workload = %key, %error, "listing sockets"),
            }
        }
        self.let_orphans_go(writer).await;
    }

    /// Ends every connection and waits until the last has.
    pub(super) async fn close(&mut self, reason: Reason) {
        self.end(reason);
        for handle in self.handles() {
            handle.drained().await;
        }
    }

    /// Ends every connection; the first reason counts.
    pub(super) fn end(&self, reason: Reason) {
        self.handles().for_each(|handle| handle.close(reason));
    }

    fn handles(&self) -> impl Iterator<Item = &Serving> {
        self.pods.values().filter_map(Life::active).filter_map(|active| active.handle.as_ref())
    }
}

impl Active {
    async fn refresh(&mut self, kernel: &mut Kernel, writer: &Writer, key: &WorkloadKey) {
        match kernel.refresh(writer, &mut self.pod).await {
            Ok(false) => {}
            Ok(true) => {
                self.contained = false;
                tracing::warn!(workload = %key, "the pod's rule or routes were gone and have been restored");
            }
            Err(error) => tracing::error!(workload = %key, %error, "following the pod's network"),
        }
    }
}

fn inode(netns: &Path) -> Option<u64> {
    fs::metadata(netns).ok().map(|meta| meta.ino())
}

fn cookie(netns: &Path) -> Option<u64> {
    NetNs::open(netns).ok().map(|netns| netns.cookie())
}

/// Default first, then the ports that differ; what the kernel needs to be told anew.
fn modes(listener: &crate::snapshot::Listener) -> Vec<(u16, Mode)> {
    let ports = listener.ports.iter().map(|(port, rule)| (*port, rule.mode));
    std::iter::once((0, listener.default.mode)).chain(ports).collect()
}
