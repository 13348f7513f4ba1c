//! Dialling, from inside the pod's network namespace. No permit, no dial.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use sealane_common::reason::Reason;
use socket2::Socket;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::Pod;
use super::error::{self, Failure};
use crate::metrics::ConnRecord;
use crate::policy::{Candidate, How, InboundPermit, OutboundPermit};

/// Dials the permitted endpoints in order until one answers. The last one's failure is the result.
pub(super) async fn peer<'a>(
    pod: &Pod,
    permit: &'a OutboundPermit,
    time: Duration,
    record: &mut ConnRecord,
) -> Result<(TcpStream, &'a Candidate), Failure> {
    let mut last = Failure::from(Reason::NoEndpoint);
    for candidate in permit.candidates() {
        record.endpoint = Some(candidate.addr());
        // The one plaintext that policy takes for the pod's own stays inside the pod, and nothing else comes back to it.
        let hairpin = matches!(candidate.how(), How::Hairpin);
        if pod.net.is_own(candidate.addr().ip()) != hairpin {
            return Err(Reason::LoopDetected.into());
        }
        match connect(pod, candidate.addr(), time, |_| Ok(())).await {
            Ok(stream) => return Ok((stream, candidate)),
            Err(failure) => last = failure,
        }
    }
    Err(last)
}

/// Dials the application where the client dialled it, never on another address: what listens on loopback alone stays
/// unreachable. The application sees `client` as its peer.
pub(super) async fn app(
    pod: &Pod,
    _permit: &InboundPermit,
    destination: SocketAddr,
    client: SocketAddr,
    time: Duration,
    record: &mut ConnRecord,
) -> Result<TcpStream, Failure> {
    record.endpoint = Some(destination);
    connect(pod, destination, time, |socket| pod.net.show_client(socket, client)).await
}

async fn connect(
    pod: &Pod,
    to: SocketAddr,
    time: Duration,
    prepare: impl FnOnce(&Socket) -> io::Result<()>,
) -> Result<TcpStream, Failure> {
    let socket = pod.net.socket(to).map_err(error::dial)?;
    prepare(&socket).map_err(error::dial)?;
    let began = Instant::now();
    let connect = TcpSocket::from_std_stream(socket.into()).connect(to);
    let stream = timeout(time, connect).await.map_err(|_| Reason::ConnectTimeout)?.map_err(error::dial)?;
    pod.ctx.metrics.connect_seconds.observe(began.elapsed().as_secs_f64());
    Ok(stream)
}
