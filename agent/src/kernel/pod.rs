//! Enrolling one pod, keeping it captured, and letting it go, each in the order that never lets a captured byte out in
//! plaintext.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::{fs, net};

use sealane_common::keys::{
    AGENT_MARK, CAPTURE, GUARD, INBOUND, ListenerKey, MARK, MODE_DISABLED, MODE_PERMISSIVE, MODE_STRICT, OUTBOUND,
    PodAddr, PodEntry, PodPort, PodRecord, PodRules,
};
use sealane_common::names::MAX_POD_PORTS;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc;

use super::diag::{self, TcpSocket};
use super::netns::NetNs;
use super::route::{Network, Routes};
use super::{Kernel, KernelError, Writer, cgroup, links, map_error, maps, sysctl};
use crate::podnet::PodNet;
use crate::snapshot::Listener;
use crate::sys;
use crate::workload::{Mode, Workload, WorkloadKey};

/// Deep enough for a burst while the agent is busy; the kernel clamps it to net.core.somaxconn.
const BACKLOG: i32 = 4096;
/// Listeners of one pod from before its enrolment; the map is the whole node's.
const MAX_BEFORE: usize = 512;
/// Rounds of destroying a pod's captured sockets until none is left.
const MAX_ATTEMPTS: usize = 10;

/// An enrolled pod, as the control task holds it.
pub struct Pod {
    /// Number of this enrolment in the maps.
    pub id: u32,
    /// The data path's view.
    pub net: PodNet,
    netns: Arc<NetNs>,
    routes: Routes,
    network: Network,
    workload: Workload,
}

/// Sockets of an enrolled pod that the capture does not cover.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Uncovered {
    /// Neither captured nor the agent's: from before the enrolment, or with an end that is not the mesh's.
    pub plaintext_sockets: usize,
    /// Made outside `capture.cgroup`.
    pub foreign_sockets: usize,
}

impl Pod {
    /// Takes over a changed configuration.
    pub fn follow(&mut self, workload: &Workload) {
        self.workload = workload.clone();
    }

    /// Inode of its netns.
    pub fn netns_inode(&self) -> u64 {
        self.netns.inode()
    }
}

/// The agent's two sockets inside a pod.
pub struct PodSockets {
    /// From the network to the application.
    pub inbound: net::TcpListener,
    /// From the application to the mesh; transparent.
    pub outbound: net::TcpListener,
}

impl Kernel {
    /// True where the netns is captured, by this agent or one before it.
    pub fn is_captured(&self, netns: &Path) -> bool {
        self.entry(netns).is_some_and(|entry| entry.flags & CAPTURE != 0)
    }

    /// True where the listeners of an agent stand in the netns.
    pub fn is_served(&self, netns: &Path) -> bool {
        let served = |pod_id| self.maps.listeners.keys().flatten().any(|key: ListenerKey| key.pod_id == pod_id);
        self.entry(netns).is_some_and(|entry| served(entry.pod_id))
    }

    fn entry(&self, netns: &Path) -> Option<PodEntry> {
        NetNs::open(netns).ok().and_then(|netns| self.maps.pods.get(&netns.cookie(), 0).ok())
    }

    /// Enrols a pod, or takes over one that an agent before has enrolled: listeners, then steering, then the loop, then
    /// capture.
    pub async fn enrol(
        &mut self,
        writer: &Writer,
        workload: &Workload,
        listener: &Listener,
        changes: &mpsc::Sender<u32>,
    ) -> Result<(Pod, PodSockets), KernelError> {
        let failed = |source| KernelError::Netns { path: workload.netns.clone(), source };
        let netns = Arc::new(NetNs::open(&workload.netns).map_err(failed)?);
        if netns.is_home().map_err(failed)? {
            return Err(KernelError::OwnNetns);
        }
        let id = self.pod_id(&netns)?;
        let routes = Routes::open(&netns, changes.clone(), id)?;
        let network = routes.network().await?;
        if !workload.ips.iter().any(|ip| network.addresses.contains(ip)) {
            return Err(KernelError::NoAddress);
        }
        let net = PodNet::new(
            workload.key.clone(),
            Arc::clone(&netns),
            self.capture.ports.clone(),
            maps::dial_clients(&self.dir)?,
        );
        let mut pod = Pod { id, net, netns, routes, network, workload: workload.clone() };
        match self.capture_pod(&mut pod, listener).await {
            Ok(sockets) => Ok((pod, sockets)),
            Err(error) => {
                // A pod that was never captured is left as it was found; one that an earlier agent captured stays so.
                if self.maps.pods.get(&pod.netns.cookie(), 0).is_ok_and(|entry| entry.flags & CAPTURE == 0) {
                    self.release(writer, &pod).await?;
                }
                Err(error)
            }
        }
    }

    async fn capture_pod(&mut self, pod: &mut Pod, listener: &Listener) -> Result<PodSockets, KernelError> {
        let id = pod.id;
        let cookie = pod.netns.cookie();
        let flags = self.maps.pods.get(&cookie, 0).map_or(0, |entry| entry.flags);
        self.write_own(pod)?;
        self.write_rules(pod, listener)?;
        let mut record = self.record(pod)?;
        // Before anything is changed, and again with the old values, also of a change that failed half way.
        self.maps.records.insert(id, record, 0).map_err(map_error("POD_RECORDS"))?;
        let applied = sysctl::apply(&pod.netns, &self.capture.ports, &mut record);
        self.maps.records.insert(id, record, 0).map_err(map_error("POD_RECORDS"))?;
        applied?;
        // Known to sock_ops from here on, so that no listen() is missed between the dump and the callbacks.
        self.maps.pods.insert(cookie, PodEntry { pod_id: id, flags }, 0).map_err(map_error("PODS"))?;
        let counted = self.listening();
        self.count_listeners(pod, &counted)?;

        let sockets = self.listen(pod)?;
        for (direction, socket) in [(INBOUND, &sockets.inbound), (OUTBOUND, &sockets.outbound)] {
            let key = ListenerKey { pod_id: id, direction };
            self.maps.listeners.insert(key, socket.as_raw_fd(), 0).map_err(map_error("LISTENERS"))?;
        }
        links::attach_lookup(&pod.netns, id, &self.dir)?;
        pod.routes.ensure(&pod.network, &pod.workload.ips).await?;
        let entry = PodEntry { pod_id: id, flags: CAPTURE | GUARD };
        self.maps.pods.insert(cookie, entry, 0).map_err(map_error("PODS"))?;
        self.destroy_forbidden(pod, listener)?;
        Ok(sockets)
    }

    /// Writes the pod's modes after a change of policy.
    pub fn update(&mut self, _writer: &Writer, pod: &Pod, listener: &Listener) -> Result<(), KernelError> {
        self.write_rules(pod, listener)?;
        self.destroy_forbidden(pod, listener)?;
        Ok(())
    }

    /// After a change of the pod's addresses, links, rules or routes; true where the pod had undone its own capture.
    pub async fn refresh(&mut self, _writer: &Writer, pod: &mut Pod) -> Result<bool, KernelError> {
        pod.network = pod.routes.network().await?;
        self.write_own(pod)?;
        pod.routes.ensure(&pod.network, &pod.workload.ips).await
    }

    /// What sock_ops has counted, of all pods. To be read before [`Self::count_listeners`]: a listener that closes in between is
    /// then missed by neither, and one that opens is counted twice until the next time, which only keeps a refusal from
    /// happening.
    pub fn listening(&self) -> HashMap<PodPort, i64> {
        self.maps.listening.iter().flatten().collect()
    }

    /// Reconciles the set of listening ports with what the kernel lists. Where it cannot be kept whole (a pod with too many, a
    /// full map), its row is off for the pod.
    pub fn count_listeners(&mut self, pod: &Pod, counted: &HashMap<PodPort, i64>) -> Result<(), KernelError> {
        let mut before: HashMap<PodPort, i64> = HashMap::new();
        for socket in diag::dump(&pod.netns, diag::LISTENING).map_err(|source| KernelError::Diag { source })? {
            *before.entry(PodPort { pod_id: pod.id, port: socket.local.port(), pad: 0 }).or_default() += 1;
        }
        for (key, count) in &mut before {
            *count -= counted.get(key).copied().unwrap_or(0);
        }
        before.retain(|_, count| *count > 0);
        let few = before.len() <= MAX_BEFORE && counted.len() < MAX_POD_PORTS as usize * 3 / 4;
        if !few {
            before.clear();
        }
        let mine = |key: &PodPort| key.pod_id == pod.id;
        let written = maps::converge(&mut self.maps.listening_before, &before, mine);
        let known = u32::from(few && written.is_ok());
        match self.maps.rules.get(&pod.id, 0) {
            Ok(rules) if rules.listening_known != known => {
                let rules = PodRules { listening_known: known, ..rules };
                self.maps.rules.insert(pod.id, rules, 0).map_err(map_error("POD_RULES"))
            }
            _ => Ok(()),
        }
    }

    /// Ids of the pods' cgroups, for [`Self::uncovered`].
    pub fn pods_cgroups(&self) -> HashSet<u64> {
        cgroup::ids_below(&self.capture.cgroup).into_iter().collect()
    }

    /// What the capture does not cover: connections from before the enrolment, and sockets that were made outside the pods'
    /// cgroup (a process that entered the netns, a socket that was passed in).
    pub fn uncovered(&self, pod: &Pod, pods_cgroups: &HashSet<u64>) -> Result<Uncovered, KernelError> {
        let own = |socket: &SocketAddr| socket.ip().is_loopback() || pod.network.addresses.contains(&socket.ip());
        let mut uncovered = Uncovered::default();
        for socket in diag::dump(&pod.netns, diag::LIVE).map_err(|source| KernelError::Diag { source })? {
            let agents = socket.mark & AGENT_MARK != 0 || socket.cgroup.is_some_and(|id| self.is_agents_cgroup(id));
            if agents || (own(&socket.local) && own(&socket.remote)) {
                continue;
            }
            uncovered.plaintext_sockets += usize::from(socket.mark & MARK == 0);
            uncovered.foreign_sockets += usize::from(socket.cgroup.is_some_and(|id| !pods_cgroups.contains(&id)));
        }
        Ok(uncovered)
    }

    fn is_agents_cgroup(&self, id: u64) -> bool {
        id == self.leaf.id() || self.maps.exempt.get(&id, 0).is_ok()
    }

    /// Takes a pod back that was about to leave.
    pub fn capture_on(&mut self, _writer: &Writer, pod: &Pod) -> Result<(), KernelError> {
        let entry = PodEntry { pod_id: pod.id, flags: CAPTURE | GUARD };
        self.maps.pods.insert(pod.netns.cookie(), entry, 0).map_err(map_error("PODS"))
    }

    /// First step of un-enrolment: new connects go the kernel's way; the guard stays while marked sockets live.
    pub fn capture_off(&mut self, _writer: &Writer, pod: &Pod) -> Result<(), KernelError> {
        let entry = PodEntry { pod_id: pod.id, flags: GUARD };
        self.maps.pods.insert(pod.netns.cookie(), entry, 0).map_err(map_error("PODS"))
    }

    /// The pod's captured sockets that can still carry data.
    pub fn captured_sockets(&self, pod: &Pod) -> Result<Vec<TcpSocket>, KernelError> {
        let mut sockets = diag::dump(&pod.netns, diag::LIVE).map_err(|source| KernelError::Diag { source })?;
        sockets.retain(|socket| socket.mark & MARK != 0 && socket.mark & AGENT_MARK == 0);
        Ok(sockets)
    }

    /// Last step of un-enrolment: destroys the captured sockets that are left, and only then lifts the guard and removes
    /// what loops them; the other order would let their next segments out in plaintext.
    pub async fn release(&mut self, writer: &Writer, pod: &Pod) -> Result<(), KernelError> {
        self.capture_off(writer, pod)?;
        // A connect that was marked just before may not have been listed yet.
        for attempt in 0.. {
            let left = self.captured_sockets(pod)?;
            if left.is_empty() && attempt > 0 {
                break;
            }
            if attempt == MAX_ATTEMPTS {
                return Err(KernelError::StillCaptured { sockets: left.len() });
            }
            diag::destroy(&pod.netns, &left).map_err(|source| KernelError::Diag { source })?;
        }
        maps::remove(&mut self.maps.pods, &pod.netns.cookie()).map_err(map_error("PODS"))?;
        remove_link(&links::lookup_path(&self.dir, pod.id))?;
        for direction in [INBOUND, OUTBOUND] {
            // Gone already where the listener has closed.
            let _ = self.maps.listeners.remove(&ListenerKey { pod_id: pod.id, direction });
        }
        pod.routes.remove().await?;
        if let Ok(record) = self.maps.records.get(&pod.id, 0) {
            sysctl::restore(&pod.netns, &self.capture.ports, &record)?;
        }
        self.forget(pod.id)
    }

    /// Removes every map entry of a pod, also of one whose netns is gone.
    pub fn forget(&mut self, id: u32) -> Result<(), KernelError> {
        let none = HashMap::new();
        maps::converge(&mut self.maps.own, &none, |key| key.pod_id == id).map_err(map_error("OWN"))?;
        let none = HashMap::new();
        maps::converge(&mut self.maps.port_modes, &none, |key| key.pod_id == id).map_err(map_error("PORT_MODES"))?;
        let none = HashMap::new();
        maps::converge(&mut self.maps.listening, &none, |key| key.pod_id == id).map_err(map_error("LISTENING"))?;
        maps::converge(&mut self.maps.listening_before, &none, |key| key.pod_id == id)
            .map_err(map_error("LISTENING_BEFORE"))?;
        maps::remove(&mut self.maps.rules, &id).map_err(map_error("POD_RULES"))?;
        remove_link(&links::lookup_path(&self.dir, id))?;
        maps::remove(&mut self.maps.records, &id).map_err(map_error("POD_RECORDS"))
    }

    /// Every enrolment that the maps know, with the path of its netns.
    pub fn enrolled(&self) -> Vec<(u32, PodRecord)> {
        self.maps.records.iter().flatten().collect()
    }

    /// Opens an enrolment that another process made, to let it go. `None` where its netns is gone or another one.
    pub async fn adopt(
        &self,
        id: u32,
        record: &PodRecord,
        key: &WorkloadKey,
    ) -> Result<Option<(Workload, Pod)>, KernelError> {
        let path = Path::new(sysctl::zero_terminated(&record.netns));
        let Some(netns) = NetNs::open(path).ok().filter(|netns| netns.cookie() == record.cookie) else {
            return Ok(None);
        };
        let netns = Arc::new(netns);
        let workload = Workload::nameless(key.clone(), path);
        let (changes, _) = mpsc::channel(1);
        let routes = Routes::open(&netns, changes, id)?;
        let network = routes.network().await?;
        let dial_clients = maps::dial_clients(&self.dir)?;
        let net = PodNet::new(workload.key.clone(), Arc::clone(&netns), self.capture.ports.clone(), dial_clients);
        Ok(Some((workload.clone(), Pod { id, net, netns, routes, network, workload })))
    }

    /// Drops the entry of an enrolment whose netns is gone. One that only has no name any more stays captured: processes may
    /// live on in it.
    pub fn forget_gone(&mut self, _writer: &Writer, id: u32, record: &PodRecord) -> Result<(), KernelError> {
        if links::serves_a_netns(&self.dir, id) {
            return Ok(());
        }
        maps::remove(&mut self.maps.pods, &record.cookie).map_err(map_error("PODS"))?;
        self.forget(id)
    }

    /// The number that the netns has, or a new one: above every number in use. A number is free again only when its record has
    /// gone, which goes last.
    fn pod_id(&self, netns: &NetNs) -> Result<u32, KernelError> {
        if let Ok(entry) = self.maps.pods.get(&netns.cookie(), 0) {
            return Ok(entry.pod_id);
        }
        // An un-enrolment that was cut short has left the record.
        let held = self.maps.records.iter().flatten().find(|(_, record)| record.cookie == netns.cookie());
        if let Some((id, _)) = held {
            return Ok(id);
        }
        let used = self.maps.records.keys().flatten().max().unwrap_or(0);
        used.checked_add(1).ok_or(KernelError::TooManyPods)
    }

    fn record(&self, pod: &Pod) -> Result<PodRecord, KernelError> {
        if let Ok(record) = self.maps.records.get(&pod.id, 0) {
            return Ok(record);
        }
        let mut record = PodRecord {
            cookie: pod.netns.cookie(),
            changed: 0,
            tw_reuse: 0,
            ports: [0; 2],
            reflect: [0; 2],
            reserved: [0; 256],
            netns: [0; 256],
        };
        let path = pod.workload.netns.as_os_str().as_bytes();
        if path.len() >= record.netns.len() {
            return Err(KernelError::NetnsPath { path: pod.workload.netns.clone() });
        }
        record.netns[..path.len()].copy_from_slice(path);
        Ok(record)
    }

    fn write_own(&mut self, pod: &Pod) -> Result<(), KernelError> {
        let own = pod.network.addresses.iter().map(|ip| (PodAddr { pod_id: pod.id, addr: (*ip).into() }, 1)).collect();
        maps::converge(&mut self.maps.own, &own, |key| key.pod_id == pod.id).map_err(map_error("OWN"))?;
        pod.net.set_own(pod.network.addresses.clone());
        Ok(())
    }

    fn write_rules(&mut self, pod: &Pod, listener: &Listener) -> Result<(), KernelError> {
        let port = |port: &u16| PodPort { pod_id: pod.id, port: *port, pad: 0 };
        let modes = listener.ports.iter().map(|(p, rule)| (port(p), mode(rule.mode))).collect();
        // A port that gains or loses its own mode must not meet the wrong default for a moment.
        maps::write(&mut self.maps.port_modes, &modes).map_err(map_error("PORT_MODES"))?;
        let rules = PodRules {
            mode: mode(listener.default.mode),
            agent_port_first: *self.capture.ports.start(),
            agent_port_last: *self.capture.ports.end(),
            listening_known: self.maps.rules.get(&pod.id, 0).map_or(1, |rules| rules.listening_known),
        };
        self.maps.rules.insert(pod.id, rules, 0).map_err(map_error("POD_RULES"))?;
        maps::prune(&mut self.maps.port_modes, &modes, |key| key.pod_id == pod.id).map_err(map_error("PORT_MODES"))
    }

    /// Under STRICT: connections that were accepted in plaintext before, also those still in the application's queue.
    fn destroy_forbidden(&mut self, pod: &Pod, listener: &Listener) -> Result<(), KernelError> {
        let strict = |port: u16| listener.rule(port).mode == Mode::Strict;
        if listener.default.mode != Mode::Strict && !listener.ports.values().any(|rule| rule.mode == Mode::Strict) {
            return Ok(());
        }
        let failed = |source| KernelError::Diag { source };
        let listening: Vec<u16> =
            diag::dump(&pod.netns, diag::LISTENING).map_err(failed)?.iter().map(|socket| socket.local.port()).collect();
        let own = |socket: &SocketAddr| socket.ip().is_loopback() || pod.network.addresses.contains(&socket.ip());
        let mut victims = diag::dump(&pod.netns, diag::LIVE).map_err(failed)?;
        victims.retain(|socket| {
            let accepted =
                listening.contains(&socket.local.port()) && !self.capture.ports.contains(&socket.local.port());
            socket.mark & (MARK | AGENT_MARK) == 0
                && accepted
                && own(&socket.local)
                && !own(&socket.remote)
                && strict(socket.local.port())
        });
        diag::destroy(&pod.netns, &victims).map_err(failed)?;
        Ok(())
    }

    fn listen(&self, pod: &Pod) -> Result<PodSockets, KernelError> {
        let failed = |source| KernelError::Listener { ports: self.capture.ports.clone(), source };
        let inbound = self.listen_on_free_port(pod, false).map_err(failed)?;
        let outbound = self.listen_on_free_port(pod, true).map_err(failed)?;
        Ok(PodSockets { inbound, outbound })
    }

    /// Without SO_REUSEPORT: with it any root process of the pod could join the group and take connections.
    fn listen_on_free_port(&self, pod: &Pod, transparent: bool) -> io::Result<net::TcpListener> {
        let mut last = io::Error::from(io::ErrorKind::AddrInUse);
        for port in self.capture.ports.clone() {
            let socket = pod.netns.enter(|| Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)))??;
            socket.set_nonblocking(true)?;
            // Dual-stack: sk_lookup cannot give an IPv6 SYN to an IPv4 listener.
            socket.set_only_v6(false)?;
            // Accepted sockets inherit the mark. The agent's end of a captured connection carries the capture's bit too: when
            // the application dies silently, the kernel's RST then takes the loop and finds it.
            socket.set_mark(if transparent { MARK | AGENT_MARK } else { AGENT_MARK })?;
            if transparent {
                sys::set_transparent_v6(&socket)?;
            }
            match socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into()) {
                Ok(()) => {
                    socket.listen(BACKLOG)?;
                    return Ok(socket.into());
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }
}

fn mode(mode: Mode) -> u32 {
    match mode {
        Mode::Strict => MODE_STRICT,
        Mode::Permissive => MODE_PERMISSIVE,
        Mode::Disabled => MODE_DISABLED,
    }
}

fn remove_link(path: &Path) -> Result<(), KernelError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::Bpffs { path: path.into(), source: error })
        }
        _ => Ok(()),
    }
}
