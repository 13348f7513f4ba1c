//! Copies both ways between the application and its peer until both directions have ended.
//!
//! Ends travel as they came: a half-close is passed on and the other direction goes on; an error in either direction is
//! an error of the whole, and never turns into an orderly end.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use sealane_common::reason::Reason;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

use super::error::{self, Failure};
use crate::metrics::{Side, Traffic};

/// What one read takes at most, and so what one direction buffers: four TLS records, which is also rustls' own limit of
/// buffered plaintext. Allocated when there is something to read, freed when there is not: an idle connection has none.
const BUFFER: usize = 64 * 1024;

/// Copies until both sides have ended their direction in order; an error names the side that failed.
///
/// A side that fails while it is written to may have sent data or a TLS alert before: that is still read and delivered,
/// then the failure stands.
pub(super) async fn duplex<A, P>(app: &mut A, peer: &mut P, traffic: &Traffic) -> Result<(), Failure>
where
    A: AsyncRead + AsyncWrite + Unpin,
    P: AsyncRead + AsyncWrite + Unpin,
{
    let mut up = Flow::new();
    let mut down = Flow::new();
    poll_fn(|cx| {
        let to_peer = up.poll(cx, app, peer, down.write_failed(), |bytes| traffic.add(Side::App, bytes));
        let to_app = down.poll(cx, peer, app, up.write_failed(), |bytes| traffic.add(Side::Peer, bytes));
        if matches!(to_peer, Poll::Ready(End::ReadFailed)) || matches!(to_app, Poll::Ready(End::ReadFailed)) {
            return Poll::Ready(());
        }
        // The application is gone and its peer does not take what it left: nobody is worth waiting for.
        if down.write_failed() && up.buffer.has_remaining() {
            return Poll::Ready(());
        }
        match (to_peer, to_app) {
            (Poll::Ready(_), Poll::Ready(_)) => Poll::Ready(()),
            (Poll::Pending, _) | (_, Poll::Pending) => Poll::Pending,
        }
    })
    .await;
    verdict(up, down)
}

fn verdict(up: Flow, down: Flow) -> Result<(), Failure> {
    let read_from_app = up.read_error.map(error::app);
    let written_to_peer = up.write_error.map(error::peer);
    let read_from_peer = down.read_error.map(error::peer);
    let written_to_app = down.write_error.map(error::app);
    match (read_from_peer, written_to_peer) {
        // After a failed write the read tells more (an alert), unless it merely saw the end of the broken socket.
        (Some(read), Some(written)) if read.reason == Reason::PeerTruncated => Err(written),
        (Some(failure), _) | (None, Some(failure)) => Err(failure),
        (None, None) => read_from_app.or(written_to_app).map_or(Ok(()), Err),
    }
}

/// One direction.
struct Flow {
    buffer: BytesMut,
    /// Something was written since the last flush; TLS may still hold it.
    unflushed: bool,
    stage: Stage,
    read_error: Option<io::Error>,
    write_error: Option<io::Error>,
}

enum Stage {
    Moving,
    /// The source has ended: the destination has to be told.
    Ending,
    Done,
}

enum End {
    InOrder,
    ReadFailed,
    WriteFailed,
}

impl Flow {
    fn new() -> Self {
        Self { buffer: BytesMut::new(), unflushed: false, stage: Stage::Moving, read_error: None, write_error: None }
    }

    fn write_failed(&self) -> bool {
        self.write_error.is_some()
    }

    /// Where the destination is gone, the source is still read and what it sends discarded: it may be waiting to get that out
    /// before it takes what the other direction has for it, the end included.
    ///
    /// `source_broken`: the other direction failed to write to our source. What it sent before is still moved, but the end
    /// that we then read is not one.
    fn poll<S, D>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut S,
        destination: &mut D,
        source_broken: bool,
        count: impl Fn(usize),
    ) -> Poll<End>
    where
        S: AsyncRead + Unpin,
        D: AsyncWrite + Unpin,
    {
        match self.poll_move(cx, source, destination, source_broken, count) {
            Poll::Ready(End::WriteFailed) => Poll::Ready(self.discard(cx, source)),
            end @ (Poll::Ready(End::InOrder | End::ReadFailed) | Poll::Pending) => end,
        }
    }

    fn discard<S: AsyncRead + Unpin>(&mut self, cx: &mut Context<'_>, source: &mut S) -> End {
        while !matches!(self.stage, Stage::Done) {
            match self.poll_fill(cx, source) {
                Poll::Ready(Ok(0)) => self.stage = Stage::Done,
                Poll::Ready(Ok(_)) => self.buffer.clear(),
                Poll::Ready(Err(error)) => {
                    self.read_error = Some(error);
                    return End::ReadFailed;
                }
                Poll::Pending => break,
            }
        }
        End::WriteFailed
    }

    fn poll_move<S, D>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut S,
        destination: &mut D,
        source_broken: bool,
        count: impl Fn(usize),
    ) -> Poll<End>
    where
        S: AsyncRead + Unpin,
        D: AsyncWrite + Unpin,
    {
        if self.read_error.is_some() {
            return Poll::Ready(End::ReadFailed);
        }
        if self.write_error.is_some() {
            return Poll::Ready(End::WriteFailed);
        }
        loop {
            match self.stage {
                Stage::Moving => {
                    if let Err(error) = ready!(self.poll_drain(cx, destination, &count)) {
                        return Poll::Ready(self.fail_write(error));
                    }
                    match self.poll_fill(cx, source) {
                        Poll::Ready(Ok(0)) => self.stage = Stage::Ending,
                        Poll::Ready(Ok(_)) => {}
                        Poll::Ready(Err(error)) => {
                            self.read_error = Some(error);
                            return Poll::Ready(End::ReadFailed);
                        }
                        Poll::Pending => {
                            if self.unflushed {
                                if let Err(error) = ready!(Pin::new(destination).poll_flush(cx)) {
                                    return Poll::Ready(self.fail_write(error));
                                }
                                self.unflushed = false;
                            }
                            return Poll::Pending;
                        }
                    }
                }
                Stage::Ending if source_broken => self.stage = Stage::Done,
                Stage::Ending => {
                    if let Err(error) = ready!(Pin::new(&mut *destination).poll_shutdown(cx)) {
                        return Poll::Ready(self.fail_write(error));
                    }
                    self.stage = Stage::Done;
                }
                Stage::Done => return Poll::Ready(End::InOrder),
            }
        }
    }

    fn poll_drain<D>(
        &mut self,
        cx: &mut Context<'_>,
        destination: &mut D,
        count: &impl Fn(usize),
    ) -> Poll<io::Result<()>>
    where
        D: AsyncWrite + Unpin,
    {
        while self.buffer.has_remaining() {
            let written = ready!(Pin::new(&mut *destination).poll_write(cx, &self.buffer))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.buffer.advance(written);
            self.unflushed = true;
            count(written);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_fill<S>(&mut self, cx: &mut Context<'_>, source: &mut S) -> Poll<io::Result<usize>>
    where
        S: AsyncRead + Unpin,
    {
        self.buffer.reserve(BUFFER);
        let read = pin!(source.read_buf(&mut self.buffer)).poll(cx);
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
        read
    }

    fn fail_write(&mut self, error: io::Error) -> End {
        self.write_error = Some(error);
        self.buffer = BytesMut::new();
        End::WriteFailed
    }
}

#[cfg(test)]
mod tests;
