//! A pod's way: waiting for its netns and its SVID, enrolled, leaving in the order that leaks nothing.

use std::fs;
use std::os::unix::fs::MetadataExt;

use sealane_common::reason::Reason;
use tokio::net::TcpListener;
use tokio::time::Instant;

use super::Task;
use super::status::PodStatus;
use crate::kernel::pod::{Pod, PodSockets};
use crate::kernel::{KernelError, Writer};
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
    pub(super) fn is_announced(&self) -> bool {
        matches!(self, Self::Enrolled(_))
    }

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
        }
    }
}

impl Task {
    /// True for a configured pod that is not enrolled and could be now.
    pub(super) fn wants_enrolment(&self, workload: &Workload) -> bool {
        match self.pods.get(&workload.key) {
            Some(Life::Enrolled(_) | Life::Leaving(..)) => false,
            Some(Life::Waiting(_)) | None => workload.netns.exists(),
        }
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
        if !workload.netns.exists() {
            return Err(format!("no network namespace at {}", workload.netns.display()));
        }
        // A peer is told, and a pod captured, only when it can keep its word: an SVID, or STRICT, where waiting is right.
        let strict = local.listener.default.mode == Mode::Strict;
        let ready = matches!(local.identity, IdentityState::Ready(_));
        if !strict && !ready && !self.control.kernel.is_enrolled(&workload.netns) {
            return Err(Reason::IdentityPending.words().to_owned());
        }
        let enrolled = self.control.kernel.enrol(writer, workload, &local.listener, &self.changes).await;
        let (pod, sockets) = enrolled.map_err(|error| error.to_string())?;
        let handle = self.serve(&pod, sockets).map_err(|error| error.to_string())?;
        let modes = modes(&local.listener);
        Ok(Active { workload: workload.clone(), pod, handle: Some(handle), modes, contained: true })
    }

    fn serve(&self, pod: &Pod, sockets: PodSockets) -> std::io::Result<Serving> {
        let listeners = PodListeners {
            net: pod.net.clone(),
            inbound: TcpListener::from_std(sockets.inbound)?,
            outbound: TcpListener::from_std(sockets.outbound)?,
        };
        Ok(serve_pod(self.control.ctx.clone(), listeners))
    }

    /// Pods that the configuration no longer has, or has with another netns, begin to leave.
    pub(super) fn leave_removed(&mut self, _writer: &Writer) {
        let configured = &self.control.config.workloads;
        let grace = Instant::now() + self.control.config.timeouts.unenrol_grace;
        let mut gone = Vec::new();
        for (key, life) in &mut self.pods {
            if configured.iter().any(|w| w.key == *key && life.active().is_none_or(|a| a.workload.netns == w.netns)) {
                continue;
            }
            match std::mem::replace(life, Life::Waiting(String::new())) {
                Life::Enrolled(active) => {
                    tracing::info!(workload = %key, "leaving");
                    *life = Life::Leaving(active, Phase::Grace(grace));
                }
                leaving @ Life::Leaving(..) => *life = leaving,
                Life::Waiting(_) => gone.push(key.clone()),
            }
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
            self.identities.remove(key);
            self.control.ctx.metrics.forget(key);
            tracing::info!(workload = %key, "left");
        }
        !left.is_empty()
    }

    /// Pods whose netns is gone; true where there was one.
    pub(super) fn bury_gone(&mut self, writer: &Writer) -> bool {
        let gone = |life: &Life| {
            life.active().is_some_and(|active| {
                !fs::metadata(&active.workload.netns).is_ok_and(|meta| meta.ino() == active.pod.netns_inode())
            })
        };
        let keys: Vec<WorkloadKey> =
            self.pods.iter().filter(|(_, life)| gone(life)).map(|(key, _)| key.clone()).collect();
        for key in &keys {
            let Some(Life::Enrolled(active) | Life::Leaving(active, _)) = self.pods.remove(key) else { continue };
            if let Some(handle) = &active.handle {
                handle.close(Reason::UnknownWorkload);
            }
            if let Err(error) = self.control.kernel.bury(writer, &active.pod) {
                tracing::error!(workload = %key, %error, "removing a pod that is gone");
            }
            tracing::info!(workload = %key, "the pod is gone");
        }
        !keys.is_empty()
    }

    /// Enrolments of an agent before that the configuration does not have are let go in the same order.
    pub(super) async fn adopt_orphans(&mut self, writer: &Writer) {
        for (id, record) in self.control.kernel.enrolled() {
            if self.pods.values().filter_map(Life::active).any(|active| active.pod.id == id) {
                continue;
            }
            let key = WorkloadKey { namespace: "orphan".into(), name: id.to_string().into() };
            let adopted = self.control.kernel.adopt(id, &record, &key).await;
            match adopted {
                Ok(Some((workload, pod))) => {
                    let active = Active { workload, pod, handle: None, modes: Vec::new(), contained: true };
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

    /// Writes modes that changed.
    pub(super) fn follow_policy(&mut self, writer: &Writer) {
        for (key, life) in &mut self.pods {
            let Some(local) = self.previous.workloads.get(key) else { continue };
            let Life::Enrolled(active) = life else { continue };
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
            let Life::Enrolled(active) = life else { continue };
            if active.pod.id != pod_id {
                continue;
            }
            match self.control.kernel.refresh(&writer, &mut active.pod).await {
                Ok(false) => {}
                Ok(true) => {
                    active.contained = false;
                    tracing::warn!(workload = %key, "the pod's rule or routes were gone and have been restored");
                }
                Err(KernelError::Superseded) => {}
                Err(error) => tracing::error!(workload = %key, %error, "following the pod's network"),
            }
        }
    }

    pub(super) fn recount_listeners(&mut self) {
        for (key, life) in &self.pods {
            if let Some(active) = life.active()
                && let Err(error) = self.control.kernel.count_listeners(&active.pod)
            {
                tracing::error!(workload = %key, %error, "listening ports");
            }
        }
    }

    /// Ends every connection and waits until the last has.
    pub(super) async fn close(&mut self, reason: Reason) {
        let handles = || self.pods.values().filter_map(Life::active).filter_map(|active| active.handle.as_ref());
        handles().for_each(|handle| handle.close(reason));
        for handle in handles() {
            handle.drained().await;
        }
    }
}

/// Default first, then the ports that differ; what the kernel needs to be told anew.
fn modes(listener: &crate::snapshot::Listener) -> Vec<(u16, Mode)> {
    let ports = listener.ports.iter().map(|(port, rule)| (*port, rule.mode));
    std::iter::once((0, listener.default.mode)).chain(ports).collect()
}
