use std::time::Duration;

use super::*;
use crate::config::Config;
use crate::snapshot::IdentityState;
use crate::snapshot::tests::{config, key, ready, snapshot};

const MESH: &str = "workloads:
  - { name: web, namespace: shop, labels: { app: web }, netns: /web, ips: [10.0.0.1, 'fd00::1'] }
  - { name: db, namespace: shop, labels: { app: db }, netns: /db, ips: [10.0.0.2] }
peers:
  - { name: api-0, namespace: shop, ips: [10.0.1.1, 'fd00::11'], spiffeId: 'spiffe://shop.example/api-0', mode: STRICT, ports: [{ port: 9100, mode: DISABLED }] }
  - { name: api-1, namespace: shop, ips: [10.0.1.2], spiffeId: 'spiffe://shop.example/api-1' }
  - { name: off, namespace: shop, ips: [10.0.1.3], spiffeId: 'spiffe://shop.example/off', mode: DISABLED, ports: [{ port: 443, mode: PERMISSIVE }] }
services:
  - { name: api, namespace: shop, vips: [10.9.0.1, 'fd00:9::1'], ports: [{ port: 80, targetPort: 8080 }], endpoints: ['fd00::11', 10.0.1.1, 10.0.1.2] }
  - { name: mixed, namespace: shop, vips: [10.9.0.2], ports: [{ port: 80 }, { port: 9100 }], endpoints: [10.7.7.7, 10.0.1.1] }
  - { name: self, namespace: shop, vips: [10.9.0.3], ports: [{ port: 80 }], endpoints: [10.0.0.1, 10.0.0.2] }
  - { name: empty, namespace: shop, vips: [10.9.0.4], ports: [{ port: 80 }] }
policies:
  - name: web
    namespace: shop
    select: { labels: { app: web } }
    listener:
      mode: STRICT
      ports: [{ port: 8081, mode: PERMISSIVE }, { port: 8082, mode: DISABLED }]
      allow:
        - { from: ['spiffe://shop.example/a', 'spiffe://partner.example/p'], ports: [8080, 8082] }
        - { from: ['spiffe://shop.example/b'] }
";

const WEB_ID: &str = "spiffe://shop.example/web";

fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

/// web has an SVID, db too, unless a test says otherwise.
fn mesh(config: &Config) -> Snapshot {
    snapshot(config, [("web", ready(WEB_ID)), ("db", ready("spiffe://shop.example/db"))])
}

/// What web may dial for `dst`, as `addr how` with the path of the expected ID.
fn dial(snap: &Snapshot, dst: &str) -> Result<Vec<String>, Reason> {
    let permit = outbound(snap, &snap.workloads[&key("web")], dst.parse().unwrap())?;
    Ok(permit.candidates().iter().map(describe).collect())
}

fn describe(candidate: &Candidate) -> String {
    let how = match &candidate.how {
        How::Mtls { expected } => expected.iter().map(SpiffeId::path).collect(),
        How::Plaintext => "plaintext".to_owned(),
        How::Hairpin => "hairpin".to_owned(),
    };
    format!("{} {how}", candidate.addr)
}

/// What is dialled, its address, and [`dial`]'s answer.
type Case = (&'static str, &'static str, Result<&'static [&'static str], Reason>);

#[test]
fn outbound_rules() {
    let snap = mesh(&config(MESH));
    let cases: &[Case] = &[
        ("a peer", "10.0.1.1:8080", Ok(&["10.0.1.1:8080 /api-0"])),
        ("a peer, IPv6", "[fd00::11]:8080", Ok(&["[fd00::11]:8080 /api-0"])),
        ("a peer, as a dual-stack socket shows it", "[::ffff:10.0.1.1]:8080", Ok(&["10.0.1.1:8080 /api-0"])),
        ("a workload of this node", "10.0.0.2:5432", Ok(&["10.0.0.2:5432 /db"])),
        ("a peer's DISABLED port", "10.0.1.1:9100", Ok(&["10.0.1.1:9100 plaintext"])),
        ("a DISABLED peer", "10.0.1.3:80", Ok(&["10.0.1.3:80 plaintext"])),
        ("a DISABLED peer's port with a mode", "10.0.1.3:443", Ok(&["10.0.1.3:443 /off"])),
        ("the caller itself", "10.0.0.1:80", Ok(&["10.0.0.1:80 hairpin"])),
        (
            "a service, IPv4 first",
            "10.9.0.1:80",
            Ok(&["10.0.1.1:8080 /api-0", "10.0.1.2:8080 /api-1", "[fd00::11]:8080 /api-0"]),
        ),
        (
            "a service, IPv6 first",
            "[fd00:9::1]:80",
            Ok(&["[fd00::11]:8080 /api-0", "10.0.1.1:8080 /api-0", "10.0.1.2:8080 /api-1"]),
        ),
        ("a service, mapped", "[::ffff:10.9.0.3]:80", Ok(&["10.0.0.1:80 hairpin", "10.0.0.2:80 /db"])),
        ("an endpoint that is not enrolled", "10.9.0.2:80", Ok(&["10.7.7.7:80 plaintext", "10.0.1.1:80 /api-0"])),
        ("an endpoint's DISABLED port", "10.9.0.2:9100", Ok(&["10.7.7.7:9100 plaintext", "10.0.1.1:9100 plaintext"])),
        ("an endpoint that is the caller", "10.9.0.3:80", Ok(&["10.0.0.1:80 hairpin", "10.0.0.2:80 /db"])),
        ("a service without endpoints", "10.9.0.4:80", Err(Reason::NoEndpoint)),
        ("a port that the service lacks", "10.9.0.1:81", Err(Reason::UnknownDestination)),
        ("an address that is not the mesh's", "192.0.2.1:80", Err(Reason::UnknownDestination)),
        ("an endpoint that is not enrolled, dialled itself", "10.7.7.7:80", Err(Reason::UnknownDestination)),
    ];
    for (what, dst, expected) in cases {
        let expected = expected.map(|list| list.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(dial(&snap, dst), expected, "{what}");
    }
}

#[test]
fn an_address_claimed_twice_is_refused_and_never_plaintext() {
    let mut config = config(MESH);
    // api-1 claims api-0's IPv4 address, and the addresses of a service and of the caller.
    for taken in ["10.0.1.1", "10.9.0.2", "10.0.0.1"] {
        config.peers[1].ips.push(taken.parse().unwrap());
    }
    let snap = mesh(&config);
    for dst in ["10.0.1.1:8080", "10.0.1.1:9100", "10.9.0.2:80", "10.0.0.1:80"] {
        assert_eq!(dial(&snap, dst), Err(Reason::PeerConflict), "{dst}");
    }
    assert_eq!(
        dial(&snap, "10.9.0.1:80"),
        Ok(vec!["10.0.1.2:8080 /api-1".into(), "[fd00::11]:8080 /api-0".into()]),
        "a service goes on with its other endpoints"
    );
    config.services[0].endpoints = vec!["10.0.1.1".parse().unwrap()];
    assert_eq!(dial(&mesh(&config), "10.9.0.1:80"), Err(Reason::PeerConflict), "and without any is refused");
}

#[test]
fn a_workload_that_is_gone_gets_no_permit() {
    let full = config(MESH);
    let before = mesh(&full);
    let web = &before.workloads[&key("web")];
    let mut less = full.clone();
    less.workloads.remove(0);
    let after = mesh(&less);
    assert_eq!(outbound(&after, web, "10.0.1.1:80".parse().unwrap()).err(), Some(Reason::UnknownWorkload));
    assert_eq!(inbound(&after, web, 8080, Some(&id("spiffe://shop.example/a"))), Err(Reason::UnknownWorkload));
}

#[test]
fn spreading_turns_each_family_and_loses_nobody() {
    let snap = mesh(&config(MESH));
    let permit = || outbound(&snap, &snap.workloads[&key("web")], "10.9.0.1:80".parse().unwrap()).unwrap();
    let order = |turn| permit().spread(turn).candidates().iter().map(|c| c.addr.to_string()).collect::<Vec<_>>();
    assert_eq!(order(0), ["10.0.1.1:8080", "10.0.1.2:8080", "[fd00::11]:8080"]);
    assert_eq!(order(1), ["10.0.1.2:8080", "10.0.1.1:8080", "[fd00::11]:8080"]);
    assert_eq!(order(2), order(0));
    assert_eq!(order(usize::MAX), order(1));
}

#[test]
fn inbound_rules() {
    let snap = mesh(&config(MESH));
    let (a, b) = ("spiffe://shop.example/a", "spiffe://shop.example/b");
    let (partner, stranger) = ("spiffe://partner.example/p", "spiffe://partner.example/q");
    let own = "spiffe://shop.example/c";
    let cases = [
        ("web", 8080, None, Some(Reason::NotTls)),
        ("web", 1, None, Some(Reason::NotTls)),
        ("web", 8081, None, None),
        ("web", 8082, None, None),
        ("db", 5432, None, None),
        ("web", 8080, Some(a), None),
        ("web", 8080, Some(b), None),
        ("web", 8080, Some(partner), None),
        ("web", 8080, Some(stranger), Some(Reason::NotAllowed)),
        ("web", 8080, Some(own), Some(Reason::NotAllowed)),
        ("web", 8081, Some(a), Some(Reason::NotAllowed)),
        ("web", 8081, Some(b), None),
        ("web", 8082, Some(a), None),
        ("web", 1, Some(a), Some(Reason::NotAllowed)),
        ("web", 1, Some(b), None),
        ("db", 5432, Some(own), None),
        ("db", 5432, Some(partner), Some(Reason::NotAllowed)),
    ];
    for (to, port, peer, refused) in cases {
        let peer = peer.map(id);
        let answer = inbound(&snap, &snap.workloads[&key(to)], port, peer.as_ref());
        let expected = refused.map_or(Ok((port, peer.as_ref())), Err);
        assert_eq!(answer.as_ref().map(|p| (p.port(), p.peer())).map_err(|r| *r), expected, "{peer:?} to {to}:{port}");
    }
}

#[test]
fn open_outbound_connections() {
    let now = SystemTime::now();
    let config = config(MESH);
    let with = |config: &Config, web: IdentityState| snapshot(config, [("web", web)]);
    let good = with(&config, ready(WEB_ID));
    let mtls = OutboundFacts {
        addr: "10.0.1.1:8080".parse().unwrap(),
        mtls: Some(MtlsFacts { own: id(WEB_ID), peer: id("spiffe://shop.example/api-0") }),
    };
    let plain = OutboundFacts { mtls: None, ..mtls.clone() };
    let judge = |snap: &Snapshot, facts: &OutboundFacts, now| outbound_still_holds(snap, &key("web"), facts, now);

    assert_eq!(judge(&good, &mtls, now), Ok(()));
    assert_eq!(judge(&with(&config, ready(WEB_ID)), &mtls, now), Ok(()), "rotation closes nothing");
    assert_eq!(judge(&good, &plain, now), Ok(()), "plaintext goes on when the endpoint is enrolled later");

    let mut changed = config.clone();
    changed.peers.remove(0);
    assert_eq!(judge(&with(&changed, ready(WEB_ID)), &mtls, now), Ok(()), "a peer that left ends nothing");
    let mut changed = config.clone();
    changed.peers[0].spiffe_id = id("spiffe://shop.example/other");
    assert_eq!(judge(&with(&changed, ready(WEB_ID)), &mtls, now), Err(Reason::PolicyChanged));
    let mut changed = config.clone();
    changed.peers[1].ips.push("10.0.1.1".parse().unwrap());
    assert_eq!(judge(&with(&changed, ready(WEB_ID)), &mtls, now), Ok(()), "a rival's claim takes nothing down");

    let cases = [
        (ready("spiffe://shop.example/other"), now, Reason::IdentityChanged),
        (IdentityState::Withdrawn, now, Reason::IdentityChanged),
        (IdentityState::Pending, now, Reason::IdentityChanged),
        (ready(WEB_ID), now + Duration::from_secs(2 * 3600), Reason::SvidExpired),
    ];
    for (web, now, reason) in cases {
        let snap = with(&config, web);
        assert_eq!(judge(&snap, &mtls, now), Err(reason));
        assert_eq!(judge(&snap, &plain, now), Ok(()), "plaintext rests on no identity");
    }
    let mut changed = config.clone();
    changed.workloads.remove(0);
    let gone = snapshot(&changed, []);
    assert_eq!(judge(&gone, &mtls, now), Err(Reason::UnknownWorkload));
    assert_eq!(judge(&gone, &plain, now), Err(Reason::UnknownWorkload));
}

#[test]
fn open_inbound_connections() {
    let now = SystemTime::now();
    let config = config(MESH);
    let with = |config: &Config, web: IdentityState| snapshot(config, [("web", web)]);
    let good = with(&config, ready(WEB_ID));
    let facts = |port, peer: Option<&str>| InboundFacts {
        port,
        mtls: peer.map(|peer| MtlsFacts { own: id(WEB_ID), peer: id(peer) }),
    };
    let judge = |snap: &Snapshot, facts: &InboundFacts, now| inbound_still_holds(snap, &key("web"), facts, now);
    let a = facts(8080, Some("spiffe://shop.example/a"));
    let plain = facts(8081, None);

    assert_eq!(judge(&good, &a, now), Ok(()));
    assert_eq!(judge(&good, &plain, now), Ok(()));
    assert_eq!(judge(&good, &facts(8080, None), now), Err(Reason::PolicyChanged), "plaintext once STRICT");
    let other = facts(8080, Some("spiffe://shop.example/c"));
    assert_eq!(judge(&good, &other, now), Err(Reason::PolicyChanged), "a rule was taken back");

    let cases = [
        (ready("spiffe://shop.example/other"), now, Reason::IdentityChanged),
        (IdentityState::Withdrawn, now, Reason::IdentityChanged),
        (IdentityState::Pending, now, Reason::IdentityChanged),
        (ready(WEB_ID), now + Duration::from_secs(2 * 3600), Reason::SvidExpired),
    ];
    for (web, now, reason) in cases {
        let snap = with(&config, web);
        assert_eq!(judge(&snap, &a, now), Err(reason));
        assert_eq!(judge(&snap, &plain, now), Ok(()), "plaintext rests on no identity");
    }
    let mut changed = config.clone();
    changed.workloads.remove(0);
    let gone = snapshot(&changed, []);
    assert_eq!(judge(&gone, &a, now), Err(Reason::UnknownWorkload));
    assert_eq!(judge(&gone, &plain, now), Err(Reason::UnknownWorkload));
}

#[test]
fn a_workload_whose_id_is_not_known_yet_is_waited_for() {
    let config = config(&format!("{}policies: []\n", MESH.split("policies:").next().unwrap()));
    let snap = snapshot(&config, [("web", ready(WEB_ID))]);
    assert_eq!(dial(&snap, "10.0.0.2:80"), Err(Reason::IdentityPending));
    // The service's other endpoint is the caller itself.
    assert_eq!(dial(&snap, "10.9.0.3:80").unwrap(), ["10.0.0.1:80 hairpin"]);
}
