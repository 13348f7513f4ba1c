//! From the file as written to a [`Config`]: everything but workloads and policies, and the order of it all.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_saphyr::{Location, Spanned};

use super::error::{ConfigErrors, Problems};
use super::raw::{self, Field};
use super::{Capture, Config, IdentitySettings, Places, mesh, policies, values};
use crate::snapshot::{Limits, Timeouts};
use crate::workload::SourceKind;

/// The configuration that `file` holds, or everything that is wrong with it.
pub(super) fn config(path: &Path, file: &raw::File) -> Result<Config, ConfigErrors> {
    let mut problems = Problems::default();
    let config = build(path, file, &mut problems);
    problems.finish(path, config)
}

/// `embedded` or `files`.
pub(super) fn source(field: &Spanned<String>, name: &str, problems: &mut Problems) -> Option<SourceKind> {
    match field.value.as_str() {
        "embedded" => Some(SourceKind::Embedded),
        "files" => Some(SourceKind::Files),
        "spire" => {
            problems.unsupported(field.referenced, &format!("{name} spire"));
            None
        }
        other => {
            problems.add(field.referenced, format!("{name} {other:?} must be embedded or files"));
            None
        }
    }
}

fn build(path: &Path, file: &raw::File, problems: &mut Problems) -> Option<Config> {
    let trust_domain = problems
        .need(&file.trust_domain, Location::UNKNOWN, "trustDomain")
        .and_then(|value| problems.parse(value, "trustDomain", values::trust_domain));
    let node =
        problems.need(&file.node, Location::UNKNOWN, "node").and_then(|v| problems.parse(v, "node", values::name));
    let identity = identity(&file.identity, problems);
    let capture = capture(&file.capture, problems);
    let admin_default = SocketAddr::from(([127, 0, 0, 1], 15000));
    let admin = listen(&file.admin, "admin", values::loopback_listen, problems).unwrap_or(admin_default);
    let metrics = listen(&file.metrics, "metrics", values::listen, problems);
    let clash = |metrics: &SocketAddr| {
        metrics.port() == admin.port() && (metrics.ip() == admin.ip() || metrics.ip().is_unspecified())
    };
    if metrics.as_ref().is_some_and(clash) {
        problems.add(place(&file.metrics), format!("metrics.listen takes the place of admin.listen, {admin}"));
    }
    let timeouts = timeouts(&file.timeouts, problems);
    let limits = limits(&file.limits, problems);
    let source = identity.as_ref().map(|identity| identity.source);
    let mesh = mesh::mesh(file, source, trust_domain.as_ref(), problems);
    let policies = policies::policies(&file.policies, problems);
    Some(Config {
        node: node?,
        trust_domain: trust_domain?,
        identity: identity?,
        capture,
        admin,
        metrics,
        timeouts,
        limits,
        workloads: mesh.workloads,
        peers: mesh.peers,
        services: mesh.services,
        policies,
        places: Places {
            file: path.into(),
            trust_domain: place(&file.trust_domain),
            node: place(&file.node),
            identity: place(&file.identity),
            capture: place(&file.capture),
            admin: place(&file.admin),
            metrics: place(&file.metrics),
        },
    })
}

fn identity(field: &Field<raw::Identity>, problems: &mut Problems) -> Option<IdentitySettings> {
    // No default: the development CA must be somebody's choice.
    let Spanned { value: identity, referenced, .. } = problems.need(field, Location::UNKNOWN, "identity")?;
    let source = problems
        .need(&identity.source, *referenced, "identity.source")
        .and_then(|v| source(v, "identity.source", problems));
    if identity.spire.0.is_some() {
        problems.unsupported(place(&identity.spire), "identity.spire");
    }
    let embedded_dir = directory(&identity.embedded, "identity.embedded.dir", "/run/sealane/dev-ca", problems);
    let files_dir = directory(&identity.files, "identity.files.dir", "/etc/sealane/identities", problems);
    Some(IdentitySettings { source: source?, embedded_dir, files_dir })
}

fn directory(field: &Field<raw::Directory>, name: &str, default: &str, problems: &mut Problems) -> PathBuf {
    match &field.0 {
        Some(directory) => problems.parse_or(&directory.value.dir, name, values::absolute_path, default.into()),
        None => default.into(),
    }
}

fn capture(field: &Field<raw::Capture>, problems: &mut Problems) -> Capture {
    let mut capture = Capture::default();
    if let Some(Spanned { value, .. }) = &field.0 {
        capture.cgroup = problems.parse_or(&value.cgroup, "capture.cgroup", values::absolute_path, capture.cgroup);
        capture.bpffs = problems.parse_or(&value.bpffs, "capture.bpffs", values::absolute_path, capture.bpffs);
        capture.ports =
            problems.parse_or(&value.listen_ports, "capture.listenPorts", values::four_ports, capture.ports);
    }
    capture
}

fn listen(
    field: &Field<raw::Listen>,
    section: &str,
    parser: fn(&str) -> Result<SocketAddr, String>,
    problems: &mut Problems,
) -> Option<SocketAddr> {
    let Spanned { value, referenced, .. } = field.0.as_ref()?;
    let name = format!("{section}.listen");
    problems.need(&value.listen, *referenced, &name).and_then(|text| problems.parse(text, &name, parser))
}

fn timeouts(field: &Field<raw::Timeouts>, problems: &mut Problems) -> Timeouts {
    let default = Timeouts::default();
    let Some(Spanned { value: raw, .. }) = &field.0 else { return default };
    let mut any = |field, name, default: Duration| problems.parse_or(field, name, values::duration, default);
    let svid_wait = any(&raw.svid_wait, "timeouts.svidWait", default.svid_wait);
    let drain = any(&raw.drain, "timeouts.drain", default.drain);
    let unenrol_grace = any(&raw.unenrol_grace, "timeouts.unenrolGrace", default.unenrol_grace);
    let peek = any(&raw.peek, "timeouts.peek", default.peek);
    let max_connection_age = any(&raw.max_connection_age, "timeouts.maxConnectionAge", default.max_connection_age);
    let mut positive = |field, name, default| problems.parse_or(field, name, values::positive_duration, default);
    let connect = positive(&raw.connect, "timeouts.connect", default.connect);
    let handshake = positive(&raw.handshake, "timeouts.handshake", default.handshake);
    Timeouts { connect, handshake, svid_wait, drain, unenrol_grace, peek, max_connection_age }
}

fn limits(field: &Field<raw::Limits>, problems: &mut Problems) -> Limits {
    let default = Limits::default();
    let Some(Spanned { value: raw, .. }) = &field.0 else { return default };
    let mut count = |field, name, default| problems.parse_or(field, name, values::count, default);
    Limits {
        connections_per_pod: count(&raw.connections_per_pod, "limits.connectionsPerPod", default.connections_per_pod),
        handshakes_per_pod: count(&raw.handshakes_per_pod, "limits.handshakesPerPod", default.handshakes_per_pod),
    }
}

/// Where a field stands; the file as a whole where it is absent.
fn place<T>(field: &Field<T>) -> Location {
    field.0.as_ref().map_or(Location::UNKNOWN, |value| value.referenced)
}
