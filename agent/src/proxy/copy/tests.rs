use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use socket2::SockRef;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::*;
use crate::podnet::prepare;
use crate::proxy::stream::{Peer, Replay};
use crate::proxy::testing::{self, pair};
use crate::tls::test_ca::TestCa;
use crate::workload::Allow;

/// A hang, not slowness: builds may share the machine.
const LONG: Duration = Duration::from_secs(120);

/// Copies between two sockets as the agent does, and closes them at the end as it does.
fn copying(mut app: TcpStream, mut peer: Peer) -> JoinHandle<(Result<(), Failure>, [u64; 2])> {
    prepare(&SockRef::from(&app)).unwrap();
    prepare(&SockRef::from(peer.tcp())).unwrap();
    tokio::spawn(async move {
        let traffic = Traffic::for_test();
        let result = duplex(&mut app, &mut peer, &traffic).await;
        if result.is_ok() {
            crate::proxy::accept::end_in_order(&app);
            crate::proxy::accept::end_in_order(peer.tcp());
        }
        (result, [traffic.bytes(Side::App), traffic.bytes(Side::Peer)])
    })
}

async fn plain() -> (TcpStream, TcpStream, JoinHandle<(Result<(), Failure>, [u64; 2])>) {
    let ((app, near_app), (near_peer, peer)) = (pair().await, pair().await);
    (app, peer, copying(near_app, Peer::Plain(near_peer.into())))
}

async fn tls() -> (TcpStream, TlsStream<TcpStream>, JoinHandle<(Result<(), Failure>, [u64; 2])>) {
    let ca = TestCa::new("td");
    let [web, api] = ["spiffe://td/web", "spiffe://td/api"].map(|id| {
        let identity = ca.issue(id).identity(&[&ca]);
        crate::tls::WorkloadTls::new(identity).unwrap()
    });
    let ((app, near_app), (near_peer, peer)) = (pair().await, pair().await);
    let server = TlsAcceptor::from(api.server(Allow::TrustDomain("td".parse().unwrap())));
    let client = TlsConnector::from(web.client(Arc::new(["spiffe://td/api".parse().unwrap()])));
    let name = rustls::pki_types::ServerName::IpAddress(testing::POD.into());
    let (near, far) = tokio::join!(client.connect(name, Replay::from(near_peer)), server.accept(peer));
    let near = Peer::Tls(Box::new(TlsStream::Client(near.unwrap())));
    (app, TlsStream::Server(far.unwrap()), copying(near_app, near))
}

async fn read_all(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    timeout(LONG, from.read_to_end(&mut all)).await.expect("the stream ends")?;
    Ok(all)
}

async fn outcome(copy: JoinHandle<(Result<(), Failure>, [u64; 2])>) -> (Result<(), Failure>, [u64; 2]) {
    timeout(LONG, copy).await.expect("the copy ends").unwrap()
}

async fn half_closes(mut first: impl AsyncRead + AsyncWrite + Unpin, mut second: impl AsyncRead + AsyncWrite + Unpin) {
    first.write_all(b"question").await.unwrap();
    first.shutdown().await.unwrap();
    assert_eq!(read_all(&mut second).await.unwrap(), b"question");
    // The other direction goes on after the first has ended.
    second.write_all(b"long answer").await.unwrap();
    second.shutdown().await.unwrap();
    assert_eq!(read_all(&mut first).await.unwrap(), b"long answer");
}

#[tokio::test]
async fn a_half_close_passes_and_the_other_direction_goes_on() {
    let (app, peer, copy) = plain().await;
    half_closes(app, peer).await;
    let (result, bytes) = outcome(copy).await;
    assert!(result.is_ok() && bytes == [8, 11], "{result:?} {bytes:?}");
    let (app, peer, copy) = plain().await;
    half_closes(peer, app).await;
    let (result, bytes) = outcome(copy).await;
    assert!(result.is_ok() && bytes == [11, 8], "{result:?} {bytes:?}");
}

#[tokio::test]
async fn a_half_close_passes_through_tls_both_ways() {
    let (app, peer, copy) = tls().await;
    half_closes(app, peer).await;
    assert!(outcome(copy).await.0.is_ok());
    let (app, peer, copy) = tls().await;
    half_closes(peer, app).await;
    assert!(outcome(copy).await.0.is_ok());
}

#[tokio::test]
async fn a_single_byte_is_not_held_back() {
    let (mut app, mut peer, copy) = tls().await;
    for _ in 0..3 {
        app.write_all(b"x").await.unwrap();
        assert_eq!(timeout(LONG, peer.read_u8()).await.unwrap().unwrap(), b'x');
        peer.write_all(b"y").await.unwrap();
        peer.flush().await.unwrap();
        assert_eq!(timeout(LONG, app.read_u8()).await.unwrap().unwrap(), b'y');
    }
    assert!(!copy.is_finished());
}

#[tokio::test]
async fn a_stream_that_ends_without_close_notify_is_a_reset_for_the_application() {
    let (mut app, mut peer, copy) = tls().await;
    peer.write_all(b"half an ans").await.unwrap();
    peer.flush().await.unwrap();
    peer.get_mut().0.shutdown().await.unwrap();
    assert_eq!(outcome(copy).await.0.unwrap_err().reason, Reason::PeerTruncated);
    let mut read = Vec::new();
    let error = app.read_to_end(&mut read).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_reset_passes_both_ways_and_names_its_side() {
    let (app, mut peer, copy) = plain().await;
    SockRef::from(&app).set_linger(Some(Duration::ZERO)).unwrap();
    drop(app);
    assert_eq!(outcome(copy).await.0.unwrap_err().reason, Reason::AppReset);
    assert_eq!(read_all(&mut peer).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);

    let (mut app, peer, copy) = plain().await;
    SockRef::from(&peer).set_linger(Some(Duration::ZERO)).unwrap();
    drop(peer);
    assert_eq!(outcome(copy).await.0.unwrap_err().reason, Reason::PeerReset);
    assert_eq!(read_all(&mut app).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_reset_of_the_application_never_looks_like_an_end_to_a_tls_peer() {
    let (app, mut peer, copy) = tls().await;
    SockRef::from(&app).set_linger(Some(Duration::ZERO)).unwrap();
    drop(app);
    assert_eq!(outcome(copy).await.0.unwrap_err().reason, Reason::AppReset);
    assert!(read_all(&mut peer).await.is_err());
}

/// A server that answers early and closes: the answer arrives although the request could not be sent to its end.
#[tokio::test]
async fn what_a_closing_peer_said_last_is_delivered() {
    let (mut app, mut peer, copy) = plain().await;
    app.write_all(b"never read").await.unwrap();
    peer.peek(&mut [0]).await.unwrap();
    peer.write_all(b"413").await.unwrap();
    // Closed with unread data: the kernel resets.
    drop(peer);
    let mut answer = [0; 3];
    timeout(LONG, app.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"413");
    assert_eq!(outcome(copy).await.0.unwrap_err().reason, Reason::PeerReset);
}

#[tokio::test]
async fn a_dead_application_does_not_wait_for_a_peer_that_does_not_read() {
    let ((mut app, near_app), (near_peer, mut peer)) = (pair().await, pair().await);
    SockRef::from(&near_peer).set_send_buffer_size(4096).unwrap();
    let copy = copying(near_app, Peer::Plain(near_peer.into()));
    // As much as the way to the peer takes, and more.
    let filled = async { while app.write_all(&[1; 65_536]).await.is_ok() {} };
    assert!(timeout(Duration::from_millis(500), filled).await.is_err(), "the writer is stopped");
    SockRef::from(&app).set_linger(Some(Duration::ZERO)).unwrap();
    drop(app);
    peer.write_all(b"to nobody").await.unwrap();
    assert_eq!(outcome(copy).await.0.unwrap_err().reason, Reason::AppReset);
    assert!(read_all(&mut peer).await.is_err());
}

/// In memory, so that what is in flight can be counted to the byte.
#[tokio::test]
async fn a_reader_that_stops_stops_the_writer() {
    const PIPE: usize = 1000;
    let (mut app, mut near_app) = tokio::io::duplex(PIPE);
    let (mut near_peer, mut peer) = tokio::io::duplex(PIPE);
    let traffic = Traffic::for_test();
    let mut sent = 0u64;
    {
        let mut copy = pin!(duplex(&mut near_app, &mut near_peer, &traffic));
        let mut idle = 0;
        while idle < 3 {
            assert!(copy.as_mut().now_or_never().is_none());
            match app.write(&[7; 100]).now_or_never() {
                Some(written) => sent += written.unwrap() as u64,
                None => idle += 1,
            }
        }
        assert!(sent as usize >= 2 * PIPE && sent as usize <= 2 * PIPE + BUFFER, "{sent} bytes in flight");
        // It goes on where it stopped, and nothing is lost.
        drop(app);
        let mut received = Vec::new();
        let both = async {
            tokio::join!(copy, async {
                peer.read_to_end(&mut received).await?;
                peer.shutdown().await
            })
        };
        let (result, read) = timeout(LONG, both).await.unwrap();
        read.unwrap();
        drop(result);
        assert_eq!(received.len() as u64, sent);
    }
    assert_eq!(traffic.bytes(Side::App), sent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_transfers_in_both_directions_arrive_whole() {
    const BYTES: usize = 24 << 20;
    let (app, peer, copy) = tls().await;
    let (app_reads, app_writes) = tokio::io::split(app);
    let (peer_reads, peer_writes) = tokio::io::split(peer);
    let writers =
        [tokio::spawn(write_pattern(app_writes, 1, BYTES)), tokio::spawn(write_pattern(peer_writes, 2, BYTES))];
    let readers = [tokio::spawn(check_pattern(peer_reads, 1)), tokio::spawn(check_pattern(app_reads, 2))];
    for writer in writers {
        timeout(LONG, writer).await.unwrap().unwrap();
    }
    for reader in readers {
        assert_eq!(timeout(LONG, reader).await.unwrap().unwrap(), BYTES);
    }
    let (result, bytes) = outcome(copy).await;
    assert!(result.is_ok() && bytes == [BYTES as u64; 2], "{result:?} {bytes:?}");
}

/// Every position has a byte of its own: what is lost, doubled or moved shows.
fn pattern(seed: u32) -> impl Iterator<Item = u8> {
    std::iter::successors(Some(seed), |x| Some(x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223)))
        .map(|x| (x >> 24) as u8)
}

async fn write_pattern(mut to: impl AsyncWrite + Unpin, seed: u32, bytes: usize) {
    let mut pattern = pattern(seed);
    let mut left = bytes;
    // Sizes that meet no boundary of records or buffers.
    for size in [1, 17_000, 100_003, 65_536, 4].into_iter().cycle() {
        let chunk: Vec<u8> = pattern.by_ref().take(size.min(left)).collect();
        to.write_all(&chunk).await.unwrap();
        left -= chunk.len();
        if left == 0 {
            break;
        }
    }
    to.shutdown().await.unwrap();
}

async fn check_pattern(mut from: impl AsyncRead + Unpin, seed: u32) -> usize {
    let mut pattern = pattern(seed);
    let mut total = 0;
    let mut chunk = vec![0; 50_000];
    loop {
        let read = from.read(&mut chunk).await.unwrap();
        if read == 0 {
            return total;
        }
        assert!(chunk[..read].iter().copied().eq(pattern.by_ref().take(read)), "differs after {total} bytes");
        total += read;
    }
}

#[tokio::test]
async fn an_idle_direction_holds_no_buffer() {
    let (mut app, mut near_app) = tokio::io::duplex(10);
    let (mut near_peer, mut peer) = tokio::io::duplex(10);
    let mut flow = Flow::new();
    app.write_all(b"some").await.unwrap();
    let moved =
        poll_fn(|cx| Poll::Ready(flow.poll(cx, &mut near_app, &mut near_peer, false, |_| {}).is_pending())).await;
    assert!(moved);
    let mut read = [0; 4];
    peer.read_exact(&mut read).await.unwrap();
    assert_eq!(flow.buffer.capacity(), 0);
}

/// Both wait for the other to read: the application cannot take what is there for it before it has got out what it writes.
#[tokio::test]
async fn an_application_that_is_blocked_in_writing_learns_that_its_peer_is_gone() {
    let (mut app, mut peer, copy) = tls().await;
    // More than every buffer between the two holds.
    let flood = vec![0; 64 << 20];
    let app = tokio::spawn(async move {
        let written = app.write_all(&flood).await;
        (written, read_all(&mut app).await)
    });
    // Ends when the other direction is full too.
    let piece = vec![0; 1 << 20];
    while timeout(Duration::from_millis(500), peer.write_all(&piece)).await.is_ok() {}
    SockRef::from(peer.get_ref().0).set_linger(Some(Duration::ZERO)).unwrap();
    drop(peer);
    let (result, _) = outcome(copy).await;
    assert_eq!(result.unwrap_err().reason, Reason::PeerReset);
    let (written, read) = timeout(LONG, app).await.expect("the application goes on").unwrap();
    assert!(written.is_err() || read.is_err());
}
