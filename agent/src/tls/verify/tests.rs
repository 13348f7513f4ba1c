use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa,
    KeyPair, KeyUsagePurpose, NameConstraints, SanType,
};
use rustls::crypto::aws_lc_rs;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};

use super::*;
use crate::svid::Bundle;
use crate::tls::profile::{is_root, leaf};
use crate::tls::test_ca::{Issued, TestCa, bundles, ca_params, key, self_signed, svid_params, uri, valid};
use crate::tls::tests::{ids, meet, tls};
use crate::tls::{TlsFailure, WorkloadTls};

const WEB: &str = "spiffe://td/web";
const DAY: Duration = Duration::from_secs(24 * 3600);

/// `issued` as a client's and as a server's certificate, against `us`: the reason at our side, what the peer saw.
async fn presented(us: &WorkloadTls, issued: &Issued) -> [(Result<(), TlsFailure>, Result<(), TlsFailure>); 2] {
    let any = Allow::TrustDomain("td".parse().unwrap());
    // Whoever presents trusts us, and knows nothing better than to send what it has.
    let trust = Arc::new(Trust::new(&us.identity().bundles));
    let verifier = Verifier::new(trust, Accept::Expected([us.identity().svid.id.clone()].into()));
    let provider = Arc::new(aws_lc_rs::default_provider());
    let signing_key = aws_lc_rs::sign::any_supported_type(&issued.key_der()).unwrap();
    let resolver = Arc::new(SingleCertAndKey::from(CertifiedKey::new(issued.chain.clone(), signing_key)));
    let client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(verifier.clone())
        .with_client_cert_resolver(resolver.clone());
    let server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(resolver);

    let as_client = meet(Arc::new(client), us.server(any)).await;
    let as_server = meet(us.client(ids(&[WEB])), Arc::new(server)).await;
    [(as_client.server.map(drop), as_client.client.map(drop)), (as_server.client.map(drop), as_server.server.map(drop))]
}

async fn assert_refused(us: &WorkloadTls, issued: &Issued, reason: Reason, alert: &'static str) {
    for (role, (ours, theirs)) in ["client", "server"].iter().zip(presented(us, issued).await) {
        assert_eq!(ours, Err(TlsFailure { reason, alert: None }), "as a {role}");
        let expected = Err(TlsFailure { reason: Reason::RefusedByPeer, alert: Some(alert) });
        assert_eq!(theirs, expected, "as a {role}, for {reason:?}");
    }
}

async fn assert_accepted(us: &WorkloadTls, issued: &Issued) {
    for (role, (ours, theirs)) in ["client", "server"].iter().zip(presented(us, issued).await) {
        assert_eq!((ours, theirs), (Ok(()), Ok(())), "as a {role}");
    }
}

fn us(ca: &TestCa) -> WorkloadTls {
    tls(&ca.issue("spiffe://td/us"), &[ca])
}

/// A good SVID but for what `spoil` does to it.
fn spoilt(ca: &TestCa, spoil: impl FnOnce(&mut CertificateParams)) -> Issued {
    let mut params = svid_params(WEB);
    spoil(&mut params);
    ca.sign(params)
}

fn intermediate_params(spoil: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = ca_params();
    params.distinguished_name.push(DnType::CommonName, "below");
    spoil(&mut params);
    params
}

#[tokio::test]
async fn accepts_what_the_standard_allows() {
    let ca = TestCa::new("td");
    let us = us(&ca);
    assert_accepted(&us, &ca.issue(WEB)).await;
    // Other names beside the ID, which mean nothing; no extended key usage; what SPIRE adds to the key usage.
    assert_accepted(&us, &spoilt(&ca, |p| p.subject_alt_names.push(SanType::DnsName("db".try_into().unwrap())))).await;
    assert_accepted(&us, &spoilt(&ca, |p| p.extended_key_usages.clear())).await;
    let spire = [KeyUsagePurpose::KeyEncipherment, KeyUsagePurpose::KeyAgreement];
    assert_accepted(&us, &spoilt(&ca, |p| p.key_usages.extend(spire))).await;
    // Key usages of more than one octet, and a path that says nothing of namespaces.
    assert_accepted(&us, &spoilt(&ca, |p| p.key_usages.push(KeyUsagePurpose::DecipherOnly))).await;
    assert_eq!(leaf(&ca.issue("spiffe://td/front").chain[0]).unwrap().id.as_str(), "spiffe://td/front");
}

#[tokio::test]
async fn accepts_every_kind_of_key() {
    let rsa = || KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
    let (p256, p384) = (|| key(&rcgen::PKCS_ECDSA_P256_SHA256), || key(&rcgen::PKCS_ECDSA_P384_SHA384));
    for ca_key in [p256(), p384(), rsa()] {
        let ca = TestCa::with("td", ca_params(), ca_key);
        for leaf_key in [p256(), p384(), rsa()] {
            let web = ca.sign_for(svid_params(WEB), &leaf_key);
            // The key as our own, too.
            assert_accepted(&tls(&web, &[&ca]), &web).await;
        }
    }
}

#[tokio::test]
async fn accepts_a_chain_with_intermediates() {
    let root = TestCa::new("td");
    // Nested SPIRE: the same name at every level.
    let below = root.intermediate(ca_params());
    let deeper = below.intermediate(ca_params());
    let named = below.intermediate(intermediate_params(|p| p.distinguished_name.push(DnType::OrganizationName, "sub")));
    for ca in [&below, &deeper, &named] {
        let web = ca.issue(WEB);
        assert_accepted(&us(&root), &web).await;
        assert_accepted(&tls(&web, &[&root]), &root.issue(WEB)).await;
    }
    // Without them there is no path.
    let mut web = below.issue(WEB);
    web.chain.truncate(1);
    assert_refused(&us(&root), &web, Reason::CertificateUntrusted, "unknown_ca").await;
}

#[tokio::test]
async fn accepts_any_of_several_roots() {
    let (old, new) = (TestCa::new("td"), TestCa::new("td"));
    let us = tls(&new.issue("spiffe://td/us"), &[&old, &new]);
    assert_accepted(&us, &new.issue(WEB)).await;
    for ca in [&old, &new] {
        let verified = Trust::new(&bundles(&[&old, &new])).verify(&ca.issue(WEB).chain[0], &[], UnixTime::now());
        assert_eq!(verified, Ok(WEB.parse().unwrap()));
    }
}

#[tokio::test]
async fn refuses_a_leaf_without_one_spiffe_id() {
    let ca = TestCa::new("td");
    let us = us(&ca);
    let unknown = "certificate_unknown";
    let named = |names: Vec<SanType>| spoilt(&ca, |p| p.subject_alt_names = names);
    let dns = || SanType::DnsName("web.td".try_into().unwrap());

    assert_refused(&us, &named(vec![]), Reason::SpiffeIdMissing, unknown).await;
    assert_refused(&us, &named(vec![dns()]), Reason::SpiffeIdMissing, unknown).await;
    assert_refused(&us, &named(vec![uri(WEB), uri("spiffe://td/db")]), Reason::SpiffeIdAmbiguous, unknown).await;
    assert_refused(&us, &named(vec![uri(WEB), uri("https://td/")]), Reason::SpiffeIdAmbiguous, unknown).await;
    for malformed in ["https://td/web", "spiffe://td", "spiffe://td/", "spiffe://TD/web", "spiffe://td/../web", ""] {
        assert_refused(&us, &named(vec![uri(malformed)]), Reason::SpiffeIdMalformed, unknown).await;
    }
    // A URI that is no text: SEQUENCE { [6] ff }.
    let not_text = spoilt(&ca, |p| {
        p.subject_alt_names.clear();
        p.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 17], vec![0x30, 3, 0x86, 1, 0xff]));
    });
    assert_refused(&us, &not_text, Reason::SpiffeIdMalformed, unknown).await;
}

#[tokio::test]
async fn refuses_a_leaf_that_signs() {
    let ca = TestCa::new("td");
    let us = us(&ca);
    let ca_as_leaf = spoilt(&ca, |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    assert_refused(&us, &ca_as_leaf, Reason::CertificateIsCa, "certificate_unknown").await;
    for signs in [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign] {
        let issued = spoilt(&ca, |p| p.key_usages.push(signs));
        assert_refused(&us, &issued, Reason::CertificateIsCa, "certificate_unknown").await;
    }
    let silent = spoilt(&ca, |p| p.is_ca = IsCa::NoCa);
    assert_refused(&us, &silent, Reason::CertificateNotLeaf, "certificate_unknown").await;
}

#[tokio::test]
async fn refuses_a_leaf_for_other_uses() {
    let ca = TestCa::new("td");
    let us = us(&ca);
    for usages in [vec![], vec![KeyUsagePurpose::KeyEncipherment]] {
        let issued = spoilt(&ca, |p| p.key_usages = usages);
        assert_refused(&us, &issued, Reason::CertificateKeyUsage, "certificate_unknown").await;
    }
    use ExtendedKeyUsagePurpose::{Any, ClientAuth, CodeSigning, ServerAuth};
    for purpose in [Any, ClientAuth, CodeSigning, ServerAuth] {
        let issued = spoilt(&ca, |p| p.extended_key_usages = vec![purpose]);
        assert_refused(&us, &issued, Reason::CertificateExtendedUsage, "unsupported_certificate").await;
    }
}

#[tokio::test]
async fn refuses_a_leaf_outside_its_time() {
    let ca = TestCa::with("td", intermediate_params(|p| valid(p, DAY, DAY)), key(&rcgen::PKCS_ECDSA_P256_SHA256));
    let us = us(&ca);
    let expired = spoilt(&ca, |p| {
        valid(p, DAY / 2, DAY);
        p.not_after = (SystemTime::now() - Duration::from_secs(2)).into();
    });
    assert_refused(&us, &expired, Reason::CertificateExpired, "certificate_expired").await;
    let early = spoilt(&ca, |p| p.not_before = (SystemTime::now() + Duration::from_secs(60)).into());
    assert_refused(&us, &early, Reason::CertificateNotYetValid, "certificate_expired").await;
}

#[tokio::test]
async fn refuses_what_no_root_vouches_for() {
    let ca = TestCa::new("td");
    let us = us(&ca);
    assert_refused(&us, &self_signed(svid_params(WEB)), Reason::CertificateUntrusted, "unknown_ca").await;
    // A CA of the very name of ours.
    assert_refused(&us, &TestCa::new("td").issue(WEB), Reason::CertificateUntrusted, "unknown_ca").await;
    // It brings its own root along; it has a CA of its own below it.
    let foreign = TestCa::new("td");
    let mut issued = foreign.issue(WEB);
    issued.chain.push(foreign.certificate.clone());
    assert_refused(&us, &issued, Reason::CertificateUntrusted, "unknown_ca").await;
    let issued = foreign.intermediate(ca_params()).issue(WEB);
    assert_refused(&us, &issued, Reason::CertificateUntrusted, "unknown_ca").await;
}

#[tokio::test]
async fn refuses_a_trust_domain_without_a_bundle() {
    let ca = TestCa::new("td");
    let other = TestCa::new("other").issue("spiffe://other/web");
    assert_refused(&us(&ca), &other, Reason::TrustDomainUnknown, "certificate_unknown").await;
    // Our own CA vouches for nobody else, either.
    assert_refused(&us(&ca), &ca.issue("spiffe://other/web"), Reason::TrustDomainUnknown, "certificate_unknown").await;
}

#[tokio::test]
async fn refuses_a_root_of_another_trust_domain() {
    let (ours, theirs) = (TestCa::new("td"), TestCa::new("other"));
    let us = tls(&ours.issue("spiffe://td/us"), &[&ours, &theirs]);
    assert_refused(&us, &theirs.issue(WEB), Reason::CertificateUntrusted, "unknown_ca").await;
    assert_refused(&us, &ours.issue("spiffe://other/web"), Reason::CertificateUntrusted, "unknown_ca").await;
}

#[test]
fn an_empty_bundle_trusts_nobody() {
    let ca = TestCa::new("td");
    let empty = Bundle { trust_domain: ca.trust_domain.clone(), roots: Vec::new() };
    let trust = Trust::new(&BTreeMap::from([(ca.trust_domain.clone(), Arc::new(empty))]));
    assert_eq!(trust.verify(&ca.issue(WEB).chain[0], &[], UnixTime::now()), Err(Reason::CertificateUntrusted));
}

#[test]
fn a_bundle_holds_signing_certificates_only() {
    let ca = TestCa::new("td");
    let web = ca.issue(WEB);
    assert!(is_root(&ca.certificate) && !is_root(&web.chain[0]));
    let cannot_sign = intermediate_params(|p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature]);
    assert!(!is_root(&self_signed(cannot_sign).chain[0]));
    // As openssl makes them.
    assert!(is_root(&self_signed(intermediate_params(|p| p.key_usages.clear())).chain[0]));

    let roots = vec![web.chain[0].clone()];
    let bundle = Arc::new(Bundle { trust_domain: ca.trust_domain.clone(), roots });
    let trust = Trust::new(&BTreeMap::from([(ca.trust_domain.clone(), bundle)]));
    assert_eq!(trust.verify(&web.chain[0], &[], UnixTime::now()), Err(Reason::CertificateUntrusted));
}

#[test]
fn an_expired_root_vouches_for_nobody() {
    let params = intermediate_params(|p| {
        valid(p, DAY, DAY);
        p.not_after = (SystemTime::now() - Duration::from_secs(2)).into();
    });
    let ca = TestCa::with("td", params, key(&rcgen::PKCS_ECDSA_P256_SHA256));
    let (trust, web) = (Trust::new(&bundles(&[&ca])), ca.issue(WEB));
    assert_eq!(trust.verify(&web.chain[0], &[], UnixTime::now()), Err(Reason::CertificateUntrusted));
    let earlier = UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs() - 30));
    assert_eq!(trust.verify(&web.chain[0], &[], earlier), Ok(WEB.parse().unwrap()));
}

#[tokio::test]
async fn refuses_a_wrong_signature() {
    let ca = TestCa::new("td");
    let mut issued = ca.issue(WEB);
    let mut der = issued.chain[0].to_vec();
    *der.last_mut().unwrap() ^= 1;
    issued.chain[0] = der.into();
    assert_refused(&us(&ca), &issued, Reason::CertificateSignature, "certificate_unknown").await;
}

#[tokio::test]
async fn refuses_a_certificate_whose_key_the_peer_does_not_hold() {
    let ca = TestCa::new("td");
    let (victim, mut thief) = (ca.issue(WEB), ca.issue("spiffe://td/thief"));
    thief.chain = victim.chain;
    assert_refused(&us(&ca), &thief, Reason::TlsMisbehaved, "decrypt_error").await;
}

#[tokio::test]
async fn refuses_an_intermediate_that_may_not_sign() {
    let root = TestCa::new("td");
    let us = us(&root);
    let below = |spoil: fn(&mut CertificateParams)| root.intermediate(intermediate_params(spoil)).issue(WEB);
    let (untrusted, unknown_ca) = (Reason::CertificateUntrusted, "unknown_ca");

    let no_cert_sign = below(|p| p.key_usages = vec![KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature]);
    assert_refused(&us, &no_cert_sign, untrusted, unknown_ca).await;
    assert_refused(&us, &below(|p| p.key_usages.clear()), untrusted, unknown_ca).await;
    assert_refused(&us, &below(|p| p.is_ca = IsCa::ExplicitNoCa), untrusted, unknown_ca).await;
    let expired = below(|p| p.not_after = (SystemTime::now() - Duration::from_secs(2)).into());
    assert_refused(&us, &expired, Reason::CertificateExpired, "certificate_expired").await;
    let other_use = below(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    assert_refused(&us, &other_use, Reason::CertificateExtendedUsage, "unsupported_certificate").await;

    let shallow = root.intermediate(intermediate_params(|p| p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0))));
    assert_accepted(&us, &shallow.issue(WEB)).await;
    let sub = intermediate_params(|p| p.distinguished_name.push(DnType::OrganizationName, "sub"));
    assert_refused(&us, &shallow.intermediate(sub).issue(WEB), untrusted, unknown_ca).await;
}

/// webpki does not implement URI constraints and refuses whatever they apply to. That is too strict for a CA that is
/// constrained to our own trust domain, and never too lax.
#[tokio::test]
async fn refuses_under_uri_name_constraints() {
    let root = TestCa::new("td");
    let dns = |name: &str| GeneralSubtree::DnsName(name.into());
    let only = |subtree| NameConstraints { permitted_subtrees: vec![subtree], excluded_subtrees: vec![] };
    let but = |subtree| NameConstraints { permitted_subtrees: vec![], excluded_subtrees: vec![subtree] };
    let below =
        |constraints| root.intermediate(intermediate_params(|p| p.name_constraints = Some(constraints))).issue(WEB);
    // Constraints of other kinds of names do not touch an ID.
    assert_accepted(&us(&root), &below(only(dns("example.com")))).await;
    assert_accepted(&us(&root), &below(but(dns("td")))).await;

    // rcgen has no URI subtrees: SEQUENCE { [0 permitted | 1 excluded] { SEQUENCE { [6] "td" } } }.
    for (tag, _) in [(0xa0, "permitted"), (0xa1, "excluded")] {
        let content = vec![0x30, 8, tag, 6, 0x30, 4, 0x86, 2, b't', b'd'];
        let params = intermediate_params(|p| {
            p.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 30], content));
        });
        let issued = root.intermediate(params).issue(WEB);
        assert_refused(&us(&root), &issued, Reason::CertificateUntrusted, "unknown_ca").await;
    }
}

#[tokio::test]
async fn refuses_what_cannot_be_parsed() {
    let ca = TestCa::new("td");
    let us = us(&ca);
    let malformed = (Reason::CertificateMalformed, "bad_certificate");

    let mut noise = ca.issue(WEB);
    noise.chain[0] = CertificateDer::from(b"\x30\x03not".to_vec());
    let mut longer = ca.issue(WEB);
    let mut der = longer.chain[0].to_vec();
    der.push(0);
    longer.chain[0] = der.into();
    // An extension that we must understand and do not; the same extension twice.
    let critical = spoilt(&ca, |p| {
        let mut extension = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 55555, 1], vec![5, 0]);
        extension.set_criticality(true);
        p.custom_extensions.push(extension);
    });
    let twice = spoilt(&ca, |p| {
        let san = [&[0x30, 2 + 15, 0x86, 15][..], b"spiffe://td/web"].concat();
        p.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 17], san));
    });
    for issued in [noise, longer, critical, twice] {
        assert_refused(&us, &issued, malformed.0, malformed.1).await;
    }
}
