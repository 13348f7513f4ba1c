//! Packets, and the streams that their segments make.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use etherparse::{NetSlice, SlicedPacket, TransportSlice};

/// One TCP segment or UDP datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source.
    pub src: SocketAddr,
    /// Destination.
    pub dst: SocketAddr,
    /// What it carries.
    pub payload: Vec<u8>,
    /// `None` for UDP.
    pub tcp: Option<Segment>,
}

/// The TCP header's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Sequence number.
    pub seq: u32,
    /// SYN.
    pub syn: bool,
    /// FIN.
    pub fin: bool,
    /// RST.
    pub rst: bool,
}

/// One direction of one TCP connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Source.
    pub src: SocketAddr,
    /// Destination.
    pub dst: SocketAddr,
    /// The bytes in order, each once; zero where missing.
    pub data: Vec<u8>,
    /// How many bytes before the last were not seen.
    pub missing: usize,
    /// A FIN was seen.
    pub fin: bool,
    /// A RST was seen.
    pub rst: bool,
    /// Sequence number of `data[0]`.
    start: u32,
    seen: Vec<bool>,
}

impl Packet {
    /// Reads an Ethernet frame; `None` for anything but whole TCP and UDP over IP.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let packet = SlicedPacket::from_ethernet(frame).ok()?;
        let (src, dst) = match packet.net? {
            NetSlice::Ipv4(ip) => {
                (IpAddr::from(ip.header().source_addr()), IpAddr::from(ip.header().destination_addr()))
            }
            NetSlice::Ipv6(ip) => {
                (IpAddr::from(ip.header().source_addr()), IpAddr::from(ip.header().destination_addr()))
            }
            NetSlice::Arp(_) => return None,
        };
        let (ports, payload, tcp) = match packet.transport? {
            TransportSlice::Tcp(tcp) => {
                let header = Segment { seq: tcp.sequence_number(), syn: tcp.syn(), fin: tcp.fin(), rst: tcp.rst() };
                ((tcp.source_port(), tcp.destination_port()), tcp.payload(), Some(header))
            }
            TransportSlice::Udp(udp) => ((udp.source_port(), udp.destination_port()), udp.payload(), None),
            TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_) | TransportSlice::Igmp(_) => return None,
        };
        let (src, dst) = (SocketAddr::new(src, ports.0), SocketAddr::new(dst, ports.1));
        Some(Self { src, dst, payload: payload.to_vec(), tcp })
    }
}

/// Puts segments together; a SYN with another number begins a new flow between the same ends.
pub fn flows(packets: &[Packet]) -> Vec<Flow> {
    let mut flows: Vec<Flow> = Vec::new();
    let mut latest: HashMap<(SocketAddr, SocketAddr), usize> = HashMap::new();
    for (packet, segment) in packets.iter().filter_map(|packet| Some((packet, packet.tcp?))) {
        let first = if segment.syn { segment.seq.wrapping_add(1) } else { segment.seq };
        let ends = (packet.src, packet.dst);
        let known = latest.get(&ends).copied().filter(|at| !segment.syn || flows[*at].start == first);
        let at = known.unwrap_or_else(|| {
            flows.push(Flow::new(packet.src, packet.dst, first));
            flows.len() - 1
        });
        latest.insert(ends, at);
        flows[at].add(first, segment, &packet.payload);
    }
    for flow in &mut flows {
        flow.missing = flow.seen.iter().filter(|seen| !**seen).count();
    }
    flows
}

impl Flow {
    fn new(src: SocketAddr, dst: SocketAddr, start: u32) -> Self {
        Self { src, dst, data: Vec::new(), missing: 0, fin: false, rst: false, start, seen: Vec::new() }
    }

    fn add(&mut self, first: u32, segment: Segment, payload: &[u8]) {
        self.fin |= segment.fin;
        self.rst |= segment.rst;
        let offset = first.wrapping_sub(self.start) as usize;
        // A keep-alive probe repeats the byte before the next: "negative" where nothing was sent yet. A RST's number and
        // text, if any, are no part of the stream.
        if payload.is_empty() || segment.rst || offset > u32::MAX as usize / 2 {
            return;
        }
        let end = offset + payload.len();
        if self.data.len() < end {
            self.data.resize(end, 0);
            self.seen.resize(end, false);
        }
        self.data[offset..end].copy_from_slice(payload);
        self.seen[offset..end].fill(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(seq: u32, syn: bool, payload: &[u8]) -> Packet {
        let tcp = Some(Segment { seq, syn, fin: false, rst: false });
        let (src, dst) = ("10.0.0.1:1000".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        Packet { src, dst, payload: payload.to_vec(), tcp }
    }

    #[test]
    fn order_repetition_and_wrapping_do_not_matter() {
        let start = u32::MAX - 2;
        let packets = [
            segment(start, true, b""),
            segment(start.wrapping_add(4), false, b"defg"),
            segment(start.wrapping_add(1), false, b"abc"),
            segment(start.wrapping_add(3), false, b"cd"),
            segment(start, false, b"\0"),
        ];
        let [flow] = flows(&packets).try_into().unwrap();
        assert_eq!((flow.data.as_slice(), flow.missing), (b"abcdefg".as_slice(), 0));
    }

    #[test]
    fn a_gap_is_counted_and_a_new_syn_is_a_new_flow() {
        let packets =
            [segment(10, true, b""), segment(14, false, b"x"), segment(10, true, b""), segment(90, true, b"early")];
        let [first, second] = flows(&packets).try_into().unwrap();
        assert_eq!((first.data.as_slice(), first.missing), (b"\0\0\0x".as_slice(), 3));
        assert_eq!((second.data.as_slice(), second.missing), (b"early".as_slice(), 0));
    }
}
