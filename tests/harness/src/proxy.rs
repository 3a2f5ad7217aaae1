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
    cut: watch::Sender<Cut>,
    counted: Arc<Counted>,
    accepting: AbortHandle,
}

/// What does not get through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Everything does.
    Nothing,
    /// A connection ends, now or later, as soon as its client has said this word near its beginning, such as `SUBSCRIBE`.
    Saying(&'static str),
    /// A connection whose client has said this word goes silent, for good: nothing gets through either way any more, and nobody hangs up. An empty
    /// word is said by everybody.
    Silence(&'static str),
    /// Everything does, later by so much. What a client has said by then arrives together.
    Slow(Duration),
    /// Every connection ends, and whoever comes is turned away.
    Everything,
}

#[derive(Default)]
struct Counted {
    to_server: AtomicU64,
    cut: AtomicU64,
    silenced: AtomicU64,
    in_vain: AtomicU64,
}

impl Proxy {
    /// Stands before the server at this address.
    ///
    /// # Errors
    /// There is no port to be had.
    pub async fn before(server: String) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let (cut, cuts) = watch::channel(Cut::Nothing);
        let counted = Arc::<Counted>::default();
        let accepting = tokio::spawn(accept(listener, server, cuts, counted.clone())).abort_handle();
        Ok(Self {
            port,
            cut,
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
    pub fn instead_of(&self, url: &str) -> String {
        let mut url = url::Url::parse(url).expect("a URL");
        url.set_host(Some("127.0.0.1")).expect("a URL with a host");
        url.set_port(Some(self.port)).expect("a URL with a port");
        url.into()
    }

    /// Whether somebody's connection was cut or fell silent.
    pub fn has_struck(&self) -> bool {
        self.connections_cut() + self.connections_silenced() > 0
    }

    /// From here on this does not get through, also on the connections that are there. [`Cut::Nothing`] mends it.
    pub fn cuts(&self, cut: Cut) {
        self.cut.send_replace(cut);
    }

    /// Bytes that clients have sent and that went on to the server.
    pub fn bytes_to_server(&self) -> u64 {
        self.counted.to_server.load(Relaxed)
    }

    /// Connections that were cut or turned away.
    pub fn connections_cut(&self) -> u64 {
        self.counted.cut.load(Relaxed)
    }

    /// Connections that went silent.
    pub fn connections_silenced(&self) -> u64 {
        self.counted.silenced.load(Relaxed)
    }

    /// How often a client has said something on a connection that was silent by then.
    pub fn said_in_vain(&self) -> u64 {
        self.counted.in_vain.load(Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, server: String, cuts: watch::Receiver<Cut>, counted: Arc<Counted>) {
    while let Ok((client, _)) = listener.accept().await {
        let (server, cuts, counted) = (server.clone(), cuts.clone(), counted.clone());
        tokio::spawn(async move {
            let turned_away = *cuts.borrow() == Cut::Everything;
            if !turned_away && let Ok(server) = TcpStream::connect(server).await {
                // What is small must not wait for more.
                let _ = (client.set_nodelay(true), server.set_nodelay(true));
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                let silent = AtomicBool::new(false);
                tokio::select! {
                    () = forth(from_client, to_server, cuts, &counted, &silent) => {}
                    () = back(from_server, to_client, &silent) => {}
                }
            } else {
                counted.cut.fetch_add(1, Relaxed);
            }
        });
    }
}

/// What the client says, until one of both closes or it is cut; or until the proxy is gone.
async fn forth(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut cuts: watch::Receiver<Cut>,
    counted: &Counted,
    silent: &AtomicBool,
) {
    let mut beginning = Vec::new();
    let mut buffer = vec![0; BEGINNING];
    let mut unsent = 0;
    loop {
        let has_said =
            |word: &str| word.is_empty() || beginning.windows(word.len()).any(|said| said == word.as_bytes());
        let is_cut = match *cuts.borrow_and_update() {
            Cut::Nothing | Cut::Slow(_) => false,
            Cut::Saying(word) => has_said(word),
            Cut::Silence(word) => {
                if has_said(word) && !silent.swap(true, Relaxed) {
                    counted.silenced.fetch_add(1, Relaxed);
                }
                false
            }
            Cut::Everything => true,
        };
        if is_cut {
            counted.cut.fetch_add(1, Relaxed);
            return;
        }
        // Only after that, or the server would hear what is to be cut.
        if silent.load(Relaxed) {
            counted.in_vain.fetch_add(u64::from(unsent > 0), Relaxed);
        } else if to.write_all(&buffer[..unsent]).await.is_err() {
            return;
        } else {
            counted.to_server.fetch_add(unsent as u64, Relaxed);
        }
        unsent = 0;
        tokio::select! {
            changed = cuts.changed() => if changed.is_err() {
                return;
            },
            read = from.read(&mut buffer) => {
                let Ok(mut length @ 1..) = read else { return };
                let slow = match *cuts.borrow() {
                    Cut::Slow(by) => Some(by),
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
async fn back(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, silent: &AtomicBool) {
    let mut buffer = vec![0; BEGINNING];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if !silent.load(Relaxed) && to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
