//! A proxy before a server: what goes through it is counted, and can be cut.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp::OwnedReadHalf, tcp::OwnedWriteHalf},
    sync::watch,
    task::AbortHandle,
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
    /// Every connection ends, and whoever comes is turned away.
    Everything,
}

#[derive(Default)]
struct Counted {
    to_server: AtomicU64,
    cut: AtomicU64,
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
                tokio::select! {
                    () = forth(from_client, to_server, cuts, &counted) => {}
                    () = back(from_server, to_client) => {}
                }
            } else {
                counted.cut.fetch_add(1, Relaxed);
            }
        });
    }
}

/// What the client says, until one of both closes or it is cut; or until the proxy is gone.
async fn forth(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut cuts: watch::Receiver<Cut>, counted: &Counted) {
    let mut beginning = Vec::new();
    let mut buffer = vec![0; BEGINNING];
    let mut unsent = 0;
    loop {
        let is_cut = match *cuts.borrow_and_update() {
            Cut::Nothing => false,
            Cut::Saying(word) => beginning.windows(word.len()).any(|said| said == word.as_bytes()),
            Cut::Everything => true,
        };
        if is_cut {
            counted.cut.fetch_add(1, Relaxed);
            return;
        }
        // Only after that, or the server would hear what is to be cut.
        if to.write_all(&buffer[..unsent]).await.is_err() {
            return;
        }
        counted.to_server.fetch_add(unsent as u64, Relaxed);
        unsent = 0;
        tokio::select! {
            changed = cuts.changed() => if changed.is_err() {
                return;
            },
            read = from.read(&mut buffer) => {
                let Ok(length @ 1..) = read else { return };
                unsent = length;
                let room = BEGINNING - beginning.len();
                beginning.extend_from_slice(&buffer[..length.min(room)]);
            },
        }
    }
}

async fn back(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
    let _ = tokio::io::copy(&mut from, &mut to).await;
}
