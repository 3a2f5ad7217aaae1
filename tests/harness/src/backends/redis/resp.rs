//! A minimal Redis client: RESP2 over TCP
//! (<https://redis.io/docs/latest/develop/reference/protocol-spec/>).
//!
//! The levels use a client library. The harness does not, so that it observes Redis independently.

use std::{fmt::Write, io, net::TcpStream as BlockingStream, time::Duration};

use futures_util::future::BoxFuture;
use percent_encoding::percent_decode_str;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::timeout,
};
use url::{Host, Url};

/// Time limit of one reply. A frozen server never replies.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// A reply of Redis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The null reply.
    Nil,
    /// An integer.
    Int(i64),
    /// A bulk string.
    Bulk(String),
    /// An array of replies.
    Array(Vec<Reply>),
    /// A simple string, such as `OK`.
    Status(String),
    /// An error; its first word is the error code.
    Error(String),
}

/// The address of a server, and the credentials and database to use.
#[derive(Clone)]
pub(super) struct Endpoint {
    pub(super) host: String,
    pub(super) port: u16,
    user: Option<String>,
    password: Option<String>,
    database: u32,
}

impl Endpoint {
    /// A server whose default user has this password.
    pub(super) fn with_password(host: &str, port: u16, password: &str) -> Self {
        Self {
            host: host.to_owned(),
            port,
            user: None,
            password: Some(password.to_owned()),
            database: 0,
        }
    }

    /// Parses `redis://[[user]:password@]host[:port][/database]`; `None` for any other text.
    pub(super) fn parse(url: &str) -> Option<Self> {
        const PORT: u16 = 6379;

        let url = Url::parse(url).ok().filter(|url| url.scheme() == "redis")?;
        let decoded = |text: &str| Some(percent_decode_str(text).decode_utf8().ok()?.into_owned());
        let host = match url.host()? {
            Host::Domain(name) => decoded(name)?,
            Host::Ipv4(address) => address.to_string(),
            Host::Ipv6(address) => address.to_string(),
        };
        Some(Self {
            host,
            port: url.port().unwrap_or(PORT),
            user: match url.username() {
                "" => None,
                user => Some(decoded(user)?),
            },
            password: match url.password() {
                None => None,
                Some(password) => Some(decoded(password)?),
            },
            database: match url.path() {
                "" | "/" => 0,
                path => path[1..].parse().ok()?,
            },
        })
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// Fails if the server does not answer; with `PermissionDenied` if it rejects user, password or
    /// database.
    pub(super) async fn connect(&self) -> io::Result<Connection> {
        let connecting = TcpStream::connect((self.host.as_str(), self.port));
        let stream = timeout(REPLY_TIMEOUT, connecting).await??;
        stream.set_nodelay(true)?;
        let mut connection = Connection(BufReader::new(stream));
        if let Some(password) = &self.password {
            match &self.user {
                None => connection.obeyed(&["AUTH", password]).await?,
                Some(user) => connection.obeyed(&["AUTH", user, password]).await?,
            };
        }
        if self.database != 0 {
            let database = self.database.to_string();
            connection.obeyed(&["SELECT", &database]).await?;
        }
        Ok(connection)
    }
}

/// A connection to a server.
pub(super) struct Connection(BufReader<TcpStream>);

impl Connection {
    /// Sends a command and waits for its reply.
    ///
    /// # Errors
    /// Fails if the server is gone, does not reply in time, or does not speak RESP2.
    pub(super) async fn command(&mut self, words: &[impl AsRef<str>]) -> io::Result<Reply> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words.iter().map(AsRef::as_ref) {
            write!(request, "${}\r\n{word}\r\n", word.len()).map_err(io::Error::other)?;
        }
        let exchange = async {
            self.0.get_mut().write_all(request.as_bytes()).await?;
            self.reply().await
        };
        timeout(REPLY_TIMEOUT, exchange).await?
    }

    /// Sends a command and treats an error reply as a failure.
    ///
    /// # Errors
    /// As [`command`](Self::command); an error reply is `PermissionDenied`.
    pub(super) async fn obeyed(&mut self, words: &[impl AsRef<str>]) -> io::Result<Reply> {
        match self.command(words).await? {
            Reply::Error(refusal) => Err(io::Error::new(io::ErrorKind::PermissionDenied, refusal)),
            reply => Ok(reply),
        }
    }

    /// The TCP stream, which stays open without a runtime.
    pub(super) fn into_stream(self) -> io::Result<BlockingStream> {
        self.0.into_inner().into_std()
    }

    fn reply(&mut self) -> BoxFuture<'_, io::Result<Reply>> {
        Box::pin(async move {
            let mut line = String::new();
            if self.0.read_line(&mut line).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let line = line.strip_suffix("\r\n").ok_or_else(|| no_resp(&line))?;
            let rest = line.get(1..).unwrap_or_default();
            let number = || rest.parse::<i64>().map_err(|_| no_resp(line));
            Ok(match line.as_bytes().first() {
                Some(b'+') => Reply::Status(rest.to_owned()),
                Some(b'-') => Reply::Error(rest.to_owned()),
                Some(b':') => Reply::Int(number()?),
                Some(b'$') => match usize::try_from(number()?) {
                    Err(_) => Reply::Nil,
                    Ok(length) => {
                        let mut value = vec![0; length + 2];
                        self.0.read_exact(&mut value).await?;
                        value.truncate(length);
                        Reply::Bulk(String::from_utf8(value).map_err(|_| no_resp("a value that is not UTF-8"))?)
                    }
                },
                Some(b'*') => match usize::try_from(number()?) {
                    Err(_) => Reply::Nil,
                    Ok(length) => {
                        let mut replies = Vec::new();
                        for _ in 0..length {
                            replies.push(self.reply().await?);
                        }
                        Reply::Array(replies)
                    }
                },
                _ => return Err(no_resp(line)),
            })
        })
    }
}

fn no_resp(what: &str) -> io::Error {
    let what = what.trim_end();
    io::Error::new(io::ErrorKind::InvalidData, format!("not understood as RESP2: {what}"))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn a_url_names_host_user_password_and_database() {
        let parsed = |url: &str| {
            let endpoint = Endpoint::parse(url)?;
            Some((
                endpoint.host,
                endpoint.port,
                endpoint.user,
                endpoint.password,
                endpoint.database,
            ))
        };
        let text = |text: &str| Some(text.to_owned());
        for (url, endpoint) in [
            ("redis://cache", ("cache", 6379, None, None, 0)),
            ("redis://127.0.0.1:7000/2", ("127.0.0.1", 7000, None, None, 2)),
            ("redis://:s3%40cret@[::1]/", ("::1", 6379, None, text("s3@cret"), 0)),
            ("redis://me:s3cret@db:1", ("db", 1, text("me"), text("s3cret"), 0)),
        ] {
            let (host, port, user, password, database) = endpoint;
            assert_eq!(
                parsed(url),
                Some((host.to_owned(), port, user, password, database)),
                "{url}"
            );
        }
        for url in ["", "cache:6379", "rediss://cache", "redis://cache/first", "redis:///1"] {
            assert_eq!(parsed(url), None, "{url}");
        }
    }

    #[tokio::test]
    async fn every_kind_of_reply_is_understood() {
        let bulk = |text: &str| Reply::Bulk(text.to_owned());
        for (sent, reply) in [
            ("+OK\r\n", Reply::Status("OK".to_owned())),
            ("-ERR no\r\n", Reply::Error("ERR no".to_owned())),
            (":-2\r\n", Reply::Int(-2)),
            ("$-1\r\n", Reply::Nil),
            ("*-1\r\n", Reply::Nil),
            ("$0\r\n\r\n", bulk("")),
            ("$6\r\na\r\nb\r\n\r\n", bulk("a\r\nb\r\n")),
            (
                "*3\r\n:1\r\n*1\r\n$1\r\nx\r\n$-1\r\n",
                Reply::Array(vec![Reply::Int(1), Reply::Array(vec![bulk("x")]), Reply::Nil]),
            ),
        ] {
            assert_eq!(reply_to_ping(sent).await.expect(sent), reply);
        }
        for sent in ["", "+OK", "HTTP/1.1 400 Bad Request\r\n", "$x\r\n"] {
            assert!(reply_to_ping(sent).await.is_err(), "{sent}");
        }
    }

    /// The client's result for a server that sends these bytes and closes the connection.
    async fn reply_to_ping(sent: &'static str) -> io::Result<Reply> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let endpoint = Endpoint::parse(&format!("redis://{}", listener.local_addr()?)).expect("it is a URL");
        let serving = async {
            let (mut stream, _) = listener.accept().await?;
            let mut request = [0; 14];
            stream.read_exact(&mut request).await?;
            assert_eq!(&request, b"*1\r\n$4\r\nPING\r\n");
            stream.write_all(sent.as_bytes()).await
        };
        let exchange = async { endpoint.connect().await?.command(&["PING"]).await };
        let (served, reply) = tokio::join!(serving, exchange);
        served?;
        reply
    }
}
