use std::net::IpAddr;

use tokio::io::AsyncReadExt;

use super::*;
use crate::proxy::testing::{self, POD, REMOTE, connect, listen};
use crate::proxy::{Ctx, PodListeners, Serving, serve_pod};

const LONG: Duration = Duration::from_secs(20);

/// A pod whose listeners are dialled directly: each connection is refused as a loop, which is one of the guards.
async fn serving(connections: u32) -> (Serving, Arc<Ctx>, [SocketAddr; 2]) {
    let mut snapshot = testing::snapshot([]);
    snapshot.limits.connections_per_pod = connections;
    let ctx = testing::ctx(testing::snapshots(snapshot).1);
    let (inbound, to_inbound) = listen(POD).await;
    let (outbound, to_outbound) = listen(POD).await;
    let net = testing::net(&[to_inbound.port(), to_outbound.port()]);
    let serving = serve_pod(ctx.clone(), PodListeners { net, inbound, outbound });
    (serving, ctx, [to_inbound, to_outbound])
}

async fn is_reset(from: IpAddr, to: SocketAddr) -> bool {
    let mut stream = connect(from, to).await;
    let read = tokio::time::timeout(LONG, stream.read_u8()).await.unwrap();
    read.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn connections_to_the_agents_own_listeners_are_reset_and_counted() {
    let (serving, ctx, [inbound, outbound]) = serving(10).await;
    assert!(is_reset(REMOTE, inbound).await);
    assert!(is_reset(POD, inbound).await);
    assert!(is_reset(POD, outbound).await);
    assert!(is_reset(REMOTE, outbound).await);
    serving.stop_accepting();
    tokio::time::timeout(LONG, serving.drained()).await.unwrap();
    let refused = |direction, reason| {
        format!(r#"sealane_connections_refused_total{{direction="{direction}",workload="shop/pod",reason="{reason}"}}"#)
    };
    let text = ctx.metrics.encode().unwrap();
    assert!(text.contains(&(refused("inbound", "loop_detected") + " 2")), "{text}");
    assert!(text.contains(&(refused("outbound", "loop_detected") + " 1")), "{text}");
    assert!(text.contains(&(refused("outbound", "foreign_source") + " 1")), "{text}");
    assert_eq!(serving.open(), 0);
}

#[tokio::test]
async fn over_the_limit_is_refused() {
    let (_serving, ctx, [inbound, _]) = serving(0).await;
    assert!(is_reset(REMOTE, inbound).await);
    let refused = r#"{direction="inbound",workload="shop/pod",reason="connection_limit"} 1"#;
    assert!(ctx.metrics.encode().unwrap().contains(refused));
}

#[tokio::test]
async fn stop_closes_the_listeners() {
    let (serving, ctx, addrs) = serving(10).await;
    assert!(ctx.metrics.encode().unwrap().contains("sealane_pods_enrolled 1"));
    serving.stop_accepting();
    tokio::time::timeout(LONG, serving.drained()).await.unwrap();
    for addr in addrs {
        let error = TcpStream::connect(addr).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
    drop(serving);
    assert!(ctx.metrics.encode().unwrap().contains("sealane_pods_enrolled 0"));
}

#[test]
fn slots_are_given_back() {
    let slots = Slots::default();
    let held = [slots.take(2), slots.take(2)];
    assert!(held.iter().all(Option::is_some) && slots.take(2).is_none() && slots.held() == 2);
    assert!(slots.take(3).is_some(), "the limit was raised");
    drop(held);
    assert_eq!(slots.held(), 0);
}

#[test]
fn addresses_are_shown_as_they_are() {
    let addr = |text: &str| text.parse::<SocketAddr>().unwrap();
    assert_eq!(unmapped(addr("[::ffff:10.0.0.1]:80")), addr("10.0.0.1:80"));
    assert_eq!(unmapped(addr("10.0.0.1:80")), addr("10.0.0.1:80"));
    assert_eq!(unmapped(addr("[fe80::1%7]:80")), addr("[fe80::1%7]:80"));
}

#[test]
fn only_exhaustion_pauses_the_loop() {
    assert!(concerns_one_connection(&io::Error::from_raw_os_error(libc::ECONNABORTED)));
    assert!(!concerns_one_connection(&io::Error::from_raw_os_error(libc::EMFILE)));
}
