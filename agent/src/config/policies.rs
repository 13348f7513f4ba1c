//! Policies of the file.

use std::collections::HashMap;

use serde_saphyr::{Location, Spanned};

use super::error::Problems;
use super::mesh::{by_port, entries, key};
use super::raw::{self, Field, List};
use super::values;
use crate::identity::SpiffeId;
use crate::workload::{AllowRule, ListenerPolicy, Mode, Policy, Select};

/// The policies that could be built; what is wrong with the others is in `problems`.
pub(super) fn policies(list: &List<raw::Policy>, problems: &mut Problems) -> Vec<Policy> {
    let mut seen = HashMap::new();
    entries(list)
        .filter_map(|raw| {
            let policy = policy(raw, problems)?;
            problems.unique(&mut seen, policy.key.clone(), raw.referenced, &format!("policy {}", policy.key));
            Some(policy)
        })
        .collect()
}

fn policy(raw: &Spanned<raw::Policy>, problems: &mut Problems) -> Option<Policy> {
    let Spanned { value: raw, referenced: at, .. } = raw;
    let key = key(&raw.namespace, &raw.name, *at, problems);
    let select = select(&raw.select, problems);
    let listener = raw.listener.0.as_ref().map(|raw| listener(&raw.value, problems));
    if let Some(client) = &raw.client.0 {
        problems.unsupported(client.referenced, "client");
    }
    if let Some(Spanned { value: refuse, .. }) = &raw.refuse.0 {
        unsupported_if_true(&refuse.raw_sockets, "refuse.rawSockets: true", problems);
        unsupported_if_true(&refuse.udp, "refuse.udp: true", problems);
        unsupported_if_true(&refuse.net_admin, "refuse.netAdmin: true", problems);
    }
    match raw.same_node.0.as_ref().map(|value| (value.value.as_str(), value.referenced)) {
        None | Some(("mtls", _)) => {}
        Some(("kernel", at)) => problems.unsupported(at, "sameNode: kernel"),
        Some((other, at)) => problems.add(at, format!("sameNode {other:?} must be mtls or kernel")),
    }
    Some(Policy { key: key?, select, listener })
}

fn select(field: &Field<raw::Select>, problems: &mut Problems) -> Select {
    let Some(Spanned { value: raw, referenced: at, .. }) = &field.0 else { return Select::Namespace };
    match (&raw.labels.0, &raw.service_account.0) {
        (None, None) => Select::Namespace,
        (Some(labels), None) => {
            if labels.value.is_empty() {
                problems.add(labels.referenced, "select.labels is empty; leave it out for the whole namespace");
            }
            Select::Labels(labels.value.clone())
        }
        (None, Some(account)) => {
            let account = problems.parse(account, "select.serviceAccount", values::name);
            Select::ServiceAccount(account.unwrap_or_default())
        }
        (Some(_), Some(_)) => {
            problems.add(*at, "select takes labels or serviceAccount, not both");
            Select::Namespace
        }
    }
}

fn listener(raw: &raw::Listener, problems: &mut Problems) -> ListenerPolicy {
    let mode = problems.parse_or(&raw.mode, "listener.mode", values::mode, Mode::Permissive);
    unsupported_if_true(&raw.fail_open, "listener.failOpen: true", problems);
    if let Some(version) = raw.tls.0.as_ref().and_then(|tls| tls.value.min_version.0.as_ref()) {
        match version.value.as_str() {
            "1.3" => {}
            "1.2" => problems.unsupported(version.referenced, "listener.tls.minVersion \"1.2\""),
            other => problems.add(version.referenced, format!("listener.tls.minVersion {other:?} must be \"1.3\"")),
        }
    }
    let port_mode = |entry: &raw::ListenerPort, _, problems: &mut Problems| {
        unsupported_if_true(&entry.app_tls, "appTLS: true", problems);
        if let Some(alpn) = entry.alpn.0.as_ref().filter(|alpn| !alpn.value.is_empty()) {
            problems.unsupported(alpn.referenced, "alpn");
        }
        problems.parse_or(&entry.mode, "mode", values::mode, mode)
    };
    let ports = by_port(&raw.ports, |entry| &entry.port, port_mode, problems);
    let rules = raw.allow.0.as_ref().map(|list| &list.value);
    let allow = rules.map(|rules| rules.iter().filter_map(|rule| allow_rule(rule, problems)).collect());
    ListenerPolicy { mode, ports, allow }
}

fn allow_rule(raw: &Spanned<raw::Allow>, problems: &mut Problems) -> Option<AllowRule> {
    let Spanned { value: raw, referenced: at, .. } = raw;
    let ports = rule_ports(&raw.ports, problems);
    let from = problems.need(&raw.from, *at, "from")?;
    if from.value.is_empty() {
        problems.add(from.referenced, "from is empty; leave the rule out, or write allow: [] for nobody");
    }
    let from = from.value.iter().filter_map(|text| allowed_id(text, problems)).collect();
    Some(AllowRule { from, ports })
}

fn rule_ports(list: &List<String>, problems: &mut Problems) -> Vec<u16> {
    if let Some(empty) = list.0.as_ref().filter(|list| list.value.is_empty()) {
        problems.add(empty.referenced, "ports is empty; leave it out for every port");
    }
    let mut seen: HashMap<u16, Location> = HashMap::new();
    let mut ports = Vec::new();
    for text in entries(list) {
        if let Some(port) = problems.parse(text, "ports", values::port) {
            problems.unique(&mut seen, port, text.referenced, &format!("port {port}"));
            ports.push(port);
        }
    }
    ports
}

fn allowed_id(text: &Spanned<String>, problems: &mut Problems) -> Option<SpiffeId> {
    if text.value.ends_with("/*") {
        problems.unsupported(text.referenced, &format!("from {:?}: a trailing /*", text.value));
        return None;
    }
    problems.parse(text, "from", values::spiffe_id)
}

fn unsupported_if_true(field: &Field<bool>, what: &str, problems: &mut Problems) {
    if let Some(value) = field.0.as_ref().filter(|value| value.value) {
        problems.unsupported(value.referenced, what);
    }
}
