use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use zeroize::Zeroizing;

use super::*;
use crate::identity::SpiffeId;
use crate::svid::{Bundle, Identity, Svid};
use crate::workload::{AllowRule, ListenerPolicy, Policy, Select};

const HOUR: Duration = Duration::from_secs(3600);

/// A judged configuration of node-a in shop.example, whose workloads' identities come from files.
pub(crate) fn config(rest: &str) -> Config {
    let text = format!("trustDomain: shop.example\nnode: node-a\nidentity: {{ source: files }}\n{rest}");
    Config::parse(Path::new("test.yaml"), &text).unwrap_or_else(|errors| panic!("{errors}"))
}

/// An SVID of this ID for an hour, from a CA of its own.
pub(crate) fn ready(id: &str) -> IdentityState {
    let id: SpiffeId = id.parse().unwrap();
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    ca.subject_alt_names = vec![SanType::URI(format!("spiffe://{}", id.trust_domain()).try_into().unwrap())];
    let ca_key = KeyPair::generate().unwrap();
    let root = ca.self_signed(&ca_key).unwrap();
    let mut leaf = CertificateParams::default();
    leaf.subject_alt_names = vec![SanType::URI(id.as_str().try_into().unwrap())];
    leaf.is_ca = IsCa::ExplicitNoCa;
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    leaf.not_before = (SystemTime::now() - HOUR).into();
    leaf.not_after = (SystemTime::now() + HOUR).into();
    let key = KeyPair::generate().unwrap();
    let leaf = leaf.signed_by(&key, &Issuer::new(ca, ca_key)).unwrap();
    let svid = Svid::new(vec![leaf.der().clone()], Zeroizing::new(key.serialize_der())).unwrap();
    let trust_domain = id.trust_domain().clone();
    let bundle = Bundle { trust_domain: trust_domain.clone(), roots: vec![root.der().clone()] };
    let identity = Identity { svid, bundles: BTreeMap::from([(trust_domain, Arc::new(bundle))]) };
    IdentityState::Ready(Arc::new(WorkloadTls::new(Arc::new(identity)).unwrap()))
}

pub(crate) fn key(name: &str) -> WorkloadKey {
    WorkloadKey { namespace: "shop".into(), name: name.into() }
}

/// A snapshot of `config` with these identities of workloads in namespace shop.
pub(crate) fn snapshot<const N: usize>(config: &Config, identities: [(&str, IdentityState); N]) -> Snapshot {
    let identities = identities.into_iter().map(|(name, state)| (key(name), state)).collect();
    Snapshot::build(1, config, &identities, &all(config), None)
}

/// Every workload's listeners stand.
fn all(config: &Config) -> HashSet<WorkloadKey> {
    config.workloads.iter().map(|workload| workload.key.clone()).collect()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn ids(list: &[&str]) -> Allow {
    Allow::Ids(list.iter().map(|id| format!("spiffe://shop.example/{id}").parse().unwrap()).collect())
}

const WEB: &str = "workloads:
  - { name: web, namespace: shop, serviceAccount: web, labels: { app: web, tier: front }, netns: /web, ips: [10.0.0.1] }
";

/// The mode tells which of the policies was selected: STRICT is the one that should be.
#[test]
fn the_most_specific_policy_wins_whole() {
    let policy = |name: &str, rest: &str| format!("  - {{ name: {name}, namespace: shop, {rest} }}\n");
    let won = "listener: { mode: STRICT }";
    let lost = "listener: { mode: DISABLED, allow: [] }";
    let cases = [
        ("labels before serviceAccount", "select: { labels: { app: web } }", "select: { serviceAccount: web }"),
        ("labels before namespace", "select: { labels: { app: web } }", "select: {}"),
        ("serviceAccount before namespace", "select: { serviceAccount: web }", "select: {}"),
        ("one that binds before one of another label", "select: {}", "select: { labels: { app: api } }"),
        ("all labels must match", "select: {}", "select: { labels: { app: web, tier: back } }"),
        ("one that binds before one of another account", "select: {}", "select: { serviceAccount: api }"),
    ];
    for (what, winner, loser) in cases {
        // Whatever the names and the order in the file.
        for (first, second) in [("a", "z"), ("z", "a")] {
            let winner = policy(first, &format!("{winner}, {won}"));
            let loser = policy(second, &format!("{loser}, {lost}"));
            for policies in [format!("{winner}{loser}"), format!("{loser}{winner}")] {
                let rule = listener_of_web(&policies).default;
                assert_eq!(rule.mode, Mode::Strict, "{what}:\n{policies}");
                assert_eq!(rule.allow, Allow::TrustDomain("shop.example".parse().unwrap()), "{what}:\n{policies}");
            }
        }
    }
    // Then by name; more labels do not matter.
    let narrow = policy("b", &format!("select: {{ labels: {{ app: web, tier: front }} }}, {lost}"));
    let wide = policy("a", &format!("select: {{ labels: {{ app: web }} }}, {won}"));
    assert_eq!(listener_of_web(&format!("{narrow}{wide}")).default.mode, Mode::Strict);
    // A policy of another namespace, and one without the block, bind nothing.
    let elsewhere = format!("  - {{ name: a, namespace: other, {lost} }}\n");
    let blockless = policy("a", "select: { labels: { app: web } }");
    let plain = policy("b", won);
    assert_eq!(listener_of_web(&format!("{elsewhere}{blockless}{plain}")).default.mode, Mode::Strict);
}

#[test]
fn without_a_policy_a_workload_is_permissive_to_its_trust_domain() {
    let snapshot = snapshot(&config(WEB), []);
    let listener = &snapshot.workloads[&key("web")].listener;
    assert!(listener.ports.is_empty());
    assert_eq!(listener.default.mode, Mode::Permissive);
    assert_eq!(listener.default.allow, Allow::TrustDomain("shop.example".parse().unwrap()));
    assert!(listener.default.tls.is_none());
}

#[test]
fn the_own_trust_domain_is_that_of_the_svid() {
    let snapshot = snapshot(&config(WEB), [("web", ready("spiffe://partner.example/web"))]);
    let allow = &snapshot.workloads[&key("web")].listener.default.allow;
    assert_eq!(*allow, Allow::TrustDomain("partner.example".parse().unwrap()));
}

#[test]
fn allow_is_resolved_port_by_port() {
    let listener = listener_of_web(
        "  - name: p
    namespace: shop
    listener:
      mode: STRICT
      ports: [{ port: 9090, mode: PERMISSIVE }, { port: 7070 }]
      allow:
        - { from: ['spiffe://shop.example/c', 'spiffe://shop.example/a'], ports: [8080, 8081] }
        - { from: ['spiffe://shop.example/b', 'spiffe://shop.example/a'], ports: [8080] }
        - { from: ['spiffe://shop.example/all'] }
",
    );
    let cases = [
        (8080, Mode::Strict, ids(&["a", "all", "b", "c"])),
        (8081, Mode::Strict, ids(&["a", "all", "c"])),
        (9090, Mode::Permissive, ids(&["all"])),
        (7070, Mode::Strict, ids(&["all"])),
        (1, Mode::Strict, ids(&["all"])),
    ];
    for (port, mode, allow) in cases {
        assert_eq!((listener.rule(port).mode, &listener.rule(port).allow), (mode, &allow), "{port}");
    }
    assert_eq!(listener.ports.keys().copied().collect::<Vec<_>>(), [7070, 8080, 8081, 9090]);

    let only_named =
        "  - { name: p, namespace: shop, listener: { allow: [{ from: ['spiffe://shop.example/a'], ports: [80] }] } }\n";
    let listener = listener_of_web(only_named);
    assert_eq!(listener.rule(80).allow, ids(&["a"]));
    assert_eq!(listener.rule(81).allow, ids(&[]), "a port that no rule names is nobody's");
    let nobody = listener_of_web("  - { name: p, namespace: shop, listener: { allow: [] } }\n");
    assert_eq!(nobody.rule(80).allow, ids(&[]));
}

fn listener_of_web(policies: &str) -> Listener {
    let snapshot = snapshot(&config(&format!("{WEB}policies:\n{policies}")), []);
    snapshot.workloads[&key("web")].listener.clone()
}

/// Selection and `allow`, from the rules as the design page says them, one port and one peer at a time.
mod naive {
    use super::*;

    pub(super) fn permits(policies: &[Policy], workload: &Workload, port: u16, peer: &SpiffeId) -> (Mode, bool) {
        let mut best: Option<&Policy> = None;
        for policy in policies {
            if policy.listener.is_none() || policy.key.namespace != workload.key.namespace {
                continue;
            }
            let specificity = |policy: &Policy| match &policy.select {
                Select::Labels(labels) => {
                    labels.iter().all(|pair| workload.labels.iter().any(|own| own == pair)).then_some(3)
                }
                Select::ServiceAccount(account) => (*account == workload.service_account).then_some(2),
                Select::Namespace => Some(1),
            };
            let Some(mine) = specificity(policy) else { continue };
            match best {
                Some(other) if specificity(other) > Some(mine) => {}
                Some(other) if specificity(other) == Some(mine) && other.key.name < policy.key.name => {}
                _ => best = Some(policy),
            }
        }
        let Some(policy) = best.and_then(|policy| policy.listener.as_ref()) else {
            return (Mode::Permissive, peer.trust_domain().as_str() == "shop.example");
        };
        let mode = *policy.ports.get(&port).unwrap_or(&policy.mode);
        let Some(rules) = &policy.allow else { return (mode, peer.trust_domain().as_str() == "shop.example") };
        let names = |rule: &AllowRule| rule.ports.is_empty() || rule.ports.contains(&port);
        (mode, rules.iter().any(|rule| names(rule) && rule.from.contains(peer)))
    }
}

/// xorshift: the same numbers in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    fn some<T: Clone>(&mut self, from: &[T]) -> Vec<T> {
        from.iter().filter(|_| self.below(2) == 0).cloned().collect()
    }
}

#[test]
fn selection_and_allow_agree_with_a_naive_reading() {
    let mut numbers = Numbers(0x5ea1_a4e5);
    let mut config = config(WEB);
    let modes = [Mode::Strict, Mode::Permissive, Mode::Disabled];
    let ports = [80, 81, 82, 83];
    let peers: Vec<SpiffeId> = ["shop.example/a", "shop.example/b", "other.example/a"]
        .map(|id| format!("spiffe://{id}").parse().unwrap())
        .into();
    let labels = [("app", "web"), ("tier", "front"), ("tier", "back")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    let (mut permitted, mut refused) = (0, 0);
    for _ in 0..5_000 {
        config.policies = (0..numbers.below(5))
            .map(|n| {
                let select = match numbers.below(3) {
                    0 => Select::Labels(numbers.some(&labels).into_iter().collect()),
                    1 => Select::ServiceAccount(numbers.pick(&["web", "api"]).into()),
                    _ => Select::Namespace,
                };
                let rule =
                    |numbers: &mut Numbers| AllowRule { from: numbers.some(&peers), ports: numbers.some(&ports) };
                let listener = (numbers.below(5) > 0).then(|| ListenerPolicy {
                    mode: numbers.pick(&modes),
                    ports: numbers.some(&ports).into_iter().map(|port| (port, numbers.pick(&modes))).collect(),
                    allow: (numbers.below(4) > 0).then(|| (0..numbers.below(4)).map(|_| rule(&mut numbers)).collect()),
                });
                let name = format!("{}{n}", numbers.pick(&["a", "b", "c"]));
                let namespace = numbers.pick(&["shop", "shop", "other"]);
                Policy { key: WorkloadKey { namespace: namespace.into(), name: name.into() }, select, listener }
            })
            .collect();
        let snapshot = snapshot(&config, []);
        let listener = &snapshot.workloads[&key("web")].listener;
        for port in ports.into_iter().chain([84]) {
            for peer in &peers {
                let rule = listener.rule(port);
                let found = (rule.mode, rule.allow.permits(peer));
                let expected = naive::permits(&config.policies, &config.workloads[0], port, peer);
                assert_eq!(found, expected, "{peer} on {port}: {:#?}", config.policies);
                *(if found.1 { &mut permitted } else { &mut refused }) += 1;
            }
        }
    }
    assert!(permitted > 5_000 && refused > 5_000, "{permitted} permitted, {refused} refused: the cases are one-sided");
}

const TWO: &str = "workloads:
  - { name: web, namespace: shop, netns: /web, ips: [10.0.0.1] }
  - { name: api, namespace: shop, labels: { app: api }, netns: /api, ips: [10.0.0.2, 'fd00::2'] }
peers:
  - { name: far, namespace: shop, ips: [10.0.1.1], spiffeId: 'spiffe://shop.example/far', ports: [{ port: 1, mode: DISABLED }] }
policies:
  - { name: api, namespace: shop, select: { labels: { app: api } }, listener: { ports: [{ port: 9100, mode: DISABLED }] } }
";

#[test]
fn workloads_of_this_node_are_peers_once_they_have_an_svid() {
    let config = config(TWO);
    let snapshot = snapshot(&config, [("api", ready("spiffe://shop.example/real"))]);
    let mut known: Vec<_> = snapshot.peers.iter().map(|(ip, peer)| (*ip, peer.spiffe_id.to_string())).collect();
    known.sort();
    let real = "spiffe://shop.example/real".to_owned();
    let far = "spiffe://shop.example/far".to_owned();
    assert_eq!(known, [(ip("10.0.0.2"), real.clone()), (ip("10.0.1.1"), far), (ip("fd00::2"), real)]);
    let api = &snapshot.peers[&ip("10.0.0.2")];
    assert_eq!((api.mode, &api.ports), (Mode::Permissive, &BTreeMap::from([(9100, Mode::Disabled)])));
}

#[test]
fn a_withdrawn_svid_keeps_its_workload_from_plaintext() {
    let config = config(TWO);
    let before = snapshot(&config, [("api", ready("spiffe://shop.example/api"))]);
    let withdrawn = HashMap::from([(key("api"), IdentityState::Withdrawn)]);
    let after = Snapshot::build(2, &config, &withdrawn, &all(&config), Some(&before));
    let later = Snapshot::build(3, &config, &withdrawn, &all(&config), Some(&after));
    assert_eq!(later.peers[&ip("10.0.0.2")].spiffe_id, "spiffe://shop.example/api".parse().unwrap());
    assert!(later.workloads[&key("api")].listener.default.tls.is_none());
}

#[test]
fn an_enrolled_workload_without_an_svid_is_never_called_in_plaintext() {
    let workload = |id: &str, source: &str| {
        config(&format!(
            "workloads:
  - {{ name: web, namespace: shop, netns: /w, ips: [10.0.0.1], {id} identity: {{ source: {source} }} }}
"
        ))
    };
    let known = workload("spiffeId: 'spiffe://shop.example/web',", "embedded");
    assert!(snapshot(&known, []).peers.contains_key(&ip("10.0.0.1")));

    let unknown = workload("", "files");
    let waiting = snapshot(&unknown, []);
    assert!(!waiting.peers.contains_key(&ip("10.0.0.1")));
    assert!(waiting.pending.contains(&ip("10.0.0.1")) && waiting.is_enrolled(ip("10.0.0.1")));

    let not_enrolled = Snapshot::build(1, &unknown, &HashMap::new(), &HashSet::new(), None);
    assert!(!not_enrolled.is_enrolled(ip("10.0.0.1")));
}

#[test]
fn an_address_claimed_twice_is_in_no_map() {
    let clean = format!(
        "{TWO}services:
  - {{ name: one, namespace: shop, vips: [10.0.9.1, 10.0.9.2], ports: [{{ port: 80 }}], endpoints: [10.0.1.1] }}
"
    );
    let clean = config(&clean);
    let identities = HashMap::from([(key("api"), ready("spiffe://shop.example/api"))]);
    let build = |config: &Config| Snapshot::build(1, config, &identities, &all(config), None);
    assert!(build(&clean).conflicts.is_empty());
    assert_eq!(build(&clean).services.len(), 2);

    // A peer claims this node's workload's address, announced or not.
    for taken in ["10.0.0.1", "10.0.0.2"] {
        let mut config = clean.clone();
        config.peers[0].ips.push(ip(taken));
        let snapshot = build(&config);
        assert_eq!(snapshot.conflicts, HashSet::from([ip(taken)]));
        assert!(!snapshot.peers.contains_key(&ip(taken)));
        assert!(snapshot.peers.contains_key(&ip("10.0.1.1")), "the others stay");
    }
    // Two peers.
    let mut config = clean.clone();
    let rival = Peer { key: key("rival"), ..config.peers[0].clone() };
    config.peers.push(rival);
    let snapshot = build(&config);
    assert!(snapshot.conflicts.contains(&ip("10.0.1.1")) && !snapshot.peers.contains_key(&ip("10.0.1.1")));
    // A service claims a pod's address.
    let mut config = clean.clone();
    config.services[0].vips.push(ip("10.0.1.1"));
    let snapshot = build(&config);
    assert_eq!(snapshot.conflicts, HashSet::from([ip("10.0.1.1")]));
    assert!(!snapshot.peers.contains_key(&ip("10.0.1.1")) && !snapshot.services.contains_key(&(ip("10.0.1.1"), 80)));
    // Two services: the same VIP with other ports is no conflict.
    let mut config = clean.clone();
    let mut second = config.services[0].clone();
    second.key = key("two");
    second.vips = vec![ip("10.0.9.1")];
    second.ports = BTreeMap::from([(81, 81)]);
    config.services.push(second);
    assert!(build(&config).conflicts.is_empty());
    config.services[1].ports = BTreeMap::from([(80, 81)]);
    let snapshot = build(&config);
    assert_eq!(snapshot.conflicts, HashSet::from([ip("10.0.9.1")]));
    assert_eq!(snapshot.services.keys().collect::<Vec<_>>(), [&(ip("10.0.9.2"), 80)]);
    // An address that one claimant repeats is no conflict.
    let mut config = clean;
    config.peers[0].ips.push(ip("10.0.1.1"));
    config.services[0].vips.push(ip("10.0.9.1"));
    assert!(build(&config).conflicts.is_empty());
}

#[test]
fn services_are_the_meshs_while_an_endpoint_is_enrolled() {
    let text = format!(
        "{TWO}services:
  - {{ name: one, namespace: shop, vips: [10.0.9.1], ports: [{{ port: 80, targetPort: 8080 }}, {{ port: 443 }}], endpoints: [10.7.7.7, 10.0.1.1] }}
  - {{ name: two, namespace: shop, vips: [10.0.9.2], ports: [{{ port: 80 }}], endpoints: [10.7.7.7] }}
"
    );
    let snapshot = snapshot(&config(&text), []);
    let at = |vip, port| &snapshot.services[&(ip(vip), port)];
    assert_eq!(at("10.0.9.1", 80).endpoints, ["10.7.7.7:8080", "10.0.1.1:8080"].map(|a| a.parse().unwrap()));
    assert_eq!(at("10.0.9.1", 443).endpoints, ["10.7.7.7:443", "10.0.1.1:443"].map(|a| a.parse().unwrap()));
    assert!(snapshot.is_mesh(at("10.0.9.1", 80)));
    assert!(!snapshot.is_mesh(at("10.0.9.2", 80)));
}

#[test]
fn tls_servers_are_built_once_per_allow_and_identity() {
    let text = format!(
        "{WEB}policies:
  - name: p
    namespace: shop
    listener:
      ports: [{{ port: 1, mode: STRICT }}, {{ port: 2, mode: DISABLED }}]
      allow: [{{ from: ['spiffe://shop.example/a'], ports: [3] }}, {{ from: ['spiffe://shop.example/b'] }}]
"
    );
    let mut config = config(&text);
    let web = ready("spiffe://shop.example/web");
    let build = |config: &Config, identity: &IdentityState, previous: Option<&Snapshot>| {
        Snapshot::build(1, config, &HashMap::from([(key("web"), identity.clone())]), &all(config), previous)
    };
    let server = |snapshot: &Snapshot, port| snapshot.workloads[&key("web")].listener.rule(port).tls.clone().unwrap();

    let first = build(&config, &web, None);
    assert!(Arc::ptr_eq(&server(&first, 1), &server(&first, 9)), "the same allow");
    assert!(!Arc::ptr_eq(&server(&first, 3), &server(&first, 9)), "another allow");
    // The identity is what counts, not the object around it.
    let IdentityState::Ready(tls) = &web else { unreachable!() };
    let again = IdentityState::Ready(Arc::new(WorkloadTls::new(tls.identity().clone()).unwrap()));
    let second = build(&config, &again, Some(&first));
    for port in [1, 3, 9] {
        assert!(Arc::ptr_eq(&server(&first, port), &server(&second, port)), "{port}");
    }
    let rotated = build(&config, &ready("spiffe://shop.example/web"), Some(&second));
    assert!(!Arc::ptr_eq(&server(&second, 1), &server(&rotated, 1)), "another SVID");
    config.policies[0].listener.as_mut().unwrap().allow = None;
    let narrowed = build(&config, &again, Some(&second));
    assert!(!Arc::ptr_eq(&server(&second, 1), &server(&narrowed, 1)), "another allow");
}

#[test]
fn an_identity_is_usable_until_it_expires() {
    let state = ready("spiffe://shop.example/web");
    let IdentityState::Ready(tls) = &state else { unreachable!() };
    let end = tls.identity().svid.not_after;
    assert!(state.usable(end - Duration::from_secs(1)).is_ok());
    assert_eq!(state.usable(end).err(), Some(Reason::SvidExpired));
    assert_eq!(IdentityState::Pending.usable(end).err(), Some(Reason::IdentityPending));
    assert_eq!(IdentityState::Withdrawn.usable(end).err(), Some(Reason::IdentityWithdrawn));
}

#[test]
fn readers_see_the_latest_snapshot() {
    let config = config("");
    let build = |epoch| Snapshot::build(epoch, &config, &HashMap::new(), &all(&config), None);
    let (publisher, mut reader) = Publisher::new(build(1));
    assert_eq!(reader.borrow_and_update().epoch, 1);
    publisher.publish(Arc::new(build(2)));
    publisher.publish(Arc::new(build(3)));
    assert!(reader.has_changed().unwrap());
    assert_eq!(reader.borrow_and_update().epoch, 3);
    assert_eq!((publisher.latest().epoch, publisher.reader().borrow().epoch), (3, 3));
}
