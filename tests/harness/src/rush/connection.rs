//! A buyer's HTTP/1.1 connection.

use std::{net::SocketAddr, pin::pin};

use anyhow::{Context, ensure};
use futures_util::FutureExt;
use http_body_util::{BodyExt, Full};
use hyper::{
    Request, StatusCode,
    body::Bytes,
    client::conn::http1::{Connection as Driver, SendRequest, handshake},
    header::{HOST, HeaderMap},
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// A connection to one server, for one request at a time.
pub struct Connection {
    address: SocketAddr,
    sender: SendRequest<Full<Bytes>>,
    /// Drives the connection in the task that sends. With its own task, the scheduler would choose
    /// the order in which a buyer's clicks are sent.
    driver: Option<Driver<TokioIo<TcpStream>, Full<Bytes>>>,
}

/// An HTTP response, read to its last byte.
pub struct HttpResponse {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Connection {
    /// Opens a connection.
    ///
    /// # Errors
    /// Fails if no server listens at the address.
    pub async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address)
            .await
            .with_context(|| format!("connecting to {address}"))?;
        stream.set_nodelay(true)?;
        let (sender, driver) = handshake(TokioIo::new(stream)).await?;
        Ok(Self {
            address,
            sender,
            driver: Some(driver),
        })
    }

    /// Opens a connection and requests `/readyz`, so that the first reservation finds connection
    /// and database pool warm.
    pub(super) async fn open_warm(address: SocketAddr) -> anyhow::Result<Self> {
        let mut connection = Self::open(address).await?;
        let answered = connection.send(Request::get("/readyz").body(Full::default())?).await?;
        ensure!(
            answered.status.is_success(),
            "{address} answered /readyz with {}",
            answered.status
        );
        Ok(connection)
    }

    /// Sends a request and reads the whole response.
    ///
    /// # Errors
    /// Fails if the connection ends before the response does.
    pub async fn send(&mut self, mut request: Request<Full<Bytes>>) -> anyhow::Result<HttpResponse> {
        request.headers_mut().insert(HOST, self.address.to_string().parse()?);
        let sender = &mut self.sender;
        let mut exchange = pin!(async move {
            sender.ready().await?;
            let (head, body) = sender.send_request(request).await?.into_parts();
            anyhow::Ok(HttpResponse {
                status: head.status,
                headers: head.headers,
                body: body.collect().await?.to_bytes(),
            })
        });
        if let Some(driver) = &mut self.driver {
            tokio::select! {
                biased;
                answered = &mut exchange => return answered,
                // The server has closed; what it sent before is still to be read.
                _ = driver => self.driver = None,
            }
        }
        exchange.await
    }

    /// Whether the server has closed it.
    pub(super) fn is_closed(&mut self) -> bool {
        if self
            .driver
            .as_mut()
            .is_some_and(|driver| driver.now_or_never().is_some())
        {
            self.driver = None;
        }
        self.driver.is_none()
    }
}
