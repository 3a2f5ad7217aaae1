//! The listener, the accept loop, and one HTTP connection.
//!
//! The accept loop is written out because `axum::serve` has no timeout for slow headers, no limit
//! of connections, and no graceful shutdown that closes idle connections.

use std::{io::ErrorKind, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
#[cfg(target_os = "linux")]
use rustix::net::sockopt::set_tcp_user_timeout;
use rustix::process::{Resource, getrlimit};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;
use tracing::Instrument;

use crate::{
    Limits,
    http::{self, App},
};

/// The listen backlog: how many clients may wait to be accepted. A thousand buyers connect at once,
/// and the usual backlog of the kernel is smaller.
const BACKLOG: u32 = 4096;

/// The maximum size of the headers of a request, in bytes.
const MAX_HEADER_BYTES: usize = 32 * 1024;

/// Binds the address and listens. Returns the address that was bound, with the port that the kernel
/// chose for 0.
pub(crate) fn listen(address: SocketAddr) -> std::io::Result<(TcpListener, SocketAddr)> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    // A restarted server can bind its port again at once, despite connections in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    let listener = socket.listen(BACKLOG)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Serves new connections in tasks of `connections` until `stop` is cancelled and the backlog is
/// empty.
pub(crate) async fn accept(listener: TcpListener, app: Arc<App>, stop: CancellationToken, connections: TaskTracker) {
    /// The pause after a failed accept. The usual cause is that no file descriptor is free
    /// (EMFILE).
    const RETRY_DELAY: Duration = Duration::from_millis(50);

    let permits = Arc::new(Semaphore::new(max_connections(app.limits)));
    let (limits, keep_alive, routes) = (app.limits, app.keep_alive, http::routes(app));
    let spawn = |stream: TcpStream, permit: OwnedSemaphorePermit| {
        let serving = serve_connection(stream, routes.clone(), limits, keep_alive, stop.clone(), permit);
        connections.spawn(serving.in_current_span());
    };
    loop {
        let next = async { (permit(&permits).await, listener.accept().await) };
        let (permit, accepted) = tokio::select! {
            // The stop first: an endless stream of new clients must not delay the shutdown.
            biased;
            () = stop.cancelled() => break,
            next = next => next,
        };
        match accepted {
            Ok((stream, _)) => spawn(stream, permit),
            Err(why) => {
                tracing::warn!(%why, "accept failed");
                sleep(RETRY_DELAY).await;
            }
        }
    }
    drain_backlog(listener, &permits, spawn).await;
}

/// At most half of the process's file descriptors: the pool and the trace need some as well.
fn max_connections(limits: Limits) -> usize {
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(files / 2).map_or(limits.connections, |half| half.min(limits.connections))
}

async fn permit(permits: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    let permit = Arc::clone(permits).acquire_owned().await;
    permit.expect("the semaphore is never closed")
}

/// Serves the clients that the kernel connected before the stop: closing the listener would reset
/// them.
///
/// It asks the kernel directly. tokio's `accept` may return `Pending` although a connection is
/// there, if its readiness is stale or the task's cooperative budget is used up.
async fn drain_backlog(
    listener: TcpListener,
    permits: &Arc<Semaphore>,
    spawn: impl Fn(TcpStream, OwnedSemaphorePermit),
) {
    let Ok(listener) = listener.into_std() else { return };
    for _ in 0..BACKLOG {
        let permit = permit(permits).await;
        match listener.accept() {
            Ok((stream, _)) => {
                if stream.set_nonblocking(true).is_ok()
                    && let Ok(stream) = TcpStream::from_std(stream)
                {
                    spawn(stream, permit);
                }
            }
            // This client has disconnected; another may be behind it in the backlog.
            Err(why) if why.kind() == ErrorKind::ConnectionAborted => {}
            Err(_) => break,
        }
    }
}

/// Serves one connection until it is closed by the client, by a timeout, or by the shutdown.
async fn serve_connection(
    stream: TcpStream,
    routes: Router,
    limits: Limits,
    keep_alive: Duration,
    stop: CancellationToken,
    _permit: OwnedSemaphorePermit,
) {
    // A client can't know that the server is shutting down when it sends its next request on a
    // kept-alive connection. So an open connection is served for a grace period; the response then
    // has `Connection: close`.
    let grace_over = async {
        stop.cancelled().await;
        sleep(limits.shutdown_grace).await;
    };
    let mut grace_over = pin!(grace_over);
    // hyper closes a connection at once if `graceful_shutdown` is called before the first read,
    // although a request may be in the socket's buffer.
    tokio::select! {
        biased;
        readable = timeout(keep_alive, stream.readable()) => {
            if !matches!(readable, Ok(Ok(()))) {
                return;
            }
        }
        () = grace_over.as_mut() => return,
    }
    set_socket_options(&stream, limits);
    let in_flight = TaskTracker::new();
    let service = service_fn(|request| in_flight.track_future(routes.clone().oneshot(request)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        // It runs from the end of a response to the end of the next headers: idle connections are closed by it, and so is a client
        // that sends headers slowly.
        .header_read_timeout(keep_alive)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        // The connection first: a request that has arrived is in flight, even if the grace period
        // ends in the same instant.
        biased;
        ended = connection.as_mut() => ended,
        () = grace_over => {
            if in_flight.is_empty() {
                return;
            }
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(why) = ended {
        tracing::debug!(%why, "the connection failed");
    }
}

fn set_socket_options(stream: &TcpStream, limits: Limits) {
    // A response is one small write, which Nagle's algorithm would only delay.
    let _ = stream.set_nodelay(true);
    // Without it, a client that sends requests and never reads the responses would keep its
    // connection for ever.
    #[cfg(target_os = "linux")]
    let _ = set_tcp_user_timeout(
        stream,
        u32::try_from(limits.tcp_user_timeout.as_millis()).unwrap_or(u32::MAX),
    );
    #[cfg(not(target_os = "linux"))]
    let _ = limits;
}
