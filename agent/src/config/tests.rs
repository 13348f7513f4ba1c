use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::workload::{AllowRule, ListenerPolicy, Mode, Select, WorkloadKey};

const FILE: &str = "test.yaml";

/// What every good file has.
const HEAD: &str = "trustDomain: shop.example\nnode: node-a\nidentity: { source: embedded }\n";

fn parse(text: &str) -> Result<Config, ConfigErrors> {
    Config::parse(Path::new(FILE), text)
}

fn key(namespace: &str, name: &str) -> WorkloadKey {
    WorkloadKey { namespace: namespace.into(), name: name.into() }
}

fn ips(list: &[&str]) -> Vec<IpAddr> {
    list.iter().map(|ip| ip.parse().unwrap()).collect()
}

/// Judges a file of one mistake: the line that ends in `#!` must be named, in exactly these words. A mistake of the file
/// as a whole has no such line.
fn refused(text: &str, words: &str) {
    let line = text.lines().position(|line| line.ends_with("#!")).map_or(0, |n| n as u64 + 1);
    let errors = parse(text).expect_err(text).errors;
    let found: Vec<_> = errors.iter().map(|error| (error.line, error.reason.as_str())).collect();
    assert_eq!(found, [(line, words)], "{text}");
    assert_eq!(errors[0].column > 0, line > 0, "{text}");
}

/// As [`refused`], for what follows [`HEAD`].
fn refused_after_head(cases: &[(&str, &str)]) {
    for (rest, words) in cases {
        refused(&format!("{HEAD}{rest}\n"), words);
    }
}

#[test]
fn the_example_of_the_interface_loads() {
    let config = parse(
        r#"
trustDomain: shop.example
node: node-a
identity:
  source: embedded
  embedded: { dir: /run/sealane/dev-ca }
  files:    { dir: /etc/sealane/identities }
capture:  { cgroup: /sys/fs/cgroup/kubepods.slice, bpffs: /sys/fs/bpf/sealane, listenPorts: 15001-15004 }
admin:    { listen: 127.0.0.1:15000 }
metrics:  { listen: 0.0.0.0:15020 }
timeouts: { connect: 5s, handshake: 5s, svidWait: 10s, drain: 30s, unenrolGrace: 5s, peek: 30ms, maxConnectionAge: 0s }
limits:   { connectionsPerPod: 10000, handshakesPerPod: 256 }
workloads:
  - name: web-0
    namespace: shop
    serviceAccount: web
    labels: { app: web }
    netns: /run/netns/web
    ips: [10.9.0.10]
    spiffeId: spiffe://shop.example/web
  - name: job-0
    namespace: shop
    netns: /run/netns/job
    ips: [10.9.0.11, "fd00::11"]
    identity: { source: files }
peers:
  - { name: api-0, namespace: shop, ips: [10.9.1.11], spiffeId: "spiffe://shop.example/api", mode: STRICT, ports: [{ port: 9100, mode: DISABLED }] }
services:
  - { name: api, namespace: shop, vips: [172.20.0.10], ports: [{ port: 80, targetPort: 8080 }, { port: 443 }], endpoints: [10.9.1.11] }
policies:
  - name: api
    namespace: shop
    select: { labels: { app: api } }
    listener:
      mode: STRICT
      failOpen: false
      tls: { minVersion: "1.3" }
      ports: [{ port: 9090, mode: PERMISSIVE, appTLS: false }, { port: 9091 }]
      allow: [{ from: ["spiffe://shop.example/web", "spiffe://other.example/jobs"], ports: [8080] }]
    refuse: { rawSockets: false, udp: false, netAdmin: false }
    sameNode: mtls
"#,
    )
    .unwrap();
    assert_eq!(config.node, "node-a");
    assert_eq!(config.trust_domain.as_str(), "shop.example");
    let identity = IdentitySettings {
        source: SourceKind::Embedded,
        embedded_dir: "/run/sealane/dev-ca".into(),
        files_dir: "/etc/sealane/identities".into(),
    };
    assert_eq!(config.identity, identity);
    assert_eq!(config.capture, Capture::default());
    assert_eq!(config.capture.ports, 15001..=15004);
    assert_eq!(config.admin, "127.0.0.1:15000".parse().unwrap());
    assert_eq!(config.metrics, Some("0.0.0.0:15020".parse().unwrap()));
    assert_eq!(config.timeouts, Timeouts::default());
    assert_eq!(config.timeouts.peek, Duration::from_millis(30));
    assert_eq!(config.limits, Limits { connections_per_pod: 10_000, handshakes_per_pod: 256 });
    let web = Workload {
        key: key("shop", "web-0"),
        service_account: "web".into(),
        labels: BTreeMap::from([("app".into(), "web".into())]),
        netns: "/run/netns/web".into(),
        ips: ips(&["10.9.0.10"]),
        spiffe_id: Some("spiffe://shop.example/web".parse().unwrap()),
        source: SourceKind::Embedded,
    };
    let job = Workload {
        key: key("shop", "job-0"),
        service_account: String::new(),
        labels: BTreeMap::new(),
        netns: "/run/netns/job".into(),
        ips: ips(&["10.9.0.11", "fd00::11"]),
        spiffe_id: None,
        source: SourceKind::Files,
    };
    assert_eq!(config.workloads, [web, job]);
    let api = Peer {
        key: key("shop", "api-0"),
        ips: ips(&["10.9.1.11"]),
        spiffe_id: "spiffe://shop.example/api".parse().unwrap(),
        mode: Mode::Strict,
        ports: BTreeMap::from([(9100, Mode::Disabled)]),
    };
    assert_eq!(config.peers, [api]);
    let service = Service {
        key: key("shop", "api"),
        vips: ips(&["172.20.0.10"]),
        ports: BTreeMap::from([(80, 8080), (443, 443)]),
        endpoints: ips(&["10.9.1.11"]),
    };
    assert_eq!(config.services, [service]);
    let from = ["spiffe://shop.example/web", "spiffe://other.example/jobs"].map(|id| id.parse().unwrap()).into();
    let listener = ListenerPolicy {
        mode: Mode::Strict,
        ports: BTreeMap::from([(9090, Mode::Permissive), (9091, Mode::Strict)]),
        allow: Some(vec![AllowRule { from, ports: vec![8080] }]),
    };
    let select = Select::Labels(BTreeMap::from([("app".into(), "api".into())]));
    assert_eq!(config.policies, [Policy { key: key("shop", "api"), select, listener: Some(listener) }]);
    assert!(config.uses(SourceKind::Files) && config.uses(SourceKind::Embedded));
}

#[test]
fn the_shipped_files_fit_together() {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let config = Config::load(&deploy.join("sealane.yaml")).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(config.timeouts, Timeouts::default());
    assert_eq!(config.limits, Limits::default());
    assert!(!config.uses(SourceKind::Embedded));
    let unit = std::fs::read_to_string(deploy.join("sealane.service")).unwrap();
    let stop = unit.lines().find_map(|line| line.strip_prefix("TimeoutStopSec=")).unwrap();
    let drained = config.timeouts.drain + Duration::from_secs(65);
    assert!(Duration::from_secs(stop.parse().unwrap()) > drained, "systemd would kill an agent that still drains");
}

#[test]
fn the_smallest_file_has_the_documented_defaults() {
    let config = parse(HEAD).unwrap();
    assert_eq!(config.capture, Capture::default());
    assert_eq!(config.admin, "127.0.0.1:15000".parse().unwrap());
    assert_eq!(config.metrics, None);
    assert_eq!(config.timeouts, Timeouts::default());
    assert_eq!(config.limits, Limits::default());
    assert_eq!(config.identity.embedded_dir, Path::new("/run/sealane/dev-ca"));
    assert_eq!(config.identity.files_dir, Path::new("/etc/sealane/identities"));
    let lists = [config.workloads.len(), config.peers.len(), config.services.len(), config.policies.len()];
    assert_eq!(lists, [0; 4]);
    assert!(!config.uses(SourceKind::Files));
}

#[test]
fn an_absent_and_an_empty_allow_differ() {
    let allow = |rest: &str| {
        let text = format!("{HEAD}policies: [{{ name: p, namespace: n, listener: {{ {rest} }} }}]\n");
        parse(&text).unwrap().policies.remove(0).listener.unwrap().allow
    };
    assert_eq!(allow("mode: STRICT"), None);
    assert_eq!(allow("allow: []"), Some(vec![]));
}

#[test]
fn what_is_known_but_not_enforced_is_refused() {
    refused("trustDomain: a\nnode: n\nidentity: { source: spire } #!\n", "identity.source spire is not supported yet");
    refused(
        "trustDomain: a\nnode: n\nidentity:\n  source: files\n  spire: { adminSocket: /a, attest: pid } #!\n",
        "identity.spire is not supported yet",
    );
    let workload = "workloads:\n  - name: w\n    namespace: n\n    netns: /n\n    ips: [10.0.0.1]\n    spiffeId: spiffe://shop.example/w\n";
    let policy = "policies:\n  - name: p\n    namespace: n\n";
    let cases = [
        (workload, "    selectors: [\"k8s:ns:shop\"] #!", "selectors is not supported yet"),
        (workload, "    identity: { source: spire } #!", "identity.source spire is not supported yet"),
        (workload, "    identity:\n      hint: internal #!", "identity.hint is not supported yet"),
        (workload, "    identity:\n      id: spiffe://a/b #!", "identity.id is not supported yet"),
        (policy, "    client:\n      enforce: true #!", "client is not supported yet"),
        (policy, "    client: {} #!", "client is not supported yet"),
        (policy, "    refuse: { rawSockets: true } #!", "refuse.rawSockets: true is not supported yet"),
        (policy, "    refuse:\n      udp: true #!", "refuse.udp: true is not supported yet"),
        (policy, "    refuse:\n      netAdmin: true #!", "refuse.netAdmin: true is not supported yet"),
        (policy, "    sameNode: kernel #!", "sameNode: kernel is not supported yet"),
        (policy, "    listener:\n      failOpen: true #!", "listener.failOpen: true is not supported yet"),
        (
            policy,
            "    listener:\n      tls:\n        minVersion: \"1.2\" #!",
            "listener.tls.minVersion \"1.2\" is not supported yet",
        ),
        (
            policy,
            "    listener:\n      ports:\n        - { port: 80, appTLS: true } #!",
            "appTLS: true is not supported yet",
        ),
        (policy, "    listener:\n      ports:\n        - { port: 80, alpn: [h2] } #!", "alpn is not supported yet"),
        (
            policy,
            "    listener:\n      allow:\n        - from:\n            - spiffe://a/b\n            - spiffe://a/jobs/* #!",
            "from \"spiffe://a/jobs/*\": a trailing /* is not supported yet",
        ),
        (
            policy,
            "    listener: { allow: [{ from: [\"spiffe://a/*\"] }] } #!",
            "from \"spiffe://a/*\": a trailing /* is not supported yet",
        ),
    ];
    for (before, after, words) in cases {
        refused(&format!("{HEAD}{before}{after}\n"), words);
    }
}

#[test]
fn wrong_shapes_are_refused() {
    refused_after_head(&[
        (
            "trustdomain: a #!",
            "unknown field `trustdomain`, expected one of trustDomain, node, identity, capture, admin, metrics, timeouts, \
             limits, workloads, peers, services, policies",
        ),
        (
            "peers: [{ labels: {} }] #!",
            "unknown field `labels`, expected one of name, namespace, ips, spiffeId, mode, ports",
        ),
        ("node: again #!", "duplicate mapping key `node` is not allowed here"),
        ("workloads: {} #!", "expected sequence start"),
        ("policies:\n - listener:\n    allow: #!", "has no value; leave the field out for its default"),
        ("policies:\n - listener:\n    failOpen: yes #!", "invalid boolean (true or false expected)"),
        ("capture: !x { bpffs: /a } #!", "unsupported tag `!x`"),
        ("---\nnode: a #!", "only single YAML document expected but multiple found"),
    ]);
}

#[test]
fn bad_values_are_refused() {
    let missing = parse("{}").unwrap_err().to_string();
    assert_eq!(
        missing,
        "test.yaml: trustDomain is missing\ntest.yaml: node is missing\ntest.yaml: identity is missing"
    );
    refused("node: n\nidentity: { source: files }\n", "trustDomain is missing");
    refused("trustDomain: a\nnode: n\nidentity: {} #!\n", "identity.source is missing");
    refused(
        "trustDomain: Shop #!\nnode: n\nidentity: { source: files }\n",
        "trustDomain \"Shop\" is not a trust domain: the trust domain must be 1 to 255 of a-z 0-9 . _ -",
    );
    refused(
        "trustDomain: a\nnode: a/b #!\nidentity: { source: files }\n",
        "node \"a/b\" must be 1 to 253 of A-Z a-z 0-9 . _ - and begin and end with a letter or digit",
    );
    refused(
        "trustDomain: a\nnode: n\nidentity: { source: vault } #!\n",
        "identity.source \"vault\" must be embedded or files",
    );
    refused(
        "trustDomain: a\nnode: n\nidentity: { source: files, files: { dir: ids } } #!\n",
        "identity.files.dir \"ids\" must be an absolute path",
    );
    refused_after_head(&[
        ("capture: { cgroup: kubepods } #!", "capture.cgroup \"kubepods\" must be an absolute path"),
        ("capture: { cgroup: /a/../b } #!", "capture.cgroup \"/a/../b\" must be a path without .."),
        ("capture: { bpffs: bpf } #!", "capture.bpffs \"bpf\" must be an absolute path"),
        ("capture: { listenPorts: 15001 } #!", "capture.listenPorts \"15001\" must be four ports, as 15001-15004"),
        (
            "capture: { listenPorts: 15001-15003 } #!",
            "capture.listenPorts \"15001-15003\" must be exactly four ports, as 15001-15004",
        ),
        (
            "capture: { listenPorts: 15004-15001 } #!",
            "capture.listenPorts \"15004-15001\" must be exactly four ports, as 15001-15004",
        ),
        ("capture: { listenPorts: 1020-1023 } #!", "capture.listenPorts \"1020-1023\" must begin at 1024 or above"),
        ("capture: { listenPorts: 65533-65536 } #!", "capture.listenPorts \"65533-65536\" must be a port, 1 to 65535"),
        (
            "admin: { listen: 0.0.0.0:15000 } #!",
            "admin.listen \"0.0.0.0:15000\" must be a loopback address: /state asks nobody who they are",
        ),
        ("admin: { listen: localhost:1 } #!", "admin.listen \"localhost:1\" is not address:port"),
        ("admin: { listen: 127.0.0.1:0 } #!", "admin.listen \"127.0.0.1:0\" must name a port, 1 to 65535"),
        (
            "admin: { listen: '[::ffff:127.0.0.1]:1' } #!",
            "admin.listen \"[::ffff:127.0.0.1]:1\" is an IPv4-mapped address; write it as IPv4",
        ),
        ("metrics: { listen: '[fe80::1%2]:1' } #!", "metrics.listen \"[fe80::1%2]:1\" must not have a zone"),
        ("metrics: {} #!", "metrics.listen is missing"),
        ("metrics: { listen: 127.0.0.1:15000 } #!", "metrics.listen takes the place of admin.listen, 127.0.0.1:15000"),
        ("metrics: { listen: 0.0.0.0:15000 } #!", "metrics.listen takes the place of admin.listen, 127.0.0.1:15000"),
        ("timeouts: { drain: 30 } #!", "timeouts.drain \"30\" must be a whole number with a unit: ms, s, m or h"),
        ("timeouts: { drain: -1s } #!", "timeouts.drain \"-1s\" must be a whole number with a unit: ms, s, m or h"),
        ("timeouts: { drain: 9000h } #!", "timeouts.drain \"9000h\" is longer than a year"),
        ("timeouts: { drain: 99999999999999999h } #!", "timeouts.drain \"99999999999999999h\" is longer than a year"),
        ("timeouts: { connect: 0s } #!", "timeouts.connect \"0s\" must be more than zero"),
        ("timeouts: { handshake: 0ms } #!", "timeouts.handshake \"0ms\" must be more than zero"),
        (
            "limits: { connectionsPerPod: 0 } #!",
            "limits.connectionsPerPod \"0\" must be a whole number from 1 to 4294967295",
        ),
        (
            "limits: { handshakesPerPod: many } #!",
            "limits.handshakesPerPod \"many\" must be a whole number from 1 to 4294967295",
        ),
    ]);
}

#[test]
fn bad_workloads_are_refused() {
    // The fields of a good workload; a case replaces one, or adds to them.
    let good = [
        ("name", "w"),
        ("namespace", "n"),
        ("netns", "/run/netns/w"),
        ("ips", "[10.0.0.1]"),
        ("spiffeId", "spiffe://shop.example/w"),
    ];
    let with = |field: &str, value: &str| {
        let others = good.iter().filter(|(name, _)| *name != field).map(|(name, good)| format!("{name}: {good}"));
        let mut lines: Vec<_> = others.collect();
        if value.is_empty() {
            lines[0] += " #!"; // what is missing is missed where the entry begins
        } else {
            lines.push(format!("{field}: {value} #!"));
        }
        format!("{HEAD}workloads:\n  - {}\n", lines.join("\n    "))
    };
    let cases = [
        ("name", "", "name is missing"),
        ("namespace", "", "namespace is missing"),
        ("netns", "", "netns is missing"),
        ("ips", "", "ips is missing"),
        ("spiffeId", "", "spiffeId, which source embedded issues, is missing"),
        ("name", "..", "name \"..\" must be 1 to 253 of A-Z a-z 0-9 . _ - and begin and end with a letter or digit"),
        (
            "serviceAccount",
            "a/b",
            "serviceAccount \"a/b\" must be 1 to 253 of A-Z a-z 0-9 . _ - and begin and end with a letter or digit",
        ),
        ("netns", "web", "netns \"web\" must be an absolute path"),
        ("ips", "[web]", "ips \"web\" is not an IP address"),
        ("ips", "['::ffff:10.0.0.1']", "ips \"::ffff:10.0.0.1\" is an IPv4-mapped address; write it as IPv4"),
        ("ips", "['fe80::1%eth0']", "ips \"fe80::1%eth0\" must not have a zone"),
        ("ips", "['fe80::1']", "ips \"fe80::1\" is a link-local address, which says nothing without a zone"),
        ("ips", "[127.0.0.1]", "ips \"127.0.0.1\" is a loopback address"),
        ("ips", "['::1']", "ips \"::1\" is a loopback address"),
        ("ips", "[0.0.0.0]", "ips \"0.0.0.0\" is the unspecified address"),
        ("ips", "['::']", "ips \"::\" is the unspecified address"),
        ("ips", "[224.0.0.1]", "ips \"224.0.0.1\" is a multicast or broadcast address"),
        ("ips", "['ff02::1']", "ips \"ff02::1\" is a multicast or broadcast address"),
        ("ips", "[255.255.255.255]", "ips \"255.255.255.255\" is a multicast or broadcast address"),
        ("ips", "[10.0.0.1, 10.0.0.1]", "ips 10.0.0.1 is given twice, first in line 9"),
        (
            "spiffeId",
            "spiffe://shop.example",
            "spiffeId \"spiffe://shop.example\" is not a SPIFFE ID: has no path: that names a trust domain, not a workload",
        ),
        (
            "spiffeId",
            "https://shop.example/w",
            "spiffeId \"https://shop.example/w\" is not a SPIFFE ID: does not begin with spiffe://",
        ),
        (
            "spiffeId",
            "spiffe://other.example/w",
            "spiffeId \"spiffe://other.example/w\" is outside the trust domain shop.example",
        ),
        ("identity", "{ source: vault }", "identity.source \"vault\" must be embedded or files"),
    ];
    for (field, value, words) in cases {
        refused(&with(field, value), words);
    }
    let long = format!("/{}", "n".repeat(255));
    refused(&with("netns", &long), &format!("netns {long:?} is longer than 255 bytes"));
    refused(
        &format!("{HEAD}workloads:\n  - {{ name: w, namespace: n, netns: /n, ips: [] }} #!\n")
            .replace("embedded", "files"),
        "ips is empty",
    );
    refused(
        &with("spiffeId", "spiffe://shop.example/w").replace("embedded", "files"),
        "spiffeId is for source embedded only: files bring their own",
    );
}

#[test]
fn what_must_be_unique_is() {
    let workload = |name: &str, netns: &str, ip: &str| {
        format!("{{ name: {name}, namespace: n, netns: {netns}, ips: [{ip}], spiffeId: spiffe://shop.example/w }}")
    };
    let peer = |name: &str, ip: &str| {
        format!("{{ name: {name}, namespace: n, ips: [{ip}], spiffeId: spiffe://shop.example/p }}")
    };
    let service = |name: &str, vip: &str, endpoint: &str| {
        format!("{{ name: {name}, namespace: n, vips: [{vip}], ports: [{{ port: 80 }}], endpoints: [{endpoint}] }}")
    };
    let first = format!("workloads:\n  - {}\n", workload("w", "/run/netns/w", "10.0.0.1"));
    let cases = [
        (format!("  - {} #!", workload("w", "/v", "10.0.0.2")), "workload n/w is given twice, first in line 5"),
        (format!("  - {} #!", workload("v", "/v", "10.0.0.1")), "ips 10.0.0.1 is given twice, first in line 5"),
        (
            format!("  - {} #!", workload("v", "/run//netns/./w", "10.0.0.2")),
            "netns \"/run//netns/./w\" is given twice, first in line 5",
        ),
        (format!("peers:\n  - {} #!", peer("w", "10.0.0.2")), "workload n/w is given twice, first in line 5"),
        (format!("peers:\n  - {} #!", peer("p", "10.0.0.1")), "ips 10.0.0.1 is given twice, first in line 5"),
        (
            format!("services:\n  - {} #!", service("s", "10.0.0.1", "10.0.0.2")),
            "vips 10.0.0.1 is the address of the pod in line 5",
        ),
        (
            format!("services:\n  - {} #!", service("s", "10.0.1.1", "10.0.1.1")),
            "endpoints \"10.0.1.1\" is a VIP, not a pod's address",
        ),
        (
            format!("services:\n  - {} #!", service("s", "10.0.1.1", "10.0.0.1, 10.0.0.1")),
            "endpoints 10.0.0.1 is given twice, first in line 7",
        ),
        (
            format!("services:\n  - {}\n  - {} #!", service("s", "10.0.1.1", ""), service("t", "10.0.1.1", "")),
            "vips 10.0.1.1 with port 80 is given twice, first in line 7",
        ),
        (
            format!("services:\n  - {}\n  - {} #!", service("s", "10.0.1.1", ""), service("s", "10.0.1.2", "")),
            "service n/s is given twice, first in line 7",
        ),
        (
            "policies:\n  - { name: p, namespace: n }\n  - { name: p, namespace: m }\n  - { name: p, namespace: n } #!"
                .into(),
            "policy n/p is given twice, first in line 7",
        ),
    ];
    for (rest, words) in cases {
        refused(&format!("{HEAD}{first}{rest}\n"), words);
    }
}

#[test]
fn bad_peers_services_and_policies_are_refused() {
    let peer = "{ name: p, namespace: n, ips: [10.0.0.1], spiffeId: spiffe://a/p";
    let service = "{ name: s, namespace: n, vips: [10.0.0.9]";
    let policy = "policies:\n  - name: p\n    namespace: n\n";
    let cases = [
        (format!("peers: [{peer}, mode: strict }}] #!"), "mode \"strict\" must be STRICT, PERMISSIVE or DISABLED"),
        (format!("peers: [{peer}, ports: [{{ port: 0 }}] }}] #!"), "port \"0\" must be a port, 1 to 65535"),
        (format!("peers: [{peer}, ports: [{{ port: 65536 }}] }}] #!"), "port \"65536\" must be a port, 1 to 65535"),
        (format!("peers: [{peer}, ports: [{{ mode: STRICT }}] }}] #!"), "port is missing"),
        (
            format!("peers:\n  - {peer}, ports: [{{ port: 1 }}, {{ port: 1 }}] }} #!"),
            "port 1 is given twice, first in line 5",
        ),
        ("peers: [{ name: p, namespace: n, ips: [10.0.0.1] }] #!".into(), "spiffeId is missing"),
        (format!("services: [{service} }}] #!"), "ports is missing"),
        ("services: [{ name: s, namespace: n, ports: [{ port: 80 }] }] #!".into(), "vips is missing"),
        (
            format!("services: [{service}, ports: [{{ port: 80, targetPort: 0 }}] }}] #!"),
            "targetPort \"0\" must be a port, 1 to 65535",
        ),
        (
            format!("services: [{service}, ports: [{{ port: 80 }}], endpoints: [127.0.0.1] }}] #!"),
            "endpoints \"127.0.0.1\" is a loopback address",
        ),
        ("policies: [{ namespace: n }] #!".into(), "name is missing"),
        ("policies: [{ name: p }] #!".into(), "namespace is missing"),
        (
            format!("{policy}    select: {{ labels: {{ a: b }}, serviceAccount: c }} #!"),
            "select takes labels or serviceAccount, not both",
        ),
        (
            format!("{policy}    select: {{ labels: {{}} }} #!"),
            "select.labels is empty; leave it out for the whole namespace",
        ),
        (format!("{policy}    sameNode: never #!"), "sameNode \"never\" must be mtls or kernel"),
        (
            format!("{policy}    listener: {{ mode: strict }} #!"),
            "listener.mode \"strict\" must be STRICT, PERMISSIVE or DISABLED",
        ),
        (
            format!("{policy}    listener: {{ tls: {{ minVersion: 1.1 }} }} #!"),
            "listener.tls.minVersion \"1.1\" must be \"1.3\"",
        ),
        (
            format!("{policy}    listener:\n      ports:\n        - {{ port: 80, mode: OFF }} #!"),
            "mode \"OFF\" must be STRICT, PERMISSIVE or DISABLED",
        ),
        (format!("{policy}    listener: {{ allow: [{{ ports: [80] }}] }} #!"), "from is missing"),
        (
            format!("{policy}    listener: {{ allow: [{{ from: [] }}] }} #!"),
            "from is empty; leave the rule out, or write allow: [] for nobody",
        ),
        (
            format!("{policy}    listener: {{ allow: [{{ from: [spiffe://a/b], ports: [] }}] }} #!"),
            "ports is empty; leave it out for every port",
        ),
        (
            format!("{policy}    listener: {{ allow: [{{ from: [spiffe://a/b], ports: [80, 80] }}] }} #!"),
            "port 80 is given twice, first in line 7",
        ),
        (
            format!("{policy}    listener: {{ allow: [{{ from: [spiffe://a/*/b] }}] }} #!"),
            "from \"spiffe://a/*/b\" is not a SPIFFE ID: each path segment must be of A-Z a-z 0-9 . _ - and neither empty \
             nor . nor ..",
        ),
    ];
    for (rest, words) in cases {
        refused(&format!("{HEAD}{rest}\n"), words);
    }
}

#[test]
fn one_attempt_shows_every_mistake_in_order() {
    let errors = parse(
        "trustDomain: a\nnode: n\nidentity: { source: spire }\nworkloads:\n  - name: w\n    namespace: n\n    netns: w\n    ips: [::1]\n",
    )
    .unwrap_err();
    assert_eq!(
        errors.to_string(),
        "test.yaml:3:21: identity.source spire is not supported yet\n\
         test.yaml:7:12: netns \"w\" must be an absolute path\n\
         test.yaml:8:11: ips \"::1\" is a loopback address"
    );
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let errors = Config::load(Path::new("/nonexistent/sealane.yaml")).unwrap_err().to_string();
    assert_eq!(errors, "/nonexistent/sealane.yaml: cannot be read: No such file or directory (os error 2)");
}

#[test]
fn a_reload_changes_only_what_it_can() {
    let old = parse(&format!("{HEAD}metrics: {{ listen: 0.0.0.0:15020 }}\n")).unwrap();
    let good = format!(
        "{HEAD}metrics: {{ listen: 0.0.0.0:15020 }}\ntimeouts: {{ drain: 1s }}\nadmin: {{ listen: 127.0.0.1:15000 }}\n"
    );
    assert_eq!(Config::reload_check(&old, &parse(&good).unwrap()), Ok(()));
    let cases = [
        (good.replace("node-a", "node-b"), "2:7: node changed, which only a restart can do"),
        (good.replace("shop.", "other."), "1:14: trustDomain changed, which only a restart can do"),
        (
            good.replace("embedded }", "embedded, files: { dir: /a } }"),
            "3:11: a directory of identity changed, which only a restart can do",
        ),
        (good.replace(":15000", ":15009"), "6:8: admin changed, which only a restart can do"),
        (good.replace(":15020", ":15021"), "4:10: metrics changed, which only a restart can do"),
        (good.clone() + "capture: { bpffs: /a }\n", "7:10: capture changed, which only a restart can do"),
        (HEAD.to_owned(), " metrics changed, which only a restart can do"),
    ];
    for (text, words) in cases {
        let errors = Config::reload_check(&old, &parse(&text).unwrap()).unwrap_err();
        assert_eq!(errors.to_string(), format!("test.yaml:{words}"));
    }
}
