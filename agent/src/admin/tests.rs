use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Mutex;

use super::*;
use crate::proxy::testing;
use crate::snapshot::{IdentityState, Snapshot};
use crate::tls::test_ca::TestCa;
use crate::workload::{Allow, Mode};

const LONG: Duration = Duration::from_secs(20);

fn start_with(snapshot: Snapshot, not_ready: Arc<Mutex<Vec<String>>>) -> Admin {
    let any = "127.0.0.1:0".parse().unwrap();
    let snapshots = testing::snapshots(snapshot).1;
    let providers = Providers {
        metrics: testing::ctx(snapshots.clone()).metrics.clone(),
        snapshots,
        not_ready: Arc::new(move || not_ready.lock().unwrap().clone()),
        pods: Arc::new(|| serde_json::json!({ "shop/pod": "enrolled" })),
    };
    start(AdminConfig { listen: any, metrics_listen: Some(any) }, providers).unwrap()
}

/// Status and body.
fn fetch(addr: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[test]
fn readiness_says_why_not() {
    let not_ready = Arc::new(Mutex::new(vec!["no capture".to_owned(), "no source".to_owned()]));
    let admin = start_with(testing::snapshot([]), not_ready.clone());
    let addr = admin.addrs()[0];
    assert_eq!(fetch(addr, "/healthz"), (200, "ok\n".to_owned()));
    assert_eq!(fetch(addr, "/readyz"), (503, "no capture\nno source\n".to_owned()));
    not_ready.lock().unwrap().clear();
    assert_eq!(fetch(addr, "/readyz"), (200, "ready\n".to_owned()));
}

#[test]
fn the_scrapers_listener_serves_no_state() {
    let admin = start_with(testing::snapshot([]), Arc::default());
    let [all, scraper] = admin.addrs() else { panic!("two listeners") };
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!((fetch(*all, path).0, fetch(*scraper, path).0), (200, 200), "{path}");
    }
    assert_eq!(fetch(*all, "/state").0, 200);
    assert_eq!(fetch(*scraper, "/state").0, 404);
    assert!(fetch(*scraper, "/metrics").1.ends_with("# EOF\n"));
}

#[test]
fn state_shows_identities_by_id_and_dates_and_no_key() {
    let ca = TestCa::new("td");
    let issued = ca.issue("spiffe://td/pod");
    let allow = Allow::Ids(Arc::new(["spiffe://td/web".parse().unwrap()]));
    let mut snapshot = testing::snapshot([
        testing::workload("pod", Mode::Strict, allow.clone(), testing::ready(&issued, &[&ca])),
        testing::workload("new", Mode::Permissive, allow, IdentityState::Pending),
    ]);
    snapshot.peers.extend([testing::peer("spiffe://td/api", Mode::Strict)]);
    let not_after = snapshot.workloads[&testing::key("pod")].identity.usable(std::time::SystemTime::now()).unwrap();
    let not_after = not_after.identity().svid.not_after.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let admin = start_with(snapshot, Arc::default());
    let (status, body) = fetch(admin.addrs()[0], "/state");
    assert_eq!(status, 200);
    let state: serde_json::Value = serde_json::from_str(&body).unwrap();
    let pod = &state["workloads"]["shop/pod"];
    assert_eq!(pod["identity"]["state"], "ready");
    assert_eq!(pod["identity"]["spiffeId"], "spiffe://td/pod");
    assert_eq!(pod["identity"]["notAfter"], not_after);
    assert_eq!(pod["listener"]["default"]["mode"], "STRICT");
    assert_eq!(pod["listener"]["default"]["allow"]["ids"][0], "spiffe://td/web");
    assert_eq!(state["workloads"]["shop/new"]["identity"]["state"], "pending");
    assert_eq!(state["peers"]["127.0.0.2"]["spiffeId"], "spiffe://td/api");
    assert_eq!(state["pods"]["shop/pod"], "enrolled");
    assert!(!body.to_lowercase().contains("key"), "{body}");
    let (_, metrics) = fetch(admin.addrs()[0], "/metrics");
    let expiry = format!(r#"sealane_svid_expiry_timestamp_seconds{{workload="shop/pod"}} {not_after}"#);
    assert!(metrics.lines().any(|line| line == expiry), "{metrics}");
}

#[test]
fn a_successor_binds_the_same_address_and_takes_over() {
    let first = start_with(testing::snapshot([]), Arc::default());
    let addr = first.addrs()[0];
    let successor = bind(addr).unwrap();
    first.stop();
    successor.set_nonblocking(false).unwrap();
    let client = TcpStream::connect(addr).unwrap();
    let (_, from) = successor.accept().unwrap();
    assert_eq!(from, client.local_addr().unwrap());
}

#[test]
fn stop_closes_idle_connections_and_the_listeners() {
    let admin = start_with(testing::snapshot([]), Arc::default());
    let addrs = admin.addrs().to_vec();
    let mut idle = TcpStream::connect(addrs[0]).unwrap();
    idle.set_read_timeout(Some(LONG)).unwrap();
    write!(idle, "GET /healthz HTTP/1.1\r\nHost: agent\r\n\r\n").unwrap();
    let mut byte = [0];
    idle.read_exact(&mut byte).unwrap();
    admin.stop();
    let mut rest = String::new();
    idle.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with("ok\n"));
    idle.shutdown(Shutdown::Both).unwrap();
    for addr in addrs {
        assert_eq!(TcpStream::connect(addr).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
