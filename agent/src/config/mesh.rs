//! Workloads, peers and services of the file, and who claims which address.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use serde_saphyr::{Location, Spanned};

use super::error::Problems;
use super::raw::{self, Field, List};
use super::{validate, values};
use crate::identity::TrustDomain;
use crate::workload::{Mode, Peer, Service, SourceKind, Workload, WorkloadKey};

/// Who is in the mesh, as far as the file says.
pub(super) struct Mesh {
    pub(super) workloads: Vec<Workload>,
    pub(super) peers: Vec<Peer>,
    pub(super) services: Vec<Service>,
}

/// What must be unique in a file, with the place of the first.
#[derive(Default)]
struct Seen {
    pods: HashMap<WorkloadKey, Location>,
    netns: HashMap<std::path::PathBuf, Location>,
    /// Addresses of workloads and peers.
    ips: HashMap<IpAddr, Location>,
    services: HashMap<WorkloadKey, Location>,
    vips: HashMap<IpAddr, Location>,
    vip_ports: HashMap<(IpAddr, u16), Location>,
}

/// `source` and `own` are absent where they are wrong themselves.
pub(super) fn mesh(
    file: &raw::File,
    source: Option<SourceKind>,
    own: Option<&TrustDomain>,
    problems: &mut Problems,
) -> Mesh {
    let mut seen = Seen::default();
    let workloads =
        entries(&file.workloads).filter_map(|raw| workload(raw, source, own, &mut seen, problems)).collect();
    let peers = entries(&file.peers).filter_map(|raw| peer(raw, &mut seen, problems)).collect();
    let services = entries(&file.services).filter_map(|raw| service(raw, &mut seen, problems)).collect();
    for raw in entries(&file.services) {
        for endpoint in entries(&raw.value.endpoints) {
            if values::ip(&endpoint.value).is_ok_and(|ip| seen.vips.contains_key(&ip)) {
                problems
                    .add(endpoint.referenced, format!("endpoints {:?} is a VIP, not a pod's address", endpoint.value));
            }
        }
    }
    Mesh { workloads, peers, services }
}

/// `namespace/name` of the mapping at `at`.
pub(super) fn key(
    namespace: &Field<String>,
    name: &Field<String>,
    at: Location,
    problems: &mut Problems,
) -> Option<WorkloadKey> {
    let mut part = |field, label| problems.need(field, at, label).and_then(|v| problems.parse(v, label, values::name));
    let (name, namespace) = (part(name, "name"), part(namespace, "namespace"));
    Some(WorkloadKey { namespace: namespace?.into(), name: name?.into() })
}

/// The entries of a list that may be absent.
pub(super) fn entries<T>(list: &List<T>) -> impl Iterator<Item = &Spanned<T>> {
    list.0.iter().flat_map(|list| &list.value)
}

/// Ports, each once, with what is said of them.
pub(super) fn by_port<T, V>(
    list: &List<T>,
    port: fn(&T) -> &Field<String>,
    mut value: impl FnMut(&T, u16, &mut Problems) -> V,
    problems: &mut Problems,
) -> BTreeMap<u16, V> {
    let mut seen = HashMap::new();
    let mut ports = BTreeMap::new();
    for entry in entries(list) {
        let text = problems.need(port(&entry.value), entry.referenced, "port");
        let number = text.and_then(|text| problems.parse(text, "port", values::port));
        if let (Some(text), Some(number)) = (text, number) {
            problems.unique(&mut seen, number, text.referenced, &format!("port {number}"));
        }
        // Judged even without a good port, to find all that is wrong with the entry.
        let value = value(&entry.value, number.unwrap_or(0), problems);
        if let Some(number) = number {
            ports.insert(number, value);
        }
    }
    ports
}

fn workload(
    raw: &Spanned<raw::Workload>,
    default: Option<SourceKind>,
    own: Option<&TrustDomain>,
    seen: &mut Seen,
    problems: &mut Problems,
) -> Option<Workload> {
    let Spanned { value: raw, referenced: at, .. } = raw;
    let key = pod_key(&raw.namespace, &raw.name, *at, seen, problems);
    let netns = problems.need(&raw.netns, *at, "netns").and_then(|text| {
        let netns = problems.parse(text, "netns", values::netns)?;
        problems.unique(&mut seen.netns, netns.clone(), text.referenced, &format!("netns {:?}", text.value));
        Some(netns)
    });
    let ips = pod_ips(&raw.ips, *at, seen, problems);
    let service_account = problems.parse_or(&raw.service_account, "serviceAccount", values::name, String::new());
    if let Some(selectors) = raw.selectors.0.as_ref().filter(|selectors| !selectors.value.is_empty()) {
        problems.unsupported(selectors.referenced, "selectors");
    }
    let source = source(raw, default, problems);
    let spiffe_id = source.and_then(|source| embedded_id(raw, *at, source, own, problems));
    Some(Workload {
        key: key?,
        service_account,
        labels: raw.labels.0.as_ref().map(|labels| labels.value.clone()).unwrap_or_default(),
        netns: netns?,
        ips,
        spiffe_id,
        source: source?,
    })
}

/// The workload's own source, else the file's.
fn source(raw: &raw::Workload, default: Option<SourceKind>, problems: &mut Problems) -> Option<SourceKind> {
    let Some(Spanned { value: identity, .. }) = &raw.identity.0 else { return default };
    for (field, name) in [(&identity.hint, "identity.hint"), (&identity.id, "identity.id")] {
        if let Some(value) = &field.0 {
            problems.unsupported(value.referenced, name);
        }
    }
    match &identity.source.0 {
        Some(source) => validate::source(source, "identity.source", problems),
        None => default,
    }
}

/// The ID that the development CA shall issue; any other source brings its own.
fn embedded_id(
    raw: &raw::Workload,
    at: Location,
    source: SourceKind,
    own: Option<&TrustDomain>,
    problems: &mut Problems,
) -> Option<crate::identity::SpiffeId> {
    match source {
        SourceKind::Embedded => {
            let text = problems.need(&raw.spiffe_id, at, "spiffeId, which source embedded issues,")?;
            let id = problems.parse(text, "spiffeId", values::spiffe_id)?;
            if let Some(own) = own.filter(|own| id.trust_domain() != *own) {
                problems.add(text.referenced, format!("spiffeId \"{id}\" is outside the trust domain {own}"));
            }
            Some(id)
        }
        SourceKind::Files => {
            if let Some(text) = &raw.spiffe_id.0 {
                problems.add(text.referenced, "spiffeId is for source embedded only: files bring their own");
            }
            None
        }
    }
}

fn peer(raw: &Spanned<raw::Peer>, seen: &mut Seen, problems: &mut Problems) -> Option<Peer> {
    let Spanned { value: raw, referenced: at, .. } = raw;
    let key = pod_key(&raw.namespace, &raw.name, *at, seen, problems);
    let ips = pod_ips(&raw.ips, *at, seen, problems);
    let spiffe_id = problems
        .need(&raw.spiffe_id, *at, "spiffeId")
        .and_then(|text| problems.parse(text, "spiffeId", values::spiffe_id));
    let mode = problems.parse_or(&raw.mode, "mode", values::mode, Mode::Permissive);
    let port_mode =
        |entry: &raw::PeerPort, _, problems: &mut Problems| problems.parse_or(&entry.mode, "mode", values::mode, mode);
    let ports = by_port(&raw.ports, |entry| &entry.port, port_mode, problems);
    Some(Peer { key: key?, ips, spiffe_id: spiffe_id?, mode, ports })
}

fn service(raw: &Spanned<raw::Service>, seen: &mut Seen, problems: &mut Problems) -> Option<Service> {
    let Spanned { value: raw, referenced: at, .. } = raw;
    let key = key(&raw.namespace, &raw.name, *at, problems);
    if let Some(key) = &key {
        problems.unique(&mut seen.services, key.clone(), *at, &format!("service {key}"));
    }
    problems.need(&raw.ports, *at, "ports");
    let target = |entry: &raw::ServicePort, port, problems: &mut Problems| {
        problems.parse_or(&entry.target_port, "targetPort", values::port, port)
    };
    let ports = by_port(&raw.ports, |entry| &entry.port, target, problems);
    problems.need(&raw.vips, *at, "vips");
    let mut vips = Vec::new();
    for (ip, text) in addresses(&raw.vips, "vips", problems) {
        if let Some(first) = seen.ips.get(&ip) {
            problems.add(text.referenced, format!("vips {ip} is the address of the pod in line {}", first.line()));
        }
        for port in ports.keys() {
            problems.unique(&mut seen.vip_ports, (ip, *port), text.referenced, &format!("vips {ip} with port {port}"));
        }
        seen.vips.entry(ip).or_insert(text.referenced);
        vips.push(ip);
    }
    let mut once = HashMap::new();
    let mut endpoints = Vec::new();
    for (ip, text) in addresses(&raw.endpoints, "endpoints", problems) {
        problems.unique(&mut once, ip, text.referenced, &format!("endpoints {ip}"));
        endpoints.push(ip);
    }
    Some(Service { key: key?, vips, ports, endpoints })
}

fn pod_key(
    namespace: &Field<String>,
    name: &Field<String>,
    at: Location,
    seen: &mut Seen,
    problems: &mut Problems,
) -> Option<WorkloadKey> {
    let key = key(namespace, name, at, problems)?;
    problems.unique(&mut seen.pods, key.clone(), at, &format!("workload {key}"));
    Some(key)
}

fn pod_ips(list: &List<String>, at: Location, seen: &mut Seen, problems: &mut Problems) -> Vec<IpAddr> {
    if problems.need(list, at, "ips").is_some_and(|list| list.value.is_empty()) {
        problems.add(at, "ips is empty");
    }
    let mut ips = Vec::new();
    for (ip, text) in addresses(list, "ips", problems) {
        problems.unique(&mut seen.ips, ip, text.referenced, &format!("ips {ip}"));
        ips.push(ip);
    }
    ips
}

fn addresses<'f>(list: &'f List<String>, name: &str, problems: &mut Problems) -> Vec<(IpAddr, &'f Spanned<String>)> {
    entries(list).filter_map(|text| Some((problems.parse(text, name, values::ip)?, text))).collect()
}
