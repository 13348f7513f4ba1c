//! Every metric, and the record of one connection: opened, then finished exactly once, as a metric and an access-log line.

use std::collections::{BTreeSet, HashMap};
use std::fmt::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder, text,
};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry};
use sealane_common::reason::Reason;

use crate::snapshot::{IdentityState, Reader};
use crate::workload::WorkloadKey;

pub use record::{ConnRecord, TlsFacts, Traffic};

mod record;

/// What the kernel programs counted, by reason; asked at every scrape.
pub type KernelEvents = Arc<dyn Fn() -> Vec<(Reason, u64)> + Send + Sync>;

/// Every metric of the agent.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    opened: Family<Opened, Counter>,
    closed: Family<Ended, Counter>,
    refused: Family<Ended, Counter>,
    open: Family<Where, Gauge>,
    bytes: Family<Bytes, Counter>,
    plaintext: Family<Port, Counter>,
    /// The label sets of `plaintext`, which cannot be listed, for [`Self::forget`].
    plaintext_ports: Mutex<HashMap<WorkloadKey, BTreeSet<(Direction, u16)>>>,
    /// TLS handshakes that succeeded, in seconds.
    pub handshake_seconds: Histogram,
    /// TCP dials that succeeded, in seconds.
    pub connect_seconds: Histogram,
    /// Pods whose listeners the agent serves.
    pub pods_enrolled: Gauge,
    /// Failed accept calls (descriptors, memory).
    pub accept_errors: Counter,
}

/// Who opened the connection, as seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// From the network to the application.
    Inbound,
    /// From the application to the mesh.
    Outbound,
}

/// How a connection crosses to its peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Carried {
    /// Both ends proved their identity.
    Mtls,
    /// As it came.
    Plaintext,
    /// To the pod itself, inside the pod.
    Hairpin,
}

/// Who sent the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The application of this node's pod.
    App,
    /// The other end.
    Peer,
}

impl Metrics {
    /// Registers every metric. SVIDs' expiry is read from the snapshot at every scrape.
    pub fn new(snapshots: Reader, kernel_events: KernelEvents) -> Self {
        let mut registry = Registry::with_prefix("sealane");
        let r = &mut registry;
        // 0.5 ms (same rack, one round trip) to 8 s (beyond the default time limits).
        let seconds = || Histogram::new(exponential_buckets(0.0005, 2.0, 15));
        let opened = add(r, "connections_opened", "Connections carried to their peer", Family::default());
        let closed = add(r, "connections_closed", "Carried connections that ended, and why", Family::default());
        let refused = add(r, "connections_refused", "Connections refused before they were carried", Family::default());
        let open = add(r, "connections_open", "Connections being carried now", Family::default());
        let bytes = add(r, "bytes", "Application bytes carried, by who sent them", Family::default());
        let plaintext = add(r, "plaintext_connections", "Connections carried in plaintext, by port", Family::default());
        let handshake_seconds = add(r, "handshake_seconds", "Duration of TLS handshakes", seconds());
        let connect_seconds = add(r, "connect_seconds", "Duration of TCP dials", seconds());
        let pods_enrolled = add(r, "pods_enrolled", "Pods whose connections the agent carries", Gauge::default());
        let accept_errors = add(r, "accept_errors", "Failed accept calls", Counter::default());
        registry.register_collector(Box::new(Expiry(snapshots)));
        registry.register_collector(Box::new(Kernel(kernel_events)));
        Self {
            registry,
            opened,
            closed,
            refused,
            open,
            bytes,
            plaintext,
            plaintext_ports: Mutex::default(),
            handshake_seconds,
            connect_seconds,
            pods_enrolled,
            accept_errors,
        }
    }

    /// All metrics in the OpenMetrics text format.
    ///
    /// # Errors
    /// Only where a collector cannot format its value.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// Drops the series of a workload that is gone for good, its connections included; otherwise a long-lived node keeps
    /// those of every pod it ever ran.
    pub fn forget(&self, workload: &WorkloadKey) {
        let ports = self.plaintext_ports.lock().unwrap_or_else(PoisonError::into_inner).remove(workload);
        let workload = || Name(workload.clone());
        for (direction, port) in ports.unwrap_or_default() {
            self.plaintext.remove(&Port { direction, workload: workload(), port });
        }
        for direction in [Direction::Inbound, Direction::Outbound] {
            self.open.remove(&Where { direction, workload: workload() });
            for mode in [Carried::Mtls, Carried::Plaintext, Carried::Hairpin] {
                self.opened.remove(&Opened { direction, workload: workload(), mode });
            }
            for side in [Side::App, Side::Peer] {
                self.bytes.remove(&Bytes { direction, workload: workload(), side });
            }
            for reason in Reason::ALL.iter().copied().map(Some).chain([None]).map(Outcome) {
                self.closed.remove(&Ended { direction, workload: workload(), reason });
                self.refused.remove(&Ended { direction, workload: workload(), reason });
            }
        }
    }

    fn count_plaintext(&self, direction: Direction, workload: &WorkloadKey, port: u16) {
        self.plaintext.get_or_create(&Port { direction, workload: Name(workload.clone()), port }).inc();
        let mut ports = self.plaintext_ports.lock().unwrap_or_else(PoisonError::into_inner);
        ports.entry(workload.clone()).or_default().insert((direction, port));
    }
}

/// Registers a metric and hands it back.
fn add<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

impl Direction {
    /// The metric label and the log field.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

impl Carried {
    /// The metric label and the log field.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Mtls => "mtls",
            Self::Plaintext => "plaintext",
            Self::Hairpin => "hairpin",
        }
    }
}

impl Side {
    /// The metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::App => "app",
            Self::Peer => "peer",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Where {
    direction: Direction,
    workload: Name,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Opened {
    direction: Direction,
    workload: Name,
    mode: Carried,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    direction: Direction,
    workload: Name,
    reason: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Bytes {
    direction: Direction,
    workload: Name,
    side: Side,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Port {
    direction: Direction,
    workload: Name,
    port: u16,
}

/// `None`: both directions ended in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Outcome(Option<Reason>);

impl Outcome {
    fn label(self) -> &'static str {
        self.0.map_or("done", Reason::label)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Name(WorkloadKey);

impl EncodeLabelValue for Name {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        write!(encoder, "{}", self.0)
    }
}

macro_rules! label_values {
    ($($name:ident)*) => {$(
        impl EncodeLabelValue for $name {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
                encoder.write_str(self.label())
            }
        }
    )*};
}

label_values! { Direction Carried Side Outcome }

struct Expiry(Reader);

impl fmt::Debug for Expiry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Expiry")
    }
}

impl Collector for Expiry {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let snapshot = self.0.borrow().clone();
        let help = "When the workload's SVID expires, in seconds since 1970";
        let gauge = ConstGauge::new(0u64);
        let name = "svid_expiry_timestamp_seconds";
        let mut family = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
        for (key, workload) in &snapshot.workloads {
            if let IdentityState::Ready(tls) = &workload.identity {
                let expiry = tls.identity().svid.not_after.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                let labels = [("workload", key.to_string())];
                ConstGauge::new(expiry).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

struct Kernel(KernelEvents);

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kernel")
    }
}

impl Collector for Kernel {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let help = "What the kernel programs decided";
        let counter = ConstCounter::new(0u64);
        let mut family = encoder.encode_descriptor("kernel_events", help, None, counter.metric_type())?;
        for (reason, count) in (self.0)() {
            let labels = [("reason", reason.label())];
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
