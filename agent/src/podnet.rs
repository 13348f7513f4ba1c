//! An enrolled pod's network as the data path sees it: sockets inside the pod, and what may be dialled there.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use aya::maps::{HashMap, MapData};
use sealane_common::keys::ClientAddr;
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};

use crate::kernel::netns::NetNs;
use crate::sys;
use crate::workload::WorkloadKey;

/// One enrolled pod's network namespace; cheap to clone.
#[derive(Clone)]
pub struct PodNet {
    inner: Arc<Inner>,
}

struct Inner {
    key: WorkloadKey,
    place: Place,
    agent_ports: Box<[u16]>,
    own: RwLock<BTreeSet<IpAddr>>,
}

enum Place {
    Pod {
        netns: Arc<NetNs>,
        dial_clients: Mutex<HashMap<MapData, u64, ClientAddr>>,
    },
    /// Where unit tests run.
    #[cfg(test)]
    Here,
}

impl PodNet {
    /// For the kernel module, which knows the pod.
    pub(crate) fn new(
        key: WorkloadKey,
        netns: Arc<NetNs>,
        agent_ports: RangeInclusive<u16>,
        dial_clients: HashMap<MapData, u64, ClientAddr>,
    ) -> Self {
        let agent_ports = agent_ports.collect();
        let place = Place::Pod { netns, dial_clients: Mutex::new(dial_clients) };
        Self { inner: Arc::new(Inner { key, place, agent_ports, own: RwLock::default() }) }
    }

    /// The pod's workload.
    pub fn key(&self) -> &WorkloadKey {
        &self.inner.key
    }

    /// A TCP socket inside the pod, non-blocking, for a dial to `to`. It is reset when dropped, until the caller clears
    /// SO_LINGER at the orderly end: a crash of the agent must not look like a clean end of stream.
    pub fn socket(&self, to: SocketAddr) -> io::Result<Socket> {
        let make = || Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP));
        let socket = match &self.inner.place {
            Place::Pod { netns, .. } => netns.enter(make)??,
            #[cfg(test)]
            Place::Here => make()?,
        };
        socket.set_nonblocking(true)?;
        prepare(&socket)?;
        Ok(socket)
    }

    /// Before connecting `socket` to the application: its accept() and getpeername() will show `client`.
    pub fn show_client(&self, socket: &Socket, client: SocketAddr) -> io::Result<()> {
        let dial_clients = match &self.inner.place {
            Place::Pod { dial_clients, .. } => dial_clients,
            #[cfg(test)]
            Place::Here => return Ok(()),
        };
        let cookie = sys::socket_cookie(socket)?;
        let client = ClientAddr { addr: client.ip().into(), port: client.port(), pad: 0 };
        let mut map = dial_clients.lock().unwrap_or_else(PoisonError::into_inner);
        map.insert(cookie, client, 0).map_err(io::Error::other)
    }

    /// True for an address that is configured in the pod, as netlink shows it.
    pub fn is_own(&self, ip: IpAddr) -> bool {
        self.inner.own.read().unwrap_or_else(PoisonError::into_inner).contains(&ip.to_canonical())
    }

    /// True for the ports that the agent's own listeners may have.
    pub fn is_agent_port(&self, port: u16) -> bool {
        self.inner.agent_ports.contains(&port)
    }

    /// A pod of the test's own network namespace.
    #[cfg(test)]
    pub(crate) fn for_test(key: WorkloadKey, own: &[IpAddr], agent_ports: &[u16]) -> Self {
        let agent_ports = agent_ports.into();
        let own = RwLock::new(own.iter().copied().collect());
        Self { inner: Arc::new(Inner { key, place: Place::Here, agent_ports, own }) }
    }

    pub(crate) fn set_own(&self, own: BTreeSet<IpAddr>) {
        *self.inner.own.write().unwrap_or_else(PoisonError::into_inner) = own;
    }
}

/// What every socket of the data path gets: reset on drop, no Nagle delay, and an end to peers that died silently.
/// No TCP_USER_TIMEOUT: the kernel counts a closed window as unanswered, so it kills connections whose reader pauses.
pub fn prepare(socket: &Socket) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(10));
    socket.set_tcp_keepalive(&keepalive.with_retries(6))
}
