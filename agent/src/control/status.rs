//! What the control task shows to the admin endpoint.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use crate::kernel::pod::Uncovered;

/// The control task's own view of the node.
#[derive(Debug, Default)]
pub struct Status {
    shown: Mutex<Shown>,
}

#[derive(Clone, Debug, Default)]
struct Shown {
    pods: Vec<PodStatus>,
    ready: bool,
    config_error: Option<String>,
    failures: BTreeMap<&'static str, String>,
    superseded: bool,
}

/// One pod.
#[derive(Clone, Debug, Serialize)]
pub struct PodStatus {
    /// `namespace/name`.
    pub workload: String,
    /// `pending`, `enrolled` or `leaving`.
    pub state: &'static str,
    /// What it waits for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Open connections, in and out.
    pub connections: usize,
    /// False where the pod has undone its capture at some time (it holds CAP_NET_ADMIN); it was restored each time.
    pub contained: bool,
    /// Sockets that the capture does not cover.
    #[serde(flatten)]
    pub uncovered: Uncovered,
}

impl Status {
    /// The pods, sorted by name.
    pub fn pods(&self) -> Vec<PodStatus> {
        self.read().pods
    }

    /// Why the node is not ready; empty where it is.
    pub fn not_ready(&self) -> Vec<String> {
        let shown = self.read();
        let mut reasons = Vec::new();
        reasons.extend(shown.failures.into_iter().map(|(what, failure)| format!("{what}: {failure}")));
        if !shown.ready {
            reasons.push("the node's pods are being enrolled".to_owned());
        }
        if shown.superseded {
            reasons.push("another agent has taken over".to_owned());
        }
        reasons
    }

    /// Why the last reload was refused.
    pub fn config_error(&self) -> Option<String> {
        self.read().config_error
    }

    pub(super) fn set_pods(&self, mut pods: Vec<PodStatus>, ready: bool) {
        pods.sort_by(|a, b| a.workload.cmp(&b.workload));
        self.write(|shown| {
            shown.pods = pods;
            // Once ready, a pod that comes later does not make the node unready.
            shown.ready |= ready;
        });
    }

    pub(super) fn set_config_error(&self, error: Option<String>) {
        self.write(|shown| shown.config_error = error);
    }

    /// What the node as a whole fails at; `None` where it works.
    pub(super) fn set_failure(&self, what: &'static str, failure: Option<String>) {
        self.write(|shown| match failure {
            Some(failure) => drop(shown.failures.insert(what, failure)),
            None => drop(shown.failures.remove(what)),
        });
    }

    pub(super) fn has_failed(&self, what: &str) -> bool {
        self.read().failures.contains_key(what)
    }

    /// Another agent writes now.
    pub fn set_superseded(&self) {
        self.write(|shown| shown.superseded = true);
    }

    fn read(&self) -> Shown {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn write(&self, change: impl FnOnce(&mut Shown)) {
        change(&mut self.shown.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
