//! A minimal Kafka client: five requests over TCP (<https://kafka.apache.org/protocol>).
//!
//! The levels use a client library. The harness does not, so that it observes Kafka independently.
//! The client supports brokers from 3.0 on, without TLS and without authentication.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

/// Time limit of one response. A frozen broker never responds.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit, in the request, for creating or deleting topics.
const OPERATION_TIMEOUT_MS: i32 = 8_000;
/// Interval between requests for metadata until the broker has the controller's change.
const METADATA_POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Upper bound of a response in bytes. If the server is not Kafka, its first bytes may decode to
/// any length.
const MAX_RESPONSE_BYTES: usize = 64 << 20;

/// A broker's metadata of its cluster.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Metadata {
    /// The number of live brokers.
    pub(super) brokers: usize,
    pub(super) topics: Vec<Topic>,
}

/// A topic in a broker's metadata.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Topic {
    pub(super) name: String,
    /// The number of its partitions.
    pub(super) partitions: usize,
    /// Whether each partition has a leader.
    pub(super) led: bool,
}

/// A connection to a broker.
pub(super) struct Connection(TcpStream);

impl Connection {
    /// Connects to the first of these servers that listens: `host:port`, several separated by
    /// commas.
    ///
    /// # Errors
    /// Fails if none listens.
    pub(super) async fn open(servers: &str) -> io::Result<Self> {
        let mut last = io::ErrorKind::AddrNotAvailable.into();
        for server in servers.split(',') {
            match timeout(RESPONSE_TIMEOUT, TcpStream::connect(server.trim())).await {
                Ok(Ok(stream)) => {
                    stream.set_nodelay(true)?;
                    return Ok(Self(stream));
                }
                Ok(Err(error)) => last = error,
                Err(error) => last = error.into(),
            }
        }
        Err(last)
    }

    /// The broker's release, as far as it reports one: the newest metadata version that it
    /// supports.
    ///
    /// # Errors
    /// Fails if the broker does not respond.
    pub(super) async fn version(&mut self) -> io::Result<String> {
        let mut body = Vec::new();
        for text in ["oversold", "0"] {
            // A compact string: the length plus one, then the text.
            body.push(u8::try_from(text.len() + 1).map_err(io::Error::other)?);
            body.extend(text.as_bytes());
        }
        body.push(0);
        let response = self.exchange(Api::Versions, &body).await?;
        let mut response = Response(&response);
        response.error()?;
        for _ in 1..response.varint()? {
            // The supported versions of each request.
            response.take(6)?;
            response.skip_tags()?;
        }
        response.i32()?;
        let mut newest = None;
        for _ in 0..response.varint()? {
            let (tag, size) = (response.varint()?, response.varint()?);
            let mut tagged = Response(response.take(size)?);
            // The broker's supported features are under tag 0.
            if tag != 0 {
                continue;
            }
            for _ in 1..tagged.varint()? {
                let length = tagged.varint()?.saturating_sub(1);
                let feature = tagged.take(length)?;
                let (_, max) = (tagged.i16()?, tagged.i16()?);
                tagged.skip_tags()?;
                if feature == b"metadata.version" {
                    newest = Some(max);
                }
            }
        }
        Ok(match newest {
            Some(20) => "3.8".to_owned(),
            Some(21) => "3.9".to_owned(),
            Some(22..=25) => "4.0".to_owned(),
            Some(26..=27) => "4.1".to_owned(),
            Some(28..) => "4.2 or later".to_owned(),
            Some(_) => "before 3.8".to_owned(),
            None => "of no known version".to_owned(),
        })
    }

    /// The broker's metadata of its cluster.
    ///
    /// # Errors
    /// Fails if the broker does not respond.
    pub(super) async fn metadata(&mut self) -> io::Result<Metadata> {
        // All topics, without automatic creation.
        let mut body = (-1_i32).to_be_bytes().to_vec();
        body.push(0);
        let response = self.exchange(Api::Metadata, &body).await?;
        let mut response = Response(&response);
        response.i32()?;
        let brokers = response.count()?;
        for _ in 0..brokers {
            response.i32()?;
            response.text()?;
            response.i32()?;
            response.text()?;
        }
        response.text()?;
        response.i32()?;
        let mut topics = Vec::new();
        for _ in 0..response.count()? {
            response.i16()?;
            let name = response.text()?;
            response.take(1)?;
            let partitions = response.count()?;
            let mut led = true;
            for _ in 0..partitions {
                response.i16()?;
                let (_, leader) = (response.i32()?, response.i32()?);
                led &= leader >= 0;
                for _ in 0..2 {
                    let replicas = response.count()?;
                    response.take(replicas * size_of::<i32>())?;
                }
            }
            topics.push(Topic { name, partitions, led });
        }
        Ok(Metadata { brokers, topics })
    }

    /// Creates a topic with the cluster's default replication factor, and returns once this
    /// broker's metadata lists its leaders.
    ///
    /// # Errors
    /// Fails if the topic exists, or if the broker rejects the request or does not respond.
    pub(super) async fn create_topic(&mut self, name: &str, partitions: i32) -> io::Result<()> {
        let mut body = 1_i32.to_be_bytes().to_vec();
        push_text(&mut body, name)?;
        body.extend(partitions.to_be_bytes());
        body.extend((-1_i16).to_be_bytes());
        // With the broker's replica assignment and default settings.
        body.extend([0; 8]);
        body.extend(OPERATION_TIMEOUT_MS.to_be_bytes());
        body.push(0);
        let response = self.exchange(Api::CreateTopics, &body).await?;
        let mut response = Response(&response);
        response.i32()?;
        for _ in 0..response.count()? {
            response.text()?;
            response.error()?;
            response.text()?;
        }
        // The controller has answered. The broker's metadata follows a moment later.
        let is_led = |topic: &Topic| topic.name == name && topic.led;
        while !self.metadata().await?.topics.iter().any(is_led) {
            sleep(METADATA_POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Deletes topics with their messages and the groups' committed offsets, and returns once this
    /// broker's metadata no longer lists them. Ignores topics that do not exist.
    ///
    /// # Errors
    /// Fails if the broker rejects the request or does not respond.
    pub(super) async fn delete_topics(&mut self, names: &[String]) -> io::Result<()> {
        const UNKNOWN_TOPIC: i16 = 3;

        let mut body = i32::try_from(names.len())
            .map_err(io::Error::other)?
            .to_be_bytes()
            .to_vec();
        for name in names {
            push_text(&mut body, name)?;
        }
        body.extend(OPERATION_TIMEOUT_MS.to_be_bytes());
        let response = self.exchange(Api::DeleteTopics, &body).await?;
        let mut response = Response(&response);
        response.i32()?;
        for _ in 0..response.count()? {
            response.text()?;
            match response.i16()? {
                0 | UNKNOWN_TOPIC => {}
                code => return Err(refused(code)),
            }
        }
        // As above.
        let is_listed = |topic: &Topic| names.contains(&topic.name);
        while self.metadata().await?.topics.iter().any(is_listed) {
            sleep(METADATA_POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Sends a request and waits for its response.
    async fn exchange(&mut self, api: Api, body: &[u8]) -> io::Result<Vec<u8>> {
        const NUMBER: i32 = 1;

        let (key, version) = api.key_and_version();
        let mut request = vec![0; 4];
        request.extend(key.to_be_bytes());
        request.extend(version.to_be_bytes());
        request.extend(NUMBER.to_be_bytes());
        push_text(&mut request, "oversold")?;
        if matches!(api, Api::Versions) {
            // This version's header may contain tags.
            request.push(0);
        }
        request.extend(body);
        let length = i32::try_from(request.len() - 4).map_err(io::Error::other)?;
        request[..4].copy_from_slice(&length.to_be_bytes());
        let exchange = async {
            self.0.write_all(&request).await?;
            let length = usize::try_from(self.0.read_i32().await?).unwrap_or(usize::MAX);
            if !(4..=MAX_RESPONSE_BYTES).contains(&length) || self.0.read_i32().await? != NUMBER {
                return Err(no_kafka());
            }
            let mut response = vec![0; length - 4];
            self.0.read_exact(&mut response).await?;
            Ok(response)
        };
        timeout(RESPONSE_TIMEOUT, exchange).await?
    }
}

/// The requests of this client.
enum Api {
    Versions,
    Metadata,
    CreateTopics,
    DeleteTopics,
}

impl Api {
    /// The version of each request, which brokers from 3.0 to 4.x support.
    const fn key_and_version(&self) -> (i16, i16) {
        match self {
            Self::Versions => (18, 3),
            Self::Metadata => (3, 4),
            Self::CreateTopics => (19, 2),
            Self::DeleteTopics => (20, 1),
        }
    }
}

/// The unread part of a response.
struct Response<'a>(&'a [u8]);

impl<'a> Response<'a> {
    fn take(&mut self, length: usize) -> io::Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or_else(no_kafka)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| no_kafka())
    }

    fn i16(&mut self) -> io::Result<i16> {
        Ok(i16::from_be_bytes(self.array()?))
    }

    fn i32(&mut self) -> io::Result<i32> {
        Ok(i32::from_be_bytes(self.array()?))
    }

    /// Reads the length of an array.
    fn count(&mut self) -> io::Result<usize> {
        usize::try_from(self.i32()?).map_err(|_| no_kafka())
    }

    /// Reads a string; a null string is empty.
    fn text(&mut self) -> io::Result<String> {
        let length = usize::try_from(self.i16()?).unwrap_or(0);
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }

    fn varint(&mut self) -> io::Result<usize> {
        let mut value = 0;
        for shift in (0..=28).step_by(7) {
            let [byte] = self.array()?;
            value |= usize::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(no_kafka())
    }

    fn skip_tags(&mut self) -> io::Result<()> {
        for _ in 0..self.varint()? {
            self.varint()?;
            let size = self.varint()?;
            self.take(size)?;
        }
        Ok(())
    }

    /// Reads an error code and fails unless it is 0.
    fn error(&mut self) -> io::Result<()> {
        match self.i16()? {
            0 => Ok(()),
            code => Err(refused(code)),
        }
    }
}

fn push_text(to: &mut Vec<u8>, text: &str) -> io::Result<()> {
    to.extend(i16::try_from(text.len()).map_err(io::Error::other)?.to_be_bytes());
    to.extend(text.as_bytes());
    Ok(())
}

fn refused(code: i16) -> io::Error {
    const NOT_AUTHORIZED: [i16; 2] = [29, 31];
    const EXISTS: i16 = 36;
    const NOT_ENOUGH_BROKERS: i16 = 38;

    let kind = match code {
        _ if NOT_AUTHORIZED.contains(&code) => io::ErrorKind::PermissionDenied,
        EXISTS => io::ErrorKind::AlreadyExists,
        NOT_ENOUGH_BROKERS => io::ErrorKind::NotConnected,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, format!("Kafka refused with the error code {code}"))
}

fn no_kafka() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "this is no response of a Kafka broker")
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// The requests that a broker receives when it sends these responses in turn and closes the
    /// connection.
    async fn broker(responses: Vec<Vec<u8>>) -> (String, tokio::task::JoinHandle<Vec<Vec<u8>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it is bound").to_string();
        let serving = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a client connects");
            let mut requests = Vec::new();
            for response in responses {
                let length = stream.read_i32().await.expect("there is a request");
                let mut request = vec![0; usize::try_from(length).expect("it has a length")];
                stream.read_exact(&mut request).await.expect("it is whole");
                requests.push(request);
                stream.write_all(&response).await.expect("the client reads");
            }
            requests
        });
        (address, serving)
    }

    fn framed(body: &[&[u8]]) -> Vec<u8> {
        let body = body.concat();
        let length = i32::try_from(body.len() + 4).expect("it is short").to_be_bytes();
        [&length[..], &1_i32.to_be_bytes(), &body].concat()
    }

    #[tokio::test]
    async fn the_version_comes_from_the_newest_metadata() {
        let feature = |name: &[u8], max: u8| [&[name.len() as u8 + 1], name, &[0, 1, 0, max, 0]].concat();
        let features = [
            &[3][..],
            &feature(b"group.version", 1),
            &feature(b"metadata.version", 27),
        ]
        .concat();
        let response = framed(&[
            &[0, 0, 2, 0, 18, 0, 0, 0, 4, 0, 0, 0, 0, 0],
            // Two tags: a number that the client ignores, and the features.
            &[2, 1, 1, 9, 0, features.len() as u8],
            &features,
        ]);
        let (address, serving) = broker(vec![response]).await;
        let version = Connection::open(&address).await.expect("it listens").version().await;
        assert_eq!(version.expect("it is reported"), "4.1");
        let received = serving.await.expect("the broker does not panic");
        assert_eq!(
            received[0],
            b"\0\x12\0\x03\0\0\0\x01\0\x08oversold\0\x09oversold\x020\0"
        );
    }

    #[tokio::test]
    async fn metadata_lists_brokers_topics_and_whether_they_are_led() {
        let partition = |leader: u8| {
            let leader = if leader == 0 { [255; 4] } else { [0, 0, 0, leader] };
            [
                &[0, 0, 0, 0, 0, 0][..],
                &leader,
                &[0, 0, 0, 1, 0, 0, 0, 1],
                &[0, 0, 0, 0],
            ]
            .concat()
        };
        let response = framed(&[
            &[0, 0, 0, 0, 0, 0, 0, 1],
            b"\0\0\0\x01\0\x01h\0\0\0\x09\xff\xff\0\x02id\0\0\0\x01",
            &[0, 0, 0, 2],
            b"\0\0\0\x01a\0\0\0\0\x02",
            &partition(1),
            &partition(1),
            b"\0\0\0\x01b\0\0\0\0\x01",
            &partition(0),
        ]);
        let (address, _serving) = broker(vec![response]).await;
        let metadata = Connection::open(&address).await.expect("it listens").metadata().await;
        let topic = |name: &str, partitions, led| Topic {
            name: name.to_owned(),
            partitions,
            led,
        };
        let expected = Metadata {
            brokers: 1,
            topics: vec![topic("a", 2, true), topic("b", 1, false)],
        };
        assert_eq!(metadata.expect("it is reported"), expected);
    }

    #[tokio::test]
    async fn topics_are_deleted_once_the_broker_no_longer_lists_them() {
        const METADATA: u8 = 3;
        const DELETE: u8 = 20;
        let deleted = framed(&[&[0, 0, 0, 0, 0, 0, 0, 1], b"\0\x01a\0\0"]);
        let metadata = |topics: &[u8]| {
            let no_brokers = [0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 0, 0, 0, 1];
            framed(&[&no_brokers, topics])
        };
        let listed = b"\0\0\0\x01\0\0\0\x01a\0\0\0\0\0";
        let (address, serving) = broker(vec![deleted, metadata(listed), metadata(&[0; 4])]).await;
        let mut connection = Connection::open(&address).await.expect("it listens");
        connection
            .delete_topics(&["a".to_owned()])
            .await
            .expect("it is deleted");
        drop(connection);
        let received = serving.await.expect("the broker does not panic");
        let requests: Vec<u8> = received.iter().map(|request| request[1]).collect();
        assert_eq!(requests, [DELETE, METADATA, METADATA]);
    }

    #[tokio::test]
    async fn what_is_no_kafka_is_an_error() {
        for response in [
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            vec![],
            vec![0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 0, 0],
            framed(&[&[0, 0, 0, 0, 0, 0, 0, 9]]),
        ] {
            let (address, _serving) = broker(vec![response.clone()]).await;
            let metadata = Connection::open(&address).await.expect("it listens").metadata().await;
            assert!(metadata.is_err(), "{response:?}");
        }
    }

    #[tokio::test]
    async fn a_refusal_has_its_code() {
        let response = framed(&[&[0, 0, 0, 0, 0, 0, 0, 1], b"\0\x01t\0\x24\xff\xff"]);
        let (address, _serving) = broker(vec![response]).await;
        let mut connection = Connection::open(&address).await.expect("it listens");
        let refused = connection.create_topic("t", 1).await.expect_err("it is there already");
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
    }
}
