//! Which policy binds a workload, and what it says of each port.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::{IdentityState, Listener, LocalWorkload, PortRule};
use crate::config::Config;
use crate::identity::TrustDomain;
use crate::workload::{Allow, AllowRule, ListenerPolicy, Mode, Policy, Select, Workload};

/// The listener of a workload. TLS servers come from `before` where it had the same identity.
pub(super) fn listener(
    config: &Config,
    workload: &Workload,
    identity: &IdentityState,
    before: Option<&LocalWorkload>,
) -> Listener {
    let default = ListenerPolicy { mode: Mode::Permissive, ports: Default::default(), allow: None };
    let policy = select(&config.policies, workload).unwrap_or(&default);
    let own = match identity {
        IdentityState::Ready(tls) => tls.identity().svid.id.trust_domain(),
        IdentityState::Pending | IdentityState::Withdrawn => &config.trust_domain,
    };
    let mut servers = Servers::new(identity, before);
    let mut rule = |port: Option<u16>| {
        let mode = port.and_then(|port| policy.ports.get(&port).copied()).unwrap_or(policy.mode);
        let allow = allow(policy.allow.as_deref(), port, own);
        let tls = servers.get(&allow);
        PortRule { mode, allow, tls }
    };
    let ports = named_ports(policy).into_iter().map(|port| (port, rule(Some(port)))).collect();
    Listener { default: rule(None), ports }
}

/// The listener block that binds the workload: the most specific wins whole.
pub(super) fn select<'p>(policies: &'p [Policy], workload: &Workload) -> Option<&'p ListenerPolicy> {
    let binding = policies.iter().filter(|policy| policy.listener.is_some() && binds(policy, workload));
    binding.min_by_key(|policy| (rank(&policy.select), &policy.key.name))?.listener.as_ref()
}

/// Who may call `port`, or any port that no rule names.
pub(super) fn allow(rules: Option<&[AllowRule]>, port: Option<u16>, own: &TrustDomain) -> Allow {
    let Some(rules) = rules else { return Allow::TrustDomain(own.clone()) };
    let applies = |rule: &&AllowRule| rule.ports.is_empty() || port.is_some_and(|port| rule.ports.contains(&port));
    // In order and each once, so that equal rights compare as equal.
    let ids: BTreeSet<_> = rules.iter().filter(applies).flat_map(|rule| &rule.from).cloned().collect();
    Allow::Ids(ids.into_iter().collect())
}

fn binds(policy: &Policy, workload: &Workload) -> bool {
    policy.key.namespace == workload.key.namespace
        && match &policy.select {
            Select::Labels(labels) => labels.iter().all(|(key, value)| workload.labels.get(key) == Some(value)),
            Select::ServiceAccount(account) => *account == workload.service_account,
            Select::Namespace => true,
        }
}

fn rank(select: &Select) -> u8 {
    match select {
        Select::Labels(_) => 0,
        Select::ServiceAccount(_) => 1,
        Select::Namespace => 2,
    }
}

/// Ports with a mode of their own, or that a rule names.
fn named_ports(policy: &ListenerPolicy) -> BTreeSet<u16> {
    let allowed = policy.allow.iter().flatten().flat_map(|rule| &rule.ports);
    policy.ports.keys().chain(allowed).copied().collect()
}

/// One TLS server per distinct `allow`.
struct Servers<'i> {
    identity: &'i IdentityState,
    built: HashMap<Allow, Arc<rustls::ServerConfig>>,
}

impl<'i> Servers<'i> {
    fn new(identity: &'i IdentityState, before: Option<&LocalWorkload>) -> Self {
        let before = before.filter(|before| same_identity(identity, &before.identity)).map(|before| &before.listener);
        let rules = before.into_iter().flat_map(|listener| listener.ports.values().chain([&listener.default]));
        let built = rules.filter_map(|rule| Some((rule.allow.clone(), rule.tls.clone()?))).collect();
        Self { identity, built }
    }

    fn get(&mut self, allow: &Allow) -> Option<Arc<rustls::ServerConfig>> {
        let IdentityState::Ready(tls) = self.identity else { return None };
        let server = self.built.entry(allow.clone()).or_insert_with(|| tls.server(allow.clone()));
        Some(server.clone())
    }
}

fn same_identity(a: &IdentityState, b: &IdentityState) -> bool {
    matches!((a, b), (IdentityState::Ready(a), IdentityState::Ready(b)) if Arc::ptr_eq(a.identity(), b.identity()))
}
