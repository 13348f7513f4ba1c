use std::io;

use rustls::crypto::SupportedKxGroup;
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, HandshakeKind, NamedGroup, ServerConnection};
use sealane_common::reason::Reason;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::test_ca::{Issued, TestCa, bundles};
use super::*;

/// How both ends saw a handshake followed by one byte from the server to the client.
pub(crate) struct Met {
    pub client: Result<Seen, TlsFailure>,
    pub server: Result<Seen, TlsFailure>,
}

#[derive(Debug)]
pub(crate) struct Seen {
    pub peer: Option<VerifiedPeer>,
    pub group: NamedGroup,
    pub kind: HandshakeKind,
    pub alpn: Option<Vec<u8>>,
    pub server_name: Option<String>,
}

impl Seen {
    fn of(conn: &CommonState) -> Self {
        Self {
            peer: peer(conn),
            group: conn.negotiated_key_exchange_group().unwrap().name(),
            kind: conn.handshake_kind().unwrap(),
            alpn: conn.alpn_protocol().map(<[u8]>::to_vec),
            server_name: None,
        }
    }

    fn peer_id(&self) -> &str {
        self.peer.as_ref().unwrap().id.as_str()
    }
}

pub(crate) async fn meet(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Met {
    let (near, far) = duplex(1 << 16);
    let (client, server) = tokio::join!(call(client, near), answer(server, far));
    Met { client: client.map_err(|e| failure(&e)), server: server.map_err(|e| failure(&e)) }
}

pub(crate) async fn call(config: Arc<ClientConfig>, stream: DuplexStream) -> io::Result<Seen> {
    let mut tls = TlsConnector::from(config).connect(name(), stream).await?;
    tls.read_u8().await?;
    Ok(Seen::of(tls.get_ref().1))
}

pub(crate) async fn answer(config: Arc<ServerConfig>, stream: DuplexStream) -> io::Result<Seen> {
    let mut tls = TlsAcceptor::from(config).accept(stream).await?;
    tls.write_u8(1).await?;
    tls.flush().await?;
    let conn = tls.get_ref().1;
    Ok(Seen { server_name: conn.server_name().map(str::to_owned), ..Seen::of(conn) })
}

/// A name that rustls would send, if it were let.
fn name() -> ServerName<'static> {
    ServerName::try_from("api.shop").unwrap()
}

pub(crate) fn ids(ids: &[&str]) -> Arc<[SpiffeId]> {
    ids.iter().map(|id| id.parse().unwrap()).collect()
}

pub(crate) fn tls(issued: &Issued, trusts: &[&TestCa]) -> WorkloadTls {
    WorkloadTls::new(issued.identity(trusts)).unwrap()
}

fn refused(reason: Reason) -> TlsFailure {
    TlsFailure { reason, alert: None }
}

fn by_peer(alert: &'static str) -> TlsFailure {
    TlsFailure { reason: Reason::RefusedByPeer, alert: Some(alert) }
}

/// A client `web` and a server `api` of one trust domain.
fn pair() -> (TestCa, WorkloadTls, WorkloadTls) {
    let ca = TestCa::new("td");
    let (web, api) = (tls(&ca.issue("spiffe://td/web"), &[&ca]), tls(&ca.issue("spiffe://td/api"), &[&ca]));
    (ca, web, api)
}

fn own(ca: &TestCa) -> Allow {
    Allow::TrustDomain(ca.trust_domain.clone())
}

#[tokio::test]
async fn both_ends_learn_whom_they_talk_to() {
    let (ca, web, api) = pair();
    let met = meet(web.client(ids(&["spiffe://td/db", "spiffe://td/api"])), api.server(own(&ca))).await;
    let (client, server) = (met.client.unwrap(), met.server.unwrap());
    assert_eq!((client.peer_id(), server.peer_id()), ("spiffe://td/api", "spiffe://td/web"));
    assert_eq!(server.server_name, None, "the name of the peer must not be on the wire");
}

#[tokio::test]
async fn the_hybrid_group_is_preferred_and_the_classical_ones_are_taken() {
    let (ca, web, api) = pair();
    let server = api.server(own(&ca));
    let met = meet(web.client(ids(&["spiffe://td/api"])), server.clone()).await;
    assert_eq!(met.client.unwrap().group, NamedGroup::X25519MLKEM768);

    for (group, name) in [(kx_group::X25519, NamedGroup::X25519), (kx_group::SECP256R1, NamedGroup::secp256r1)] {
        assert_eq!(meet(web_with(&ca, group), server.clone()).await.client.unwrap().group, name);
    }
    let met = meet(web_with(&ca, kx_group::SECP384R1), server).await;
    assert_eq!(met.server.unwrap_err(), refused(Reason::TlsParameters));
    assert_eq!(met.client.unwrap_err(), by_peer("handshake_failure"));
}

/// A client with one group, as an older peer has.
fn web_with(ca: &TestCa, group: &'static dyn SupportedKxGroup) -> Arc<ClientConfig> {
    let web = ca.issue("spiffe://td/web").identity(&[ca]);
    let provider = CryptoProvider { kx_groups: vec![group], ..default_provider() };
    let trust = Arc::new(Trust::new(&web.bundles));
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Verifier::new(trust, Accept::Expected(ids(&["spiffe://td/api"]))))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(web.svid.certified_key())));
    Arc::new(config)
}

#[tokio::test]
async fn no_session_is_ever_resumed() {
    let (ca, web, api) = pair();
    // The other end does all that rustls can: it keeps sessions and sends tickets.
    let (keeping, ours) = (web_with(&ca, kx_group::X25519), web.client(ids(&["spiffe://td/api"])));
    let (strict, mut sending) = (api.server(own(&ca)), ServerConfig::clone(&api.server(own(&ca))));
    sending.session_storage = rustls::server::ServerSessionMemoryCache::new(32);
    sending.send_tls13_tickets = 2;
    let sending = Arc::new(sending);
    for (client, server) in [(&keeping, &strict), (&ours, &sending), (&keeping, &sending)] {
        let mut kinds = Vec::new();
        for _ in 0..2 {
            let met = meet(client.clone(), server.clone()).await;
            assert_eq!(met.server.unwrap().kind, met.client.as_ref().unwrap().kind);
            kinds.push(met.client.unwrap().kind);
        }
        let both_keep = Arc::ptr_eq(client, &keeping) && Arc::ptr_eq(server, &sending);
        let second = if both_keep { HandshakeKind::Resumed } else { HandshakeKind::Full };
        assert_eq!(kinds, [HandshakeKind::Full, second]);
    }
}

#[tokio::test]
async fn a_client_may_offer_any_protocol() {
    let (ca, web, api) = pair();
    let mut client = ClientConfig::clone(&web.client(ids(&["spiffe://td/api"])));
    client.alpn_protocols = vec![b"h2".to_vec()];
    let met = meet(Arc::new(client), api.server(own(&ca))).await;
    assert_eq!(met.server.unwrap().alpn, None);
    met.client.unwrap();
}

#[tokio::test]
async fn a_server_that_is_another_is_refused() {
    let (ca, web, api) = pair();
    for expected in [ids(&["spiffe://td/db"]), ids(&["spiffe://td/ap"]), ids(&["spiffe://td/api/v2"]), ids(&[])] {
        let met = meet(web.client(expected), api.server(own(&ca))).await;
        assert_eq!(met.client.unwrap_err(), refused(Reason::PeerIdMismatch));
        assert_eq!(met.server.unwrap_err(), by_peer("bad_certificate"));
    }
}

#[test]
fn our_certificate_is_not_sent_to_a_server_that_is_another() {
    let (ca, web, api) = pair();
    let sent = |expected: &str| {
        let mut client = ClientConnection::new(web.client(ids(&[expected])), name()).unwrap();
        let mut server = ServerConnection::new(api.server(own(&ca))).unwrap();
        let mut flight = Vec::new();
        client.write_tls(&mut flight).unwrap();
        server.read_tls(&mut flight.as_slice()).unwrap();
        server.process_new_packets().unwrap();

        let mut flight = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut flight).unwrap();
        }
        let mut flight = flight.as_slice();
        while !flight.is_empty() {
            client.read_tls(&mut flight).unwrap();
            let _refused = client.process_new_packets();
        }
        let mut answer = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut answer).unwrap();
        }
        answer.len()
    };
    let certificate = web.identity().svid.chain[0].len();
    assert!(sent("spiffe://td/api") > certificate);
    assert!(sent("spiffe://td/db") < certificate, "more than an alert was sent");
}

#[tokio::test]
async fn a_client_that_no_rule_allows_is_told_so() {
    let (_, web, api) = pair();
    let elsewhere = Allow::TrustDomain("elsewhere".parse().unwrap());
    for allow in [Allow::Ids(ids(&["spiffe://td/db"])), Allow::Ids(ids(&[])), elsewhere] {
        let met = meet(web.client(ids(&["spiffe://td/api"])), api.server(allow)).await;
        assert_eq!(met.server.unwrap_err(), refused(Reason::NotAllowed));
        assert_eq!(met.client.unwrap_err(), by_peer("access_denied"));
    }
}

#[tokio::test]
async fn a_federated_client_needs_a_rule() {
    let (ours, theirs) = (TestCa::new("td"), TestCa::new("other"));
    let web = tls(&theirs.issue("spiffe://other/web"), &[&theirs, &ours]);
    let api = tls(&ours.issue("spiffe://td/api"), &[&ours, &theirs]);
    let client = web.client(ids(&["spiffe://td/api"]));

    let met = meet(client.clone(), api.server(Allow::Ids(ids(&["spiffe://other/web"])))).await;
    assert_eq!(met.server.unwrap().peer_id(), "spiffe://other/web");
    met.client.unwrap();
    let met = meet(client, api.server(own(&ours))).await;
    assert_eq!(met.server.unwrap_err(), refused(Reason::NotAllowed));
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let (ca, web, api) = pair();
    let verifier = Verifier::new(web.trust.clone(), Accept::Expected(ids(&["spiffe://td/api"])));
    let client = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    let met = meet(Arc::new(client), api.server(own(&ca))).await;
    assert_eq!(met.server.unwrap_err(), refused(Reason::CertificateMissing));
    assert_eq!(met.client.unwrap_err(), by_peer("certificate_required"));
}

#[tokio::test]
async fn tls_1_2_is_refused_by_either_side() {
    let (ca, web, api) = pair();
    let old = Arc::new(default_provider());
    let certificate = Arc::new(SingleCertAndKey::from(web.identity.svid.certified_key()));
    let client = ClientConfig::builder_with_provider(old.clone())
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Verifier::new(web.trust.clone(), Accept::Expected(ids(&["spiffe://td/api"]))))
        .with_client_cert_resolver(certificate.clone());
    let met = meet(Arc::new(client), api.server(own(&ca))).await;
    assert_eq!(met.server.unwrap_err(), refused(Reason::TlsVersion));
    assert_eq!(met.client.unwrap_err(), by_peer("protocol_version"));

    let server = ServerConfig::builder_with_provider(old)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    let met = meet(web.client(ids(&["spiffe://td/web"])), Arc::new(server)).await;
    assert_eq!(met.client.unwrap_err(), by_peer("protocol_version"));
    assert_eq!(met.server.unwrap_err(), refused(Reason::TlsVersion));
}

#[tokio::test]
async fn what_is_not_tls_is_named_so() {
    let (ca, web, api) = pair();
    for garbage in [&b"GET / HTTP/1.1\r\nHost: api\r\n\r\n"[..], b"SSH-2.0-OpenSSH_9.2\r\n", &[0; 64], &[0xff; 64]] {
        let (mut near, far) = duplex(1 << 16);
        near.write_all(garbage).await.unwrap();
        let error = answer(api.server(own(&ca)), far).await.unwrap_err();
        assert_eq!(failure(&error), refused(Reason::NotTls), "{garbage:?}");

        let (mut near, far) = duplex(1 << 16);
        near.write_all(garbage).await.unwrap();
        let error = call(web.client(ids(&["spiffe://td/api"])), far).await.unwrap_err();
        assert_eq!(failure(&error), refused(Reason::NotTls), "{garbage:?}");
    }
}

#[tokio::test]
async fn an_end_within_the_handshake_is_named_so() {
    let (ca, web, api) = pair();
    let (near, far) = duplex(1 << 16);
    drop(near);
    let error = answer(api.server(own(&ca)), far).await.unwrap_err();
    assert_eq!(failure(&error), refused(Reason::HandshakeClosed));

    let (mut near, far) = duplex(1 << 16);
    let client = tokio::spawn(call(web.client(ids(&["spiffe://td/api"])), far));
    near.read_u8().await.unwrap();
    drop(near);
    assert_eq!(failure(&client.await.unwrap().unwrap_err()), refused(Reason::HandshakeClosed));
}

#[tokio::test]
async fn trust_in_an_open_connection_follows_the_bundle() {
    let (ca, web, api) = pair();
    let (other, rotated) = (TestCa::new("other"), TestCa::new("td"));
    let met = meet(web.client(ids(&["spiffe://td/api"])), api.server(own(&ca))).await;
    let peer = met.server.unwrap().peer.unwrap();

    assert!(still_trusted(&peer, &bundles(&[&ca])));
    assert!(still_trusted(&peer, &bundles(&[&rotated, &ca, &other])), "a further root changes nothing");
    assert!(!still_trusted(&peer, &bundles(&[&rotated])), "its root is gone");
    assert!(!still_trusted(&peer, &bundles(&[])), "its trust domain is gone");

    let elsewhere: TrustDomain = "other".parse().unwrap();
    let roots = vec![ca.certificate.clone()];
    let moved = BTreeMap::from([(elsewhere.clone(), Arc::new(Bundle { trust_domain: elsewhere, roots }))]);
    assert!(!still_trusted(&peer, &moved), "its root vouches for another trust domain only");
}

#[test]
fn trust_in_an_open_connection_outlives_its_certificates() {
    let ca = TestCa::new("td");
    let peer = |verified_at| VerifiedPeer {
        id: "spiffe://td/web".parse().unwrap(),
        chain: ca.issue("spiffe://td/web").chain.into(),
        verified_at,
    };
    let later = std::time::Duration::from_secs(UnixTime::now().as_secs() + 24 * 3600);
    assert!(still_trusted(&peer(UnixTime::now()), &bundles(&[&ca])));
    assert!(!still_trusted(&peer(UnixTime::since_unix_epoch(later)), &bundles(&[&ca])));
}
