//! Whole connections over loopback: the pod is 127.0.0.1, everybody else 127.0.0.2. Without the capture layer an accepted
//! socket's own address is not where the client wanted to go, so each test says it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::testing::{POD, REMOTE, connect, ctx, key, listen, net, peer, ready, snapshot, snapshots, workload};
use super::*;
use crate::snapshot::{IdentityState, LocalWorkload, ServicePort, Snapshot};
use crate::tls::WorkloadTls;
use crate::tls::test_ca::TestCa;
use crate::workload::{Allow, Mode};

/// A hang, not slowness: builds may share the machine.
const LONG: Duration = Duration::from_secs(120);

struct Lab {
    ca: TestCa,
    pod: Arc<Pod>,
    publisher: watch::Sender<Arc<Snapshot>>,
}

type Running = JoinHandle<Result<(), Failure>>;

impl Lab {
    /// A pod with the ID `spiffe://td/pod`, in this mode, that allows its trust domain.
    fn new(mode: Mode) -> Self {
        let ca = TestCa::new("td");
        let identity = ready(&ca.issue("spiffe://td/pod"), &[&ca]);
        Self::with(ca, |_| snapshot([workload("pod", mode, td(), identity)]))
    }

    fn with(ca: TestCa, snapshot: impl FnOnce(&TestCa) -> Snapshot) -> Self {
        let (publisher, reader) = snapshots(snapshot(&ca));
        Self { pod: Arc::new(Pod::new(ctx(reader), net(&[]))), publisher, ca }
    }

    fn publish(&self, workloads: impl IntoIterator<Item = LocalWorkload>) {
        let before = self.publisher.borrow().clone();
        let mut next = snapshot(workloads);
        next.peers = before.peers.clone();
        next.services = before.services.clone();
        self.publisher.send_replace(Arc::new(next));
    }

    /// A connection from `from` as the agent accepts it, on its way to `destination`.
    async fn accept(&self, from: IpAddr, destination: SocketAddr, direction: Direction) -> (TcpStream, Running) {
        let (listener, addr) = listen(POD).await;
        let (client, accepted) = tokio::join!(connect(from, addr), listener.accept());
        let (stream, peer) = accepted.unwrap();
        crate::podnet::prepare(&socket2::SockRef::from(&stream)).unwrap();
        let conn = Accepted { stream, client: peer, destination };
        let pod = self.pod.clone();
        let metrics = pod.ctx.metrics.clone();
        let mut record = ConnRecord::accepted(metrics, direction, key("pod"), peer, destination);
        let running = tokio::spawn(async move { serve(&pod, conn, direction, &mut record).await });
        (client, running)
    }

    async fn inbound(&self, app: SocketAddr) -> (TcpStream, Running) {
        self.accept(REMOTE, app, Direction::Inbound).await
    }

    async fn outbound(&self, to: SocketAddr) -> (TcpStream, Running) {
        self.accept(POD, to, Direction::Outbound).await
    }

    fn tls(&self, id: &str) -> WorkloadTls {
        WorkloadTls::new(self.ca.issue(id).identity(&[&self.ca])).unwrap()
    }

    /// As a peer of this ID that expects the pod.
    async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        id: &str,
        stream: S,
    ) -> io::Result<tokio_rustls::client::TlsStream<S>> {
        let config = self.tls(id).client(Arc::new(["spiffe://td/pod".parse().unwrap()]));
        let name = rustls::pki_types::ServerName::IpAddress(POD.into());
        TlsConnector::from(config).connect(name, stream).await
    }
}

fn td() -> Allow {
    Allow::TrustDomain("td".parse().unwrap())
}

fn only(id: &str) -> Allow {
    Allow::Ids(Arc::new([id.parse().unwrap()]))
}

async fn result(running: Running) -> Result<(), Failure> {
    timeout(LONG, running).await.expect("the connection ends").unwrap()
}

async fn reason(running: Running) -> Reason {
    result(running).await.expect_err("the connection is refused").reason
}

async fn is_reset(stream: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    let read = timeout(LONG, stream.read_to_end(&mut rest)).await.expect("the stream ends");
    read.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
}

/// Accepts one connection, answers what it reads with the same, ends when the client has ended.
async fn echo(listener: TcpListener) -> Vec<u8> {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut all = Vec::new();
    let mut chunk = [0; 1000];
    loop {
        let read = stream.read(&mut chunk).await.unwrap();
        if read == 0 {
            break;
        }
        stream.write_all(&chunk[..read]).await.unwrap();
        all.extend_from_slice(&chunk[..read]);
    }
    stream.shutdown().await.unwrap();
    all
}

async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, text: &[u8]) {
    stream.write_all(text).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    timeout(LONG, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, text);
}

/// Nobody has connected: the next connection that the listener sees is the test's own.
async fn was_never_dialled(listener: &TcpListener) -> bool {
    let own = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    listener.accept().await.unwrap().1 == own.local_addr().unwrap()
}

#[tokio::test]
async fn strict_inbound_carries_mtls_and_both_half_closes() {
    let lab = Lab::new(Mode::Strict);
    let (app, addr) = listen(POD).await;
    let app = tokio::spawn(echo(app));
    let (client, running) = lab.inbound(addr).await;
    exchange(lab.handshake("spiffe://td/web", client).await.unwrap(), b"hello").await;
    assert_eq!(timeout(LONG, app).await.unwrap().unwrap(), b"hello");
    assert!(result(running).await.is_ok());
    let text = lab.pod.ctx.metrics.encode().unwrap();
    let opened = r#"sealane_connections_opened_total{direction="inbound",workload="shop/pod",mode="mtls"} 1"#;
    assert!(text.contains(opened), "{text}");
}

#[tokio::test]
async fn strict_inbound_refuses_plaintext_and_never_dials_the_application() {
    let lab = Lab::new(Mode::Strict);
    let (app, addr) = listen(POD).await;
    let (mut client, running) = lab.inbound(addr).await;
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert_eq!(reason(running).await, Reason::NotTls);
    assert!(is_reset(&mut client).await);
    assert!(was_never_dialled(&app).await);
}

#[tokio::test]
async fn a_silent_client_of_a_strict_port_runs_into_the_time_limit() {
    let lab = Lab::new(Mode::Strict);
    let (_app, addr) = listen(POD).await;
    let (mut client, running) = lab.inbound(addr).await;
    assert_eq!(reason(running).await, Reason::HandshakeTimeout);
    assert!(is_reset(&mut client).await);
}

#[tokio::test]
async fn handshakes_at_once_are_bounded() {
    let lab = Lab::new(Mode::Strict);
    let (_app, addr) = listen(POD).await;
    let held: Vec<_> = (0..10).map(|_| lab.pod.inbound.handshakes.take(10).unwrap()).collect();
    let (client, running) = lab.inbound(addr).await;
    lab.handshake("spiffe://td/web", client).await.unwrap_err();
    assert_eq!(reason(running).await, Reason::HandshakeLimit);

    // One that has not spoken is not counted, and takes no place.
    let (mut silent, running) = lab.inbound(addr).await;
    assert_eq!(reason(running).await, Reason::HandshakeTimeout);
    assert!(is_reset(&mut silent).await);

    // One that waits gets the place that is freed.
    let (client, running) = lab.inbound(addr).await;
    let free = async {
        tokio::task::yield_now().await;
        drop(held);
    };
    let (client, ()) = tokio::join!(lab.handshake("spiffe://td/web", client), free);
    drop(client.unwrap());
    assert_ne!(reason(running).await, Reason::HandshakeLimit);
}

#[tokio::test]
async fn who_is_not_allowed_learns_it_by_an_alert() {
    let ca = TestCa::new("td");
    let identity = ready(&ca.issue("spiffe://td/pod"), &[&ca]);
    let rule = workload("pod", Mode::Strict, only("spiffe://td/web"), identity);
    let lab = Lab::with(ca, |_| snapshot([rule]));
    let (app, addr) = listen(POD).await;
    let (client, running) = lab.inbound(addr).await;
    let mut client = lab.handshake("spiffe://td/other", client).await.unwrap();
    let error = client.read_u8().await.unwrap_err();
    assert_eq!(crate::tls::failure(&error).alert, Some("access_denied"));
    drop(client);
    assert_eq!(reason(running).await, Reason::NotAllowed);
    assert!(was_never_dialled(&app).await);
}

#[tokio::test]
async fn an_application_that_refuses_resets_the_peer() {
    let lab = Lab::new(Mode::Strict);
    let (app, addr) = listen(POD).await;
    drop(app);
    let (client, running) = lab.inbound(addr).await;
    let mut client = lab.handshake("spiffe://td/web", client).await.unwrap();
    assert_eq!(client.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(reason(running).await, Reason::ConnectRefused);
}

#[tokio::test]
async fn an_address_that_is_not_the_pods_is_refused() {
    let lab = Lab::new(Mode::Permissive);
    let (app, addr) = listen(REMOTE).await;
    let (_client, running) = lab.inbound(addr).await;
    assert_eq!(reason(running).await, Reason::UnknownLocal);
    assert!(was_never_dialled(&app).await);
}

#[tokio::test]
async fn permissive_inbound_carries_plaintext_and_mtls() {
    let lab = Lab::new(Mode::Permissive);
    for plaintext in [true, false] {
        let (app, addr) = listen(POD).await;
        let app = tokio::spawn(echo(app));
        let (client, running) = lab.inbound(addr).await;
        if plaintext {
            exchange(client, b"GET /").await;
        } else {
            exchange(lab.handshake("spiffe://td/web", client).await.unwrap(), b"GET /").await;
        }
        assert_eq!(timeout(LONG, app).await.unwrap().unwrap(), b"GET /");
        assert!(result(running).await.is_ok());
    }
    let text = lab.pod.ctx.metrics.encode().unwrap();
    for mode in ["plaintext", "mtls"] {
        let opened = format!(r#"connections_opened_total{{direction="inbound",workload="shop/pod",mode="{mode}"}} 1"#);
        assert!(text.contains(&opened), "{text}");
    }
}

#[tokio::test]
async fn permissive_inbound_lets_the_application_speak_first() {
    let lab = Lab::new(Mode::Permissive);
    let (app, addr) = listen(POD).await;
    let app = tokio::spawn(async move {
        let (mut stream, _) = app.accept().await.unwrap();
        stream.write_all(b"220 ready").await.unwrap();
        let mut question = [0; 4];
        stream.read_exact(&mut question).await.unwrap();
        question
    });
    let (mut client, running) = lab.inbound(addr).await;
    let mut greeting = [0; 9];
    timeout(LONG, client.read_exact(&mut greeting)).await.unwrap().unwrap();
    assert_eq!(&greeting, b"220 ready");
    client.write_all(b"EHLO").await.unwrap();
    assert_eq!(&timeout(LONG, app).await.unwrap().unwrap(), b"EHLO");
    drop(client);
    assert!(result(running).await.is_ok());
}

#[tokio::test]
async fn permissive_inbound_terminates_a_late_and_dribbling_client_hello() {
    let lab = Lab::new(Mode::Permissive);
    let (app, addr) = listen(POD).await;
    let (client, running) = lab.inbound(addr).await;
    // The application has been dialled: the time for the first bytes has passed.
    let (stream, _) = timeout(LONG, app.accept()).await.unwrap().unwrap();
    let (listener, again) = listen(POD).await;
    let echoed = tokio::spawn(echo(listener));
    let mut stream = stream;
    let mut bridge = TcpStream::connect(again).await.unwrap();
    let bridge = tokio::spawn(async move { tokio::io::copy_bidirectional(&mut stream, &mut bridge).await });
    exchange(lab.handshake("spiffe://td/web", Dribble::new(client)).await.unwrap(), b"late").await;
    assert_eq!(timeout(LONG, echoed).await.unwrap().unwrap(), b"late");
    assert!(result(running).await.is_ok());
    bridge.await.unwrap().unwrap();
}

/// Writes one byte at a time and lets others run in between.
struct Dribble(TcpStream, bool);

impl Dribble {
    fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        Self(stream, false)
    }
}

impl AsyncRead for Dribble {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Dribble {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.1 = !self.1;
        if self.1 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let one = &buf[..buf.len().min(1)];
        Pin::new(&mut self.0).poll_write(cx, one)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A pod that calls [`REMOTE`], enrolled there as `spiffe://td/api`.
fn calling(identity: impl FnOnce(&TestCa) -> IdentityState) -> Lab {
    Lab::with(TestCa::new("td"), |ca| {
        let mut snapshot = snapshot([workload("pod", Mode::Permissive, td(), identity(ca))]);
        snapshot.peers.extend([peer("spiffe://td/api", Mode::Strict)]);
        snapshot
    })
}

fn pod_identity(ca: &TestCa) -> IdentityState {
    ready(&ca.issue("spiffe://td/pod"), &[ca])
}

#[tokio::test]
async fn outbound_carries_mtls_to_the_expected_peer() {
    let lab = calling(pod_identity);
    let (server, addr) = listen(REMOTE).await;
    let acceptor = TlsAcceptor::from(lab.tls("spiffe://td/api").server(only("spiffe://td/pod")));
    let (app, running) = lab.outbound(addr).await;
    let serve = async {
        let (stream, _) = server.accept().await.unwrap();
        let mut stream = acceptor.accept(stream).await.unwrap();
        let mut question = Vec::new();
        stream.read_to_end(&mut question).await.unwrap();
        stream.write_all(&question).await.unwrap();
        stream.shutdown().await.unwrap();
    };
    timeout(LONG, async { tokio::join!(serve, exchange(app, b"hello")) }).await.unwrap();
    assert!(result(running).await.is_ok());
}

#[tokio::test]
async fn outbound_gives_nothing_to_a_peer_of_another_id() {
    let lab = calling(pod_identity);
    let (server, addr) = listen(REMOTE).await;
    let acceptor = TlsAcceptor::from(lab.tls("spiffe://td/impostor").server(td()));
    let (mut app, running) = lab.outbound(addr).await;
    app.write_all(b"secret").await.unwrap();
    let (stream, _) = server.accept().await.unwrap();
    let error = acceptor.accept(stream).await.unwrap_err();
    assert!(crate::tls::failure(&error).alert.is_some(), "the impostor learns it by an alert: {error}");
    assert_eq!(reason(running).await, Reason::PeerIdMismatch);
    assert!(is_reset(&mut app).await);
}

#[tokio::test]
async fn outbound_never_falls_back_to_plaintext() {
    let lab = calling(pod_identity);
    let (server, addr) = listen(REMOTE).await;
    let (mut app, running) = lab.outbound(addr).await;
    app.write_all(b"secret").await.unwrap();
    let (mut stream, _) = server.accept().await.unwrap();
    stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
    assert_eq!(reason(running).await, Reason::NotTls);
    assert!(is_reset(&mut app).await);
    let mut seen = Vec::new();
    let _ = stream.read_to_end(&mut seen).await;
    assert!(!seen.windows(6).any(|window| window == b"secret"));
    assert!(was_never_dialled(&server).await);
}

#[tokio::test]
async fn a_peer_that_refuses_us_is_named_with_its_alert() {
    let lab = calling(pod_identity);
    let (server, addr) = listen(REMOTE).await;
    let acceptor = TlsAcceptor::from(lab.tls("spiffe://td/api").server(only("spiffe://td/other")));
    let (mut app, running) = lab.outbound(addr).await;
    app.write_all(&[1; 300_000]).await.unwrap();
    let (stream, _) = server.accept().await.unwrap();
    let (error, stream) = acceptor.accept(stream).into_fallible().await.unwrap_err();
    assert_eq!(crate::tls::failure(&error).reason, Reason::NotAllowed);
    // With what the client has sent since unread, this is a reset right behind the alert.
    drop(stream);
    let failure = result(running).await.unwrap_err();
    assert_eq!((failure.reason, failure.alert), (Reason::RefusedByPeer, Some("access_denied")), "{failure:?}");
    assert!(is_reset(&mut app).await);
}

#[tokio::test]
async fn outbound_waits_for_the_first_svid() {
    let lab = calling(|_| IdentityState::Pending);
    let (server, addr) = listen(REMOTE).await;
    let acceptor = TlsAcceptor::from(lab.tls("spiffe://td/api").server(td()));
    let (app, running) = lab.outbound(addr).await;
    lab.publish([workload("pod", Mode::Permissive, td(), IdentityState::Pending)]);
    lab.publish([workload("pod", Mode::Permissive, td(), pod_identity(&lab.ca))]);
    let (stream, _) = timeout(LONG, server.accept()).await.unwrap().unwrap();
    let mut stream = acceptor.accept(stream).await.unwrap();
    stream.shutdown().await.unwrap();
    drop(app);
    assert!(result(running).await.is_ok());
}

#[tokio::test]
async fn outbound_without_an_svid_is_refused_in_time_and_dials_nobody() {
    let lab = calling(|_| IdentityState::Pending);
    let (server, addr) = listen(REMOTE).await;
    let (mut app, running) = lab.outbound(addr).await;
    assert_eq!(reason(running).await, Reason::IdentityPending);
    assert!(is_reset(&mut app).await);
    assert!(was_never_dialled(&server).await);
}

#[tokio::test]
async fn a_failed_dial_tries_the_next_endpoint() {
    let lab = calling(pod_identity);
    let (dead, dead_addr) = listen(REMOTE).await;
    drop(dead);
    let plain: IpAddr = "127.0.0.3".parse().unwrap();
    let (server, addr) = listen(plain).await;
    let vip = SocketAddr::new("127.9.9.9".parse().unwrap(), 80);
    let mut next = snapshot([workload("pod", Mode::Permissive, td(), pod_identity(&lab.ca))]);
    let dead_addr = SocketAddr::new("127.0.0.4".parse().unwrap(), dead_addr.port());
    let endpoints = vec![dead_addr, addr];
    next.services.insert((vip.ip(), vip.port()), Arc::new(ServicePort { key: key("api"), endpoints }));
    lab.publisher.send_replace(Arc::new(next));
    let server = tokio::spawn(echo(server));
    let (app, running) = lab.outbound(vip).await;
    exchange(app, b"hello").await;
    assert_eq!(timeout(LONG, server).await.unwrap().unwrap(), b"hello");
    assert!(result(running).await.is_ok());
    let port = addr.port();
    let plaintext =
        format!(r#"plaintext_connections_total{{direction="outbound",workload="shop/pod",port="{port}"}} 1"#);
    assert!(lab.pod.ctx.metrics.encode().unwrap().contains(&plaintext));
}

#[tokio::test]
async fn a_service_that_resolves_to_the_caller_is_dialled_in_plaintext_inside_the_pod() {
    let lab = calling(pod_identity);
    let (server, addr) = listen(POD).await;
    let vip = SocketAddr::new("127.9.9.9".parse().unwrap(), 80);
    let mut next = snapshot([workload("pod", Mode::Strict, td(), pod_identity(&lab.ca))]);
    next.services.insert((vip.ip(), 80), Arc::new(ServicePort { key: key("api"), endpoints: vec![addr] }));
    lab.publisher.send_replace(Arc::new(next));
    let server = tokio::spawn(echo(server));
    let (app, running) = lab.outbound(vip).await;
    exchange(app, b"self").await;
    assert_eq!(timeout(LONG, server).await.unwrap().unwrap(), b"self");
    assert!(result(running).await.is_ok());
    let opened = r#"opened_total{direction="outbound",workload="shop/pod",mode="hairpin"} 1"#;
    assert!(lab.pod.ctx.metrics.encode().unwrap().contains(opened));
}

/// An inbound mTLS connection through which a first byte has passed both ways.
async fn open_inbound(lab: &Lab) -> (tokio_rustls::client::TlsStream<TcpStream>, TcpStream, Running) {
    let (app, addr) = listen(POD).await;
    let (client, running) = lab.inbound(addr).await;
    let mut client = lab.handshake("spiffe://td/web", client).await.unwrap();
    let (mut app, _) = timeout(LONG, app.accept()).await.unwrap().unwrap();
    beat(&mut client, &mut app).await;
    (client, app, running)
}

async fn beat(a: &mut (impl AsyncRead + AsyncWrite + Unpin), b: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
    a.write_all(b"a").await.unwrap();
    a.flush().await.unwrap();
    assert_eq!(timeout(LONG, b.read_u8()).await.unwrap().unwrap(), b'a');
    b.write_all(b"b").await.unwrap();
    b.flush().await.unwrap();
    assert_eq!(timeout(LONG, a.read_u8()).await.unwrap().unwrap(), b'b');
}

#[tokio::test]
async fn rotation_closes_nothing_and_each_withdrawal_closes_what_rested_on_it() {
    let other = TestCa::new("td");
    type Change = fn(&TestCa, &TestCa) -> LocalWorkload;
    let cases: [(Reason, Change); 5] = [
        (Reason::PolicyChanged, |ca, _| workload("pod", Mode::Strict, only("spiffe://td/other"), pod_identity(ca))),
        (Reason::IdentityChanged, |_, _| workload("pod", Mode::Strict, td(), IdentityState::Withdrawn)),
        (Reason::IdentityChanged, |ca, _| {
            workload("pod", Mode::Strict, td(), ready(&ca.issue("spiffe://td/renamed"), &[ca]))
        }),
        (Reason::BundleChanged, |_, other| {
            workload("pod", Mode::Strict, td(), ready(&other.issue("spiffe://td/pod"), &[other]))
        }),
        (Reason::SvidExpired, |ca, _| {
            let mut params = crate::tls::test_ca::svid_params("spiffe://td/pod");
            crate::tls::test_ca::valid(&mut params, Duration::from_secs(60), Duration::from_secs(1));
            workload("pod", Mode::Strict, td(), ready(&ca.sign(params), &[ca]))
        }),
    ];
    for (expected, change) in cases {
        let lab = Lab::new(Mode::Strict);
        let (mut client, mut app, running) = open_inbound(&lab).await;
        // A new SVID, and a bundle that has one more root.
        let rotated = ready(&lab.ca.issue("spiffe://td/pod"), &[&lab.ca, &other]);
        lab.publish([workload("pod", Mode::Strict, td(), rotated)]);
        beat(&mut client, &mut app).await;
        lab.publish([change(&lab.ca, &other)]);
        assert_eq!(reason(running).await, expected);
        assert!(is_reset(&mut app).await);
        assert_eq!(client.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn a_pod_that_leaves_the_snapshot_drains() {
    let lab = Lab::new(Mode::Strict);
    let (mut client, mut app, running) = open_inbound(&lab).await;
    lab.publish([]);
    beat(&mut client, &mut app).await;
    drop((client, app));
    assert!(result(running).await.is_err());
    let (_app, addr) = listen(POD).await;
    let (_client, running) = lab.inbound(addr).await;
    assert_eq!(reason(running).await, Reason::UnknownWorkload);
}

#[tokio::test]
async fn strict_ends_plaintext_that_permissive_let_in_and_that_which_has_not_spoken_yet() {
    for speaks in [true, false] {
        let lab = Lab::new(Mode::Permissive);
        let (app, addr) = listen(POD).await;
        let (mut client, running) = lab.inbound(addr).await;
        let mut app = timeout(LONG, app.accept()).await.unwrap().unwrap().0;
        if speaks {
            beat(&mut client, &mut app).await;
        }
        lab.publish([workload("pod", Mode::Strict, td(), pod_identity(&lab.ca))]);
        assert_eq!(reason(running).await, Reason::PolicyChanged);
        assert!(is_reset(&mut client).await && is_reset(&mut app).await);
    }
}

#[tokio::test]
async fn a_connection_has_a_greatest_age_where_one_is_set() {
    let lab = Lab::new(Mode::Permissive);
    let mut next = snapshot([workload("pod", Mode::Permissive, td(), pod_identity(&lab.ca))]);
    next.timeouts.max_connection_age = Duration::from_millis(100);
    lab.publisher.send_replace(Arc::new(next));
    let (app, addr) = listen(POD).await;
    let (mut client, running) = lab.inbound(addr).await;
    client.write_all(b"x").await.unwrap();
    let _app = timeout(LONG, app.accept()).await.unwrap().unwrap();
    assert_eq!(reason(running).await, Reason::MaxAge);
    assert!(is_reset(&mut client).await);
}

#[tokio::test]
async fn close_resets_what_is_open_with_its_reason() {
    let lab = Lab::new(Mode::Permissive);
    let (trigger, watcher) = drain::channel();
    let (app, addr) = listen(POD).await;
    let (listener, to) = listen(POD).await;
    let (mut client, accepted) = tokio::join!(connect(REMOTE, to), listener.accept());
    let (stream, from) = accepted.unwrap();
    crate::podnet::prepare(&socket2::SockRef::from(&stream)).unwrap();
    let record = ConnRecord::accepted(lab.pod.ctx.metrics.clone(), Direction::Inbound, key("pod"), from, addr);
    let conn = Accepted { stream, client: from, destination: addr };
    let slot = lab.pod.inbound.connections.take(1).unwrap();
    tokio::spawn(accept::attend(lab.pod.clone(), conn, Direction::Inbound, record, watcher, slot));
    let mut app = timeout(LONG, app.accept()).await.unwrap().unwrap().0;
    beat(&mut client, &mut app).await;
    trigger.stop_accepting();
    beat(&mut client, &mut app).await;
    trigger.close(Reason::Unenrolled);
    assert!(is_reset(&mut client).await && is_reset(&mut app).await);
    timeout(LONG, trigger.drained()).await.unwrap();
    assert_eq!(lab.pod.inbound.connections.held(), 0);
    let closed = r#"connections_closed_total{direction="inbound",workload="shop/pod",reason="unenrolled"} 1"#;
    assert!(lab.pod.ctx.metrics.encode().unwrap().contains(closed));
}

/// Memory per connection: what a task holds for its whole life. Raise it knowingly.
#[tokio::test]
async fn a_connections_task_stays_small() {
    let lab = Lab::new(Mode::Strict);
    for direction in [Direction::Inbound, Direction::Outbound] {
        let (near, _far) = testing::pair().await;
        let addr = near.local_addr().unwrap();
        let record = ConnRecord::accepted(lab.pod.ctx.metrics.clone(), direction, key("pod"), addr, addr);
        let conn = Accepted { stream: near, client: addr, destination: addr };
        let slot = lab.pod.inbound.connections.take(10).unwrap();
        let (_trigger, watcher) = drain::channel();
        let task = accept::attend(lab.pod.clone(), conn, direction, record, watcher, slot);
        let bytes = std::mem::size_of_val(&task);
        assert!(bytes <= 2240, "{direction:?}: {bytes} bytes");
    }
    let bytes = std::mem::size_of::<tokio_rustls::TlsStream<stream::Replay>>();
    assert!(bytes <= 1256, "TLS: {bytes} bytes");
}
