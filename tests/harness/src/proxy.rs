//! A proxy before a server: what goes through it is counted, and can be cut.

use std::{
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

/// As much of what a client says is remembered, in bytes.
const BEGINNING: usize = 16 * 1024;

/// Forwards TCP connections to a server, as long as it is let. Ends when it is dropped, with all its connections.
pub struct Proxy {
    port: u16,
    fault: watch::Sender<Fault>,
    counted: Arc<Counted>,
    accepting: AbortHandle,
}

/// What does not get through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Everything does.
    None,
    /// A connection ends, now or later, as soon as its client has said this word near its beginning, such as `SUBSCRIBE`.
    CloseOn(&'static str),
    /// A connection whose client has said this word goes silent, for good: nothing gets through either way any more, and nobody hangs up. An empty
    /// word is said by everybody.
    Blackhole(&'static str),
    /// Everything does, later by so much. What a client has said by then arrives together.
    Delay(Duration),
    /// Every connection ends, and whoever comes is turned away.
    CloseAll,
}

#[derive(Default)]
struct Counted {
    to_server: AtomicU64,
    closed: AtomicU64,
    blackholed: AtomicU64,
    discarded: AtomicU64,
}

impl Proxy {
    /// Stands before the server at this address.
    ///
    /// # Errors
    /// There is no port to be had.
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

    /// Where it listens, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The address of what it stands before, such as a `DATABASE_URL`, with its own place in it.
    ///
    /// # Panics
    /// The address is no URL of a server.
    pub fn url_through(&self, url: &str) -> String {
        let mut url = url::Url::parse(url).expect("a URL");
        url.set_host(Some("127.0.0.1")).expect("a URL with a host");
        url.set_port(Some(self.port)).expect("a URL with a port");
        url.into()
    }

    /// Whether somebody's connection was cut or fell silent.
    pub fn has_struck(&self) -> bool {
        self.connections_closed() + self.connections_blackholed() > 0
    }

    /// From here on this does not get through, also on the connections that are there. [`Fault::None`] mends it.
    pub fn inject(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }

    /// Bytes that clients have sent and that went on to the server.
    pub fn bytes_to_server(&self) -> u64 {
        self.counted.to_server.load(Relaxed)
    }

    /// Connections that were cut or turned away.
    pub fn connections_closed(&self) -> u64 {
        self.counted.closed.load(Relaxed)
    }

    /// Connections that went silent.
    pub fn connections_blackholed(&self) -> u64 {
        self.counted.blackholed.load(Relaxed)
    }

    /// How often a client has said something on a connection that was silent by then.
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
                // What is small must not wait for more.
                let _ = (client.set_nodelay(true), server.set_nodelay(true));
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                let silent = AtomicBool::new(false);
                tokio::select! {
                    () = client_to_server(from_client, to_server, faults, &counted, &silent) => {}
                    () = server_to_client(from_server, to_client, &silent) => {}
                }
            } else {
                counted.closed.fetch_add(1, Relaxed);
            }
        });
    }
}

/// What the client says, until one of both closes or it is cut; or until the proxy is gone.
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
        let has_said =
            |word: &str| word.is_empty() || beginning.windows(word.len()).any(|said| said == word.as_bytes());
        let is_closed = match *faults.borrow_and_update() {
            Fault::None | Fault::Delay(_) => false,
            Fault::CloseOn(word) => has_said(word),
            Fault::Blackhole(word) => {
                if has_said(word) && !silent.swap(true, Relaxed) {
                    counted.blackholed.fetch_add(1, Relaxed);
                }
                false
            }
            Fault::CloseAll => true,
        };
        if is_closed {
            counted.closed.fetch_add(1, Relaxed);
            return;
        }
        // Only after that, or the server would hear what is to be cut.
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

/// What the server says.
async fn server_to_client(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, silent: &AtomicBool) {
    let mut buffer = vec![0; BEGINNING];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if !silent.load(Relaxed) && to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
