//! The agent's HTTP pages, on a thread and a runtime of their own so that they answer while the data path is busy.
//!
//! `admin.listen` serves everything, `metrics.listen` what a scraper and a probe need. No keys anywhere.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use crate::metrics::Metrics;
use crate::snapshot::Reader;

mod state;

/// Connections of one listener at a time; more wait in the kernel's queue. Scrapers and probes need a handful.
const CONNECTIONS: usize = 32;
/// A connection is closed after this, whatever its client does.
const CONNECTION_TIME: Duration = Duration::from_secs(60);
/// How long a request's header may take.
const HEADER_TIME: Duration = Duration::from_secs(5);
/// After [`Admin::stop`], how long a request may take to arrive on a connection that is open already: a shutdown of hyper's
/// closes one that has not sent anything yet.
const LAST_REQUEST_TIME: Duration = Duration::from_secs(1);
/// After a failed accept call.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where to listen.
#[derive(Clone, Copy, Debug)]
pub struct AdminConfig {
    /// Every page.
    pub listen: SocketAddr,
    /// /metrics, /healthz and /readyz alone.
    pub metrics_listen: Option<SocketAddr>,
}

/// What the pages show.
#[derive(Clone)]
pub struct Providers {
    /// For /state.
    pub snapshots: Reader,
    /// For /metrics.
    pub metrics: Arc<Metrics>,
    /// Why the agent is not ready, one reason a line; empty when it is.
    pub not_ready: Arc<dyn Fn() -> Vec<String> + Send + Sync>,
    /// The pods' enrolment, as /state shows it under `pods`.
    pub pods: Arc<dyn Fn() -> serde_json::Value + Send + Sync>,
}

/// The running pages.
#[derive(Debug)]
pub struct Admin {
    stop: watch::Sender<bool>,
    thread: JoinHandle<()>,
    addrs: Vec<SocketAddr>,
}

/// Binds and serves. SO_REUSEPORT lets a successor bind while its predecessor still answers; the predecessor then calls
/// [`Admin::stop`].
///
/// # Errors
/// Where an address cannot be bound or the thread cannot be started.
pub fn start(config: AdminConfig, providers: Providers) -> io::Result<Admin> {
    let common = || {
        Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
    };
    let all = common().route("/state", get(state)).with_state(providers.clone());
    let mut sites = vec![(bind(config.listen)?, all)];
    if let Some(addr) = config.metrics_listen {
        sites.push((bind(addr)?, common().with_state(providers)));
    }
    let addrs = sites.iter().map(|(listener, _)| listener.local_addr()).collect::<Result<_, _>>()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (stop, stopped) = watch::channel(false);
    let serve = async move {
        let sites = sites.into_iter().map(|(listener, router)| serve(listener, router, stopped.clone()));
        futures_util::future::join_all(sites).await;
    };
    let thread = std::thread::Builder::new().name("admin".into()).spawn(move || runtime.block_on(serve))?;
    Ok(Admin { stop, thread, addrs })
}

impl Admin {
    /// Where it listens: `listen`, then `metrics_listen`.
    pub fn addrs(&self) -> &[SocketAddr] {
        &self.addrs
    }

    /// Closes the listeners, answers what has been accepted, and returns when that is done. Blocks for up to the time that
    /// one connection may last.
    pub fn stop(self) {
        self.stop.send_replace(true);
        if self.thread.join().is_err() {
            tracing::error!("the admin thread panicked");
        }
    }
}

fn bind(addr: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&addr.into())?;
    socket.listen(128)?;
    Ok(socket.into())
}

async fn serve(listener: std::net::TcpListener, router: Router, mut stopped: watch::Receiver<bool>) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "cannot serve the admin pages"),
    };
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            biased;
            _ = stopped.wait_for(|stopped| *stopped) => break,
            accepted = accept(&listener, &permits) => accepted,
        };
        match accepted {
            Ok((stream, permit)) => {
                let (router, stopped) = (router.clone(), stopped.clone());
                tokio::spawn(async move {
                    let _permit = permit;
                    answer(stream, router, stopped).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the admin port");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    // A successor is bound by now; what is already in this listener's queue is still ours to answer. Not by tokio's accept,
    // which asks the kernel only after it has been told of a connection.
    let queued = listener.into_std().into_iter().flat_map(|listener| {
        std::iter::from_fn(move || listener.accept().ok())
            .filter_map(|(stream, _)| stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream)).ok())
    });
    let last: Vec<_> = queued.map(|stream| answer(stream, router.clone(), stopped.clone())).collect();
    futures_util::future::join_all(last).await;
    let _ = permits.acquire_many(CONNECTIONS as u32).await;
}

async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = permits.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, permit))
}

async fn answer(stream: TcpStream, router: Router, mut stopped: watch::Receiver<bool>) {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIME);
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let end = async {
        tokio::select! {
            _ = connection.as_mut() => return,
            _ = stopped.wait_for(|stopped| *stopped) => {}
        }
        if timeout(LAST_REQUEST_TIME, connection.as_mut()).await.is_err() {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    };
    // What goes wrong on one of these connections is its client's business.
    let _ = timeout(CONNECTION_TIME, end).await;
}

async fn readyz(State(providers): State<Providers>) -> Response {
    match (providers.not_ready)().as_slice() {
        [] => "ready\n".into_response(),
        reasons => (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n").into_response(),
    }
}

async fn metrics(State(providers): State<Providers>) -> Response {
    match providers.metrics.encode() {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn state(State(providers): State<Providers>) -> Result<axum::Json<serde_json::Value>, Infallible> {
    let snapshot = providers.snapshots.borrow().clone();
    Ok(axum::Json(state::json(&snapshot, (providers.pods)())))
}

#[cfg(test)]
mod tests;
