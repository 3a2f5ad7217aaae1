//! A TCP proxy in front of a server, which counts traffic and injects network faults.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp::OwnedReadHalf, tcp::OwnedWriteHalf},
    sync::watch,
    task::AbortHandle,
    time::{Instant, timeout_at},
};

use crate::until;

/// The number of bytes from the start of a connection that are searched for a fault's word.
const BEGINNING: usize = 16 * 1024;

/// Forwards TCP connections to a server, subject to a [`Fault`]. Dropping it closes all its
/// connections.
pub struct Proxy {
    port: u16,
    fault: watch::Sender<Fault>,
    counted: Arc<Counted>,
    accepting: AbortHandle,
}

/// A network fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Forwards everything.
    None,
    /// Closes a connection once its client has sent this word near the start, such as `SUBSCRIBE`.
    CloseOn(&'static str),
    /// Discards all bytes in both directions, for good and without closing, on a connection whose
    /// client has sent this word. That the server closes it is discarded, too. The empty word matches every connection.
    Blackhole(&'static str),
    /// Delays what clients send by this time, and forwards what has arrived by then in one piece.
    Delay(Duration),
    /// Closes every connection, and rejects new ones.
    CloseAll,
}

#[derive(Default)]
struct Counted {
    to_server: AtomicU64,
    closed: AtomicU64,
    blackholed: AtomicU64,
    discarded: AtomicU64,
    /// Connections that are open and not blackholed.
    forwarding: AtomicU64,
}

impl Proxy {
    /// Starts a proxy in front of the server at this address.
    ///
    /// # Errors
    /// Fails if no port is free.
    pub async fn before(server: String) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let (fault, faults) = watch::channel(Fault::None);
        let counted = Arc::<Counted>::default();
        let accepting = tokio::spawn(accept(listener, server, faults, counted.clone())).abort_handle();
        Ok(Self {
            port,
            fault,
            counted,
            accepting,
        })
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A URL of the server, such as a `DATABASE_URL`, with host and port replaced by the proxy's.
    ///
    /// # Panics
    /// Panics unless `url` is the URL of a server.
    pub fn url_through(&self, url: &str) -> String {
        let mut url = url::Url::parse(url).expect("a URL");
        url.set_host(Some("127.0.0.1")).expect("a URL with a host");
        url.set_port(Some(self.port)).expect("a URL with a port");
        url.into()
    }

    /// Whether the fault has closed or blackholed any connection.
    pub fn has_struck(&self) -> bool {
        self.connections_closed() + self.connections_blackholed() > 0
    }

    /// Injects a fault on all connections, open ones included. [`Fault::None`] removes it.
    pub fn inject(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }

    /// Blackholes all connections that are open, as a firewall does that has forgotten them. New
    /// ones are forwarded again. Returns their number.
    ///
    /// # Panics
    /// Panics if it takes too long.
    pub async fn silence_open_connections(&self) -> u64 {
        let before = self.connections_blackholed();
        self.inject(Fault::Blackhole(""));
        until("the connections are silent", async || self.open_connections() == 0).await;
        self.inject(Fault::None);
        self.connections_blackholed() - before
    }

    /// The number of connections that are open and not blackholed.
    pub fn open_connections(&self) -> u64 {
        self.counted.forwarding.load(Relaxed)
    }

    /// The number of bytes forwarded to the server.
    pub fn bytes_to_server(&self) -> u64 {
        self.counted.to_server.load(Relaxed)
    }

    /// The number of connections that were closed or rejected.
    pub fn connections_closed(&self) -> u64 {
        self.counted.closed.load(Relaxed)
    }

    /// The number of connections that were blackholed.
    pub fn connections_blackholed(&self) -> u64 {
        self.counted.blackholed.load(Relaxed)
    }

    /// The number of chunks that clients sent on blackholed connections.
    pub fn chunks_discarded(&self) -> u64 {
        self.counted.discarded.load(Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, server: String, faults: watch::Receiver<Fault>, counted: Arc<Counted>) {
    while let Ok((client, _)) = listener.accept().await {
        let (server, faults, counted) = (server.clone(), faults.clone(), counted.clone());
        tokio::spawn(async move {
            let turned_away = *faults.borrow() == Fault::CloseAll;
            if !turned_away && let Ok(server) = TcpStream::connect(server).await {
                // Small writes must not wait for more (Nagle's algorithm).
                let _ = (client.set_nodelay(true), server.set_nodelay(true));
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                let silent = AtomicBool::new(false);
                counted.forwarding.fetch_add(1, Relaxed);
                tokio::select! {
                    () = client_to_server(from_client, to_server, faults, &counted, &silent) => {}
                    () = server_to_client(from_server, to_client, &silent) => {}
                }
                if !silent.load(Relaxed) {
                    counted.forwarding.fetch_sub(1, Relaxed);
                }
            } else {
                counted.closed.fetch_add(1, Relaxed);
            }
        });
    }
}

/// Forwards what the client sends, until either side closes, a fault closes the connection, or the
/// proxy is dropped.
async fn client_to_server(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut faults: watch::Receiver<Fault>,
    counted: &Counted,
    silent: &AtomicBool,
) {
    let mut beginning = Vec::new();
    let mut buffer = vec![0; BEGINNING];
    let mut unsent = 0;
    loop {
        let has_sent =
            |word: &str| word.is_empty() || beginning.windows(word.len()).any(|window| window == word.as_bytes());
        let is_closed = match *faults.borrow_and_update() {
            Fault::None | Fault::Delay(_) => false,
            Fault::CloseOn(word) => has_sent(word),
            Fault::Blackhole(word) => {
                if has_sent(word) && !silent.swap(true, Relaxed) {
                    counted.blackholed.fetch_add(1, Relaxed);
                    counted.forwarding.fetch_sub(1, Relaxed);
                }
                false
            }
            Fault::CloseAll => true,
        };
        if is_closed {
            counted.closed.fetch_add(1, Relaxed);
            return;
        }
        // Only after the fault check, or the server would receive what the fault is to stop.
        if silent.load(Relaxed) {
            counted.discarded.fetch_add(u64::from(unsent > 0), Relaxed);
        } else if to.write_all(&buffer[..unsent]).await.is_err() {
            return;
        } else {
            counted.to_server.fetch_add(unsent as u64, Relaxed);
        }
        unsent = 0;
        tokio::select! {
            changed = faults.changed() => if changed.is_err() {
                return;
            },
            read = from.read(&mut buffer) => {
                let Ok(mut length @ 1..) = read else { return };
                let slow = match *faults.borrow() {
                    Fault::Delay(by) => Some(by),
                    _ => None,
                };
                if let Some(by) = slow {
                    let by = Instant::now() + by;
                    while let Ok(Ok(more @ 1..)) = timeout_at(by, from.read(&mut buffer[length..])).await {
                        length += more;
                    }
                }
                unsent = length;
                let room = BEGINNING - beginning.len();
                beginning.extend_from_slice(&buffer[..length.min(room)]);
            },
        }
    }
}

/// Forwards what the server sends.
async fn server_to_client(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, silent: &AtomicBool) {
    let mut buffer = vec![0; BEGINNING];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if !silent.load(Relaxed) && to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
    if silent.load(Relaxed) {
        // The client does not learn that the server has closed the connection.
        pending().await
    }
}
