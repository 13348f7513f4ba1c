//! What passes an interface: every frame, by a packet socket, and the TCP streams in them.

pub mod flow;
pub mod tls;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::netns::Netns;
use crate::wire::flow::{Flow, Packet, flows};

/// More than the largest frame that segmentation offload hands over a veth.
const FRAME: usize = 128 * 1024;
/// Bytes of frames that the kernel may hold while we are not scheduled.
const BACKLOG: usize = 256 * 1024 * 1024;
/// Enough to read it: far more than a gibibyte a second is read.
const BACKLOG_TIME: Duration = Duration::from_secs(1);

/// A running capture; it sees every frame once, whichever way it goes.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<Result<Vec<Vec<u8>>>>>,
}

/// What a capture saw.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// Every IP packet with TCP or UDP in it, in the order seen.
    pub packets: Vec<Packet>,
    /// The TCP streams, one for each direction of each connection.
    pub flows: Vec<Flow>,
}

impl Capture {
    /// Captures on `link` of the namespace; everything sent after the return is seen.
    pub fn start(netns: &Netns, link: &str) -> Result<Self> {
        let (socket, index) = netns.run(|| {
            let raw = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
            Ok((raw, usize::try_from(if_nametoindex(link)?)?))
        })?;
        setsockopt(&socket, sockopt::RcvBufForce, &BACKLOG)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(20))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let reader = std::thread::spawn(move || read(&socket, index, &stopped));
        Ok(Self { stop, reader: Some(reader) })
    }

    /// Ends it; everything sent before the call is in the trace.
    pub fn stop(mut self) -> Result<Trace> {
        let frames = self.end()?;
        let packets: Vec<_> = frames.iter().filter_map(|frame| Packet::parse(frame)).collect();
        let flows = flows(&packets);
        Ok(Trace { packets, flows })
    }

    fn end(&mut self) -> Result<Vec<Vec<u8>>> {
        self.stop.store(true, Ordering::Relaxed);
        let reader = self.reader.take().context("ended already")?;
        reader.join().map_err(|_| anyhow!("the capture panicked"))?
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if self.reader.is_some() {
            let _ = self.end();
        }
    }
}

impl Trace {
    /// True where a TCP stream or a datagram contains the bytes; an error where the capture is not whole, since then their
    /// absence would mean nothing.
    pub fn contains(&self, bytes: &[u8]) -> Result<bool> {
        let found = |data: &[u8]| data.windows(bytes.len()).any(|window| window == bytes);
        if self.flows.iter().any(|flow| found(&flow.data)) || self.packets.iter().any(|packet| found(&packet.payload)) {
            return Ok(true);
        }
        match self.flows.iter().find(|flow| flow.missing > 0) {
            Some(flow) => bail!("the capture lost {} bytes of {} -> {}", flow.missing, flow.src, flow.dst),
            None => Ok(false),
        }
    }

    /// The streams towards this port.
    pub fn to_port(&self, port: u16) -> impl Iterator<Item = &Flow> {
        self.flows.iter().filter(move |flow| flow.dst.port() == port)
    }

    /// The streams from this port.
    pub fn from_port(&self, port: u16) -> impl Iterator<Item = &Flow> {
        self.flows.iter().filter(move |flow| flow.src.port() == port)
    }

    /// How many TCP packets went to or came from this port.
    pub fn packets_of_port(&self, port: u16) -> usize {
        self.packets.iter().filter(|packet| packet.src.port() == port || packet.dst.port() == port).count()
    }
}

fn read(socket: &OwnedFd, index: usize, stop: &AtomicBool) -> Result<Vec<Vec<u8>>> {
    let (mut frames, mut buffer) = (Vec::new(), vec![0; FRAME]);
    let mut stopped: Option<Instant> = None;
    loop {
        // Read before the receive: what was queued before the stop is then still taken, but not for as long as others go on
        // sending.
        let last = stop.load(Ordering::Relaxed);
        if last && stopped.get_or_insert_with(Instant::now).elapsed() > BACKLOG_TIME {
            return Ok(frames);
        }
        match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
            Ok((size, from)) if from.is_some_and(|from| from.ifindex() == index) => {
                frames.push(buffer[..size].to_vec())
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) if last => return Ok(frames),
            Err(Errno::EAGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
