//! A pod on the test's loopback interface: the pod is 127.0.0.1, everybody else another address of 127/8.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;

use super::Ctx;
use crate::metrics::Metrics;
use crate::podnet::PodNet;
use crate::snapshot::{IdentityState, Limits, Listener, LocalWorkload, PortRule, Reader, Snapshot, Timeouts};
use crate::tls::WorkloadTls;
use crate::tls::test_ca::{Issued, TestCa};
use crate::workload::{Allow, Mode, Peer, SourceKind, Workload, WorkloadKey};

/// The pod.
pub(crate) const POD: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Somebody on another node.
pub(crate) const REMOTE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));

pub(crate) fn key(name: &str) -> WorkloadKey {
    WorkloadKey { namespace: "shop".into(), name: name.into() }
}

pub(crate) fn ready(issued: &Issued, trusts: &[&TestCa]) -> IdentityState {
    IdentityState::Ready(Arc::new(WorkloadTls::new(issued.identity(trusts)).unwrap()))
}

/// A workload at [`POD`] with one rule for every port.
pub(crate) fn workload(name: &str, mode: Mode, allow: Allow, identity: IdentityState) -> LocalWorkload {
    let tls = match &identity {
        IdentityState::Ready(tls) => Some(tls.server(allow.clone())),
        IdentityState::Pending | IdentityState::Withdrawn => None,
    };
    LocalWorkload {
        workload: Workload {
            key: key(name),
            service_account: String::new(),
            labels: BTreeMap::new(),
            netns: "/nowhere".into(),
            ips: vec![POD],
            spiffe_id: None,
            source: SourceKind::Embedded,
        },
        identity,
        listener: Listener { default: PortRule { mode, allow, tls }, ports: BTreeMap::new() },
    }
}

/// Short time limits, these workloads, no peers.
pub(crate) fn snapshot(workloads: impl IntoIterator<Item = LocalWorkload>) -> Snapshot {
    Snapshot {
        epoch: 1,
        trust_domain: "td".parse().unwrap(),
        workloads: workloads.into_iter().map(|w| (w.workload.key.clone(), Arc::new(w))).collect(),
        peers: HashMap::new(),
        conflicts: HashSet::new(),
        pending: HashSet::new(),
        services: HashMap::new(),
        timeouts: Timeouts {
            connect: Duration::from_secs(2),
            handshake: Duration::from_secs(2),
            svid_wait: Duration::from_millis(500),
            peek: Duration::from_millis(20),
            ..Timeouts::default()
        },
        limits: Limits { connections_per_pod: 100, handshakes_per_pod: 10 },
    }
}

/// An enrolled workload at [`REMOTE`].
pub(crate) fn peer(id: &str, mode: Mode) -> (IpAddr, Arc<Peer>) {
    let spiffe_id = id.parse().unwrap();
    (REMOTE, Arc::new(Peer { key: key("remote"), ips: vec![REMOTE], spiffe_id, mode, ports: BTreeMap::new() }))
}

pub(crate) fn snapshots(first: Snapshot) -> (watch::Sender<Arc<Snapshot>>, Reader) {
    watch::channel(Arc::new(first))
}

pub(crate) async fn listen(ip: IpAddr) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((ip, 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

pub(crate) async fn connect(from: IpAddr, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((from, 0).into()).unwrap();
    socket.connect(to).await.unwrap()
}

/// Two ends of one TCP connection.
pub(crate) async fn pair() -> (TcpStream, TcpStream) {
    let (listener, addr) = listen(POD).await;
    let (near, far) = tokio::join!(TcpStream::connect(addr), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

pub(crate) fn ctx(snapshots: Reader) -> Arc<Ctx> {
    let metrics = Arc::new(Metrics::new(snapshots.clone(), Arc::new(Vec::new)));
    Arc::new(Ctx { snapshots, metrics })
}

/// The pod of name `pod`.
pub(crate) fn net(agent_ports: &[u16]) -> PodNet {
    PodNet::for_test(key("pod"), &[POD], agent_ports)
}
