//! The sale over HTTP: an administrator creates it, anybody can read it.

use std::{fmt, net::SocketAddr, str::FromStr};

use anyhow::{Context, bail, ensure};
use box_office::{SaleId, api};
use harness::rush::{Connection, HttpResponse};
use http_body_util::Full;
use hyper::{Request, StatusCode, Uri, header};

/// The address of a server, such as `http://127.0.0.1:8080`.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    name: String,
    port: u16,
}

impl FromStr for Host {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const TAKES: &str = "an address without a path, such as http://127.0.0.1:8080";

        let uri: Uri = text.parse().map_err(|_| TAKES)?;
        match (
            uri.scheme_str(),
            uri.host(),
            uri.path_and_query().map(|path| path.as_str()),
        ) {
            (Some("http"), Some(name), None | Some("/")) => Ok(Self {
                name: name.to_owned(),
                port: uri.port_u16().unwrap_or(80),
            }),
            _ => Err(TAKES),
        }
    }
}

impl From<SocketAddr> for Host {
    fn from(address: SocketAddr) -> Self {
        Self {
            name: address.ip().to_string(),
            port: address.port(),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}", self.name, self.port)
    }
}

impl Host {
    /// Creates a sale with this many tickets.
    pub(crate) async fn open(&self, sale: SaleId, capacity: u32, admin_token: &str) -> anyhow::Result<()> {
        let body = serde_json::to_vec(&api::NewSale {
            name: "the last tickets".to_owned(),
            capacity: capacity.into(),
        })?;
        let request = Request::put(format!("/api/sales/{sale}"))
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::AUTHORIZATION, format!("Bearer {admin_token}"))
            .body(Full::from(body))?;
        let answered = self.send(request).await?;
        match answered.status {
            StatusCode::CREATED => Ok(()),
            StatusCode::OK | StatusCode::CONFLICT => {
                bail!("sale {sale} of {self} is open already: choose another with --sale")
            }
            _ => Err(unexpected("opening the sale", &answered)),
        }
    }

    /// The sale as `GET /api/sales/{id}` shows it.
    pub(crate) async fn sale(&self, sale: SaleId) -> anyhow::Result<api::Sale> {
        let answered = self
            .send(Request::get(format!("/api/sales/{sale}")).body(Full::default())?)
            .await?;
        ensure!(answered.status.is_success(), unexpected("reading the sale", &answered));
        serde_json::from_slice(&answered.body).context("reading the sale")
    }

    /// Its first resolved address.
    pub(crate) async fn address(&self) -> anyhow::Result<SocketAddr> {
        let mut addresses = tokio::net::lookup_host((self.name.trim_matches(['[', ']']), self.port))
            .await
            .with_context(|| format!("looking up {self}"))?;
        addresses.next().with_context(|| format!("{self} has no address"))
    }

    async fn send(&self, request: Request<Full<hyper::body::Bytes>>) -> anyhow::Result<HttpResponse> {
        let mut connection = Connection::open(self.address().await?).await?;
        connection.send(request).await.with_context(|| format!("asking {self}"))
    }
}

fn unexpected(what: &str, answered: &HttpResponse) -> anyhow::Error {
    let body = String::from_utf8_lossy(&answered.body);
    anyhow::anyhow!("{what} was answered with {}: {body}", answered.status)
}
