//! The TCP sockets of a network namespace: listing and destroying them. sock_diag(7).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_sys::{Socket, SocketAddr as NetlinkAddr};

use super::netns::NetNs;

const NETLINK_SOCK_DIAG: isize = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const INET_DIAG_MARK: u16 = 15;
const INET_DIAG_CGROUP_ID: u16 = 21;
const HEADER: usize = 16;
const SOCKID: usize = 48;
const MESSAGE: usize = 72;

/// TCP states, as bits of a dump's filter.
const TIME_WAIT: u32 = 1 << 6;
const LISTEN: u32 = 1 << 10;
const NEW_SYN_RECV: u32 = 1 << 12;
const ALL: u32 = 0x1fff;
/// Every socket that can still carry data: not listening, not in TIME_WAIT. Half-open requests come along as SYN_RECV.
pub const LIVE: u32 = ALL & !(LISTEN | TIME_WAIT | NEW_SYN_RECV);
/// Listening sockets.
pub const LISTENING: u32 = LISTEN;

/// A TCP socket as the kernel lists it.
#[derive(Clone, Debug)]
pub struct TcpSocket {
    /// Its own end.
    pub local: SocketAddr,
    /// The other end; unspecified for a listener.
    pub remote: SocketAddr,
    /// SO_MARK.
    pub mark: u32,
    /// Id of the cgroup that it was made in, where the kernel says.
    pub cgroup: Option<u64>,
    family: u8,
    id: [u8; SOCKID],
}

/// Lists the sockets in one of `states`.
pub fn dump(netns: &NetNs, states: u32) -> io::Result<Vec<TcpSocket>> {
    let socket = open(netns)?;
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        send(&socket, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family as u8, states, &[0; SOCKID])?;
        receive(&socket, |message| found.extend(parse(message)))?;
    }
    Ok(found)
}

/// Resets the sockets: their owners see ECONNABORTED, their peers a RST. Sockets that are gone by now are skipped.
pub fn destroy<'a>(netns: &NetNs, sockets: impl IntoIterator<Item = &'a TcpSocket>) -> io::Result<usize> {
    let socket = open(netns)?;
    let mut destroyed = 0;
    for victim in sockets {
        send(&socket, SOCK_DESTROY, NLM_F_ACK, victim.family, 0, &victim.id)?;
        match receive(&socket, |_| {}) {
            Ok(()) => destroyed += 1,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(destroyed)
}

fn open(netns: &NetNs) -> io::Result<Socket> {
    netns.enter(|| {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        socket.connect(&NetlinkAddr::new(0, 0))?;
        Ok(socket)
    })?
}

/// `struct inet_diag_req_v2` after a netlink header; linux/inet_diag.h.
fn send(socket: &Socket, kind: u16, flags: u16, family: u8, states: u32, id: &[u8; SOCKID]) -> io::Result<()> {
    let mut request = Vec::with_capacity(HEADER + 8 + SOCKID);
    request.extend_from_slice(&((HEADER + 8 + SOCKID) as u32).to_ne_bytes());
    request.extend_from_slice(&kind.to_ne_bytes());
    request.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(&[family, libc::IPPROTO_TCP as u8, 0, 0]);
    request.extend_from_slice(&states.to_ne_bytes());
    request.extend_from_slice(id);
    socket.send(&request, 0).map(drop)
}

/// Reads up to the end of a dump or to an acknowledgement.
fn receive(socket: &Socket, mut message: impl FnMut(&[u8])) -> io::Result<()> {
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        let mut rest = bytes.as_slice();
        while let Some(length) = u32_at(rest, 0).map(|length| length as usize) {
            let Some(whole) = rest.get(..length).filter(|whole| whole.len() >= HEADER) else { break };
            match u16_at(whole, 4) {
                Some(NLMSG_DONE) => return Ok(()),
                Some(NLMSG_ERROR) => {
                    let code = u32_at(whole, HEADER).map_or(libc::EBADMSG, |code| -(code as i32));
                    return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) };
                }
                _ => message(&whole[HEADER..]),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        }
    }
}

/// `struct inet_diag_msg`, then attributes.
fn parse(message: &[u8]) -> Option<TcpSocket> {
    let id: [u8; SOCKID] = message.get(4..4 + SOCKID)?.try_into().ok()?;
    let family = *message.first()?;
    let port = |at: usize| u16::from_be_bytes([id[at], id[at + 1]]);
    let attributes = message.get(MESSAGE..)?;
    Some(TcpSocket {
        local: SocketAddr::new(address(family, &id[4..20])?, port(0)),
        remote: SocketAddr::new(address(family, &id[20..36])?, port(2)),
        mark: attribute(attributes, INET_DIAG_MARK).and_then(|value| u32_at(value, 0)).unwrap_or(0),
        cgroup: attribute(attributes, INET_DIAG_CGROUP_ID)
            .and_then(|value| Some(u64::from_ne_bytes(value.try_into().ok()?))),
        family,
        id,
    })
}

fn address(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    if i32::from(family) == libc::AF_INET {
        let octets: [u8; 4] = bytes.get(..4)?.try_into().ok()?;
        return Some(Ipv4Addr::from(octets).into());
    }
    let octets: [u8; 16] = bytes.try_into().ok()?;
    Some(Ipv6Addr::from(octets).to_canonical())
}

fn attribute(mut rest: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16_at(rest, 0)?);
        let value = rest.get(4..length)?;
        if u16_at(rest, 2)? == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
