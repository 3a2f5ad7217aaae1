//! A client of Kafka in a few lines: five requests over TCP (<https://kafka.apache.org/protocol>).
//!
//! What a level does to Kafka goes through a library. What the suite sees of it does not. It speaks to brokers from 3.0 on, without TLS and
//! without a login.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

/// How long a broker may take for one answer. One that is held still never answers.
const ENGINE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a broker may wait until topics are made or deleted.
const DONE_WITHIN_MS: i32 = 8_000;
/// How long until a broker is asked again whether it has heard from its controller.
const LOOKED_AGAIN_AFTER: Duration = Duration::from_millis(5);
/// More than any answer has that is asked for here. Where something else than Kafka answers, the length is anything.
const LONGEST_ANSWER: usize = 64 << 20;

/// What a broker knows of its cluster.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Metadata {
    /// How many brokers take part.
    pub(super) brokers: usize,
    pub(super) topics: Vec<Topic>,
}

/// A topic, as a broker tells of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Topic {
    pub(super) name: String,
    /// How many partitions it has.
    pub(super) partitions: usize,
    /// Whether each of them has a leader that can be written to.
    pub(super) led: bool,
}

/// A connection to a broker.
pub(super) struct Connection(TcpStream);

impl Connection {
    /// Connects to the first of these that listens: `host:port`, several with commas between them.
    ///
    /// # Errors
    /// None does.
    pub(super) async fn open(servers: &str) -> io::Result<Self> {
        let mut last = io::ErrorKind::AddrNotAvailable.into();
        for server in servers.split(',') {
            match timeout(ENGINE_TIMEOUT, TcpStream::connect(server.trim())).await {
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

    /// The release that it is of, as far as it tells: the newest form of metadata that it understands.
    ///
    /// # Errors
    /// It does not answer.
    pub(super) async fn version(&mut self) -> io::Result<String> {
        let mut body = Vec::new();
        for text in ["oversold", "0"] {
            // A compact string: the length and one, then the text.
            body.push(u8::try_from(text.len() + 1).map_err(io::Error::other)?);
            body.extend(text.as_bytes());
        }
        body.push(0);
        let answer = self.ask(Api::Versions, &body).await?;
        let mut answer = Answer(&answer);
        answer.error()?;
        for _ in 1..answer.varint()? {
            // Which versions of which request it takes.
            answer.take(6)?;
            answer.skip_tags()?;
        }
        answer.i32()?;
        let mut newest = None;
        for _ in 0..answer.varint()? {
            let (tag, size) = (answer.varint()?, answer.varint()?);
            let mut tagged = Answer(answer.take(size)?);
            // What the broker itself can do stands under the tag 0.
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

    /// What it knows of its cluster.
    ///
    /// # Errors
    /// It does not answer.
    pub(super) async fn metadata(&mut self) -> io::Result<Metadata> {
        // All topics, and none is to be made.
        let mut body = (-1_i32).to_be_bytes().to_vec();
        body.push(0);
        let answer = self.ask(Api::Metadata, &body).await?;
        let mut answer = Answer(&answer);
        answer.i32()?;
        let brokers = answer.count()?;
        for _ in 0..brokers {
            answer.i32()?;
            answer.text()?;
            answer.i32()?;
            answer.text()?;
        }
        answer.text()?;
        answer.i32()?;
        let mut topics = Vec::new();
        for _ in 0..answer.count()? {
            answer.i16()?;
            let name = answer.text()?;
            answer.take(1)?;
            let partitions = answer.count()?;
            let mut led = true;
            for _ in 0..partitions {
                answer.i16()?;
                let (_, leader) = (answer.i32()?, answer.i32()?);
                led &= leader >= 0;
                for _ in 0..2 {
                    let replicas = answer.count()?;
                    answer.take(replicas * size_of::<i32>())?;
                }
            }
            topics.push(Topic { name, partitions, led });
        }
        Ok(Metadata { brokers, topics })
    }

    /// Makes a topic, on as many brokers as the cluster's settings say, and returns once this broker tells that it can be written to.
    ///
    /// # Errors
    /// It is there already, or the broker refuses or does not answer.
    pub(super) async fn create_topic(&mut self, name: &str, partitions: i32) -> io::Result<()> {
        let mut body = 1_i32.to_be_bytes().to_vec();
        push_text(&mut body, name)?;
        body.extend(partitions.to_be_bytes());
        body.extend((-1_i16).to_be_bytes());
        // Placed by the broker, and with its settings.
        body.extend([0; 8]);
        body.extend(DONE_WITHIN_MS.to_be_bytes());
        body.push(0);
        let answer = self.ask(Api::CreateTopics, &body).await?;
        let mut answer = Answer(&answer);
        answer.i32()?;
        for _ in 0..answer.count()? {
            answer.text()?;
            answer.error()?;
            answer.text()?;
        }
        // The controller has answered. The broker hears of it a moment later.
        let is_led = |topic: &Topic| topic.name == name && topic.led;
        while !self.metadata().await?.topics.iter().any(is_led) {
            sleep(LOOKED_AGAIN_AFTER).await;
        }
        Ok(())
    }

    /// Deletes topics, with what is in them and what groups have noted about them, and returns once this broker no longer tells of them. One that
    /// is not there is left at that.
    ///
    /// # Errors
    /// The broker refuses or does not answer.
    pub(super) async fn delete_topics(&mut self, names: &[String]) -> io::Result<()> {
        const UNKNOWN_TOPIC: i16 = 3;

        let mut body = i32::try_from(names.len())
            .map_err(io::Error::other)?
            .to_be_bytes()
            .to_vec();
        for name in names {
            push_text(&mut body, name)?;
        }
        body.extend(DONE_WITHIN_MS.to_be_bytes());
        let answer = self.ask(Api::DeleteTopics, &body).await?;
        let mut answer = Answer(&answer);
        answer.i32()?;
        for _ in 0..answer.count()? {
            answer.text()?;
            match answer.i16()? {
                0 | UNKNOWN_TOPIC => {}
                code => return Err(refused(code)),
            }
        }
        // As above.
        let is_told_of = |topic: &Topic| names.contains(&topic.name);
        while self.metadata().await?.topics.iter().any(is_told_of) {
            sleep(LOOKED_AGAIN_AFTER).await;
        }
        Ok(())
    }

    /// Sends a request and waits for its answer.
    async fn ask(&mut self, api: Api, body: &[u8]) -> io::Result<Vec<u8>> {
        const NUMBER: i32 = 1;

        let (key, version) = api.key_and_version();
        let mut request = vec![0; 4];
        request.extend(key.to_be_bytes());
        request.extend(version.to_be_bytes());
        request.extend(NUMBER.to_be_bytes());
        push_text(&mut request, "oversold")?;
        if matches!(api, Api::Versions) {
            // This version has a header that could hold tags.
            request.push(0);
        }
        request.extend(body);
        let length = i32::try_from(request.len() - 4).map_err(io::Error::other)?;
        request[..4].copy_from_slice(&length.to_be_bytes());
        let asking = async {
            self.0.write_all(&request).await?;
            let length = usize::try_from(self.0.read_i32().await?).unwrap_or(usize::MAX);
            if !(4..=LONGEST_ANSWER).contains(&length) || self.0.read_i32().await? != NUMBER {
                return Err(no_kafka());
            }
            let mut answer = vec![0; length - 4];
            self.0.read_exact(&mut answer).await?;
            Ok(answer)
        };
        timeout(ENGINE_TIMEOUT, asking).await?
    }
}

/// The requests that are made here.
enum Api {
    Versions,
    Metadata,
    CreateTopics,
    DeleteTopics,
}

impl Api {
    /// In versions that brokers from 3.0 to 4.x take.
    const fn key_and_version(&self) -> (i16, i16) {
        match self {
            Self::Versions => (18, 3),
            Self::Metadata => (3, 4),
            Self::CreateTopics => (19, 2),
            Self::DeleteTopics => (20, 1),
        }
    }
}

/// What is left of an answer.
struct Answer<'a>(&'a [u8]);

impl<'a> Answer<'a> {
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

    /// How many things follow.
    fn count(&mut self) -> io::Result<usize> {
        usize::try_from(self.i32()?).map_err(|_| no_kafka())
    }

    /// A text; where there is none, an empty one.
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

    /// Reads an error code, which says that there was none.
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
    io::Error::new(io::ErrorKind::InvalidData, "this is no answer of a Kafka broker")
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// What a broker is asked when it sends these answers in turn, and hangs up.
    async fn broker(answers: Vec<Vec<u8>>) -> (String, tokio::task::JoinHandle<Vec<Vec<u8>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it is bound").to_string();
        let serving = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("somebody connects");
            let mut asked = Vec::new();
            for answer in answers {
                let length = stream.read_i32().await.expect("there is a request");
                let mut request = vec![0; usize::try_from(length).expect("it has a length")];
                stream.read_exact(&mut request).await.expect("it is whole");
                asked.push(request);
                stream.write_all(&answer).await.expect("somebody listens");
            }
            asked
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
        let answer = framed(&[
            &[0, 0, 2, 0, 18, 0, 0, 0, 4, 0, 0, 0, 0, 0],
            // Two tags: a number that is not asked for, and the features.
            &[2, 1, 1, 9, 0, features.len() as u8],
            &features,
        ]);
        let (address, serving) = broker(vec![answer]).await;
        let version = Connection::open(&address).await.expect("it listens").version().await;
        assert_eq!(version.expect("it tells"), "4.1");
        let asked = serving.await.expect("it was asked");
        assert_eq!(asked[0], b"\0\x12\0\x03\0\0\0\x01\0\x08oversold\0\x09oversold\x020\0");
    }

    #[tokio::test]
    async fn metadata_tells_brokers_topics_and_whether_they_are_led() {
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
        let answer = framed(&[
            &[0, 0, 0, 0, 0, 0, 0, 1],
            b"\0\0\0\x01\0\x01h\0\0\0\x09\xff\xff\0\x02id\0\0\0\x01",
            &[0, 0, 0, 2],
            b"\0\0\0\x01a\0\0\0\0\x02",
            &partition(1),
            &partition(1),
            b"\0\0\0\x01b\0\0\0\0\x01",
            &partition(0),
        ]);
        let (address, _serving) = broker(vec![answer]).await;
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
        assert_eq!(metadata.expect("it tells"), expected);
    }

    #[tokio::test]
    async fn topics_are_deleted_once_the_broker_no_longer_tells_of_them() {
        const METADATA: u8 = 3;
        const DELETE: u8 = 20;
        let deleted = framed(&[&[0, 0, 0, 0, 0, 0, 0, 1], b"\0\x01a\0\0"]);
        let metadata = |topics: &[u8]| {
            let no_brokers = [0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 0, 0, 0, 1];
            framed(&[&no_brokers, topics])
        };
        let told = b"\0\0\0\x01\0\0\0\x01a\0\0\0\0\0";
        let (address, serving) = broker(vec![deleted, metadata(told), metadata(&[0; 4])]).await;
        let mut connection = Connection::open(&address).await.expect("it listens");
        connection
            .delete_topics(&["a".to_owned()])
            .await
            .expect("it is deleted");
        drop(connection);
        let asked = serving.await.expect("it was asked");
        let requests: Vec<u8> = asked.iter().map(|request| request[1]).collect();
        assert_eq!(requests, [DELETE, METADATA, METADATA]);
    }

    #[tokio::test]
    async fn what_is_no_kafka_is_an_error() {
        for answer in [
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            vec![],
            vec![0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 0, 0],
            framed(&[&[0, 0, 0, 0, 0, 0, 0, 9]]),
        ] {
            let (address, _serving) = broker(vec![answer.clone()]).await;
            let metadata = Connection::open(&address).await.expect("it listens").metadata().await;
            assert!(metadata.is_err(), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn a_refusal_has_its_code() {
        let answer = framed(&[&[0, 0, 0, 0, 0, 0, 0, 1], b"\0\x01t\0\x24\xff\xff"]);
        let (address, _serving) = broker(vec![answer]).await;
        let mut connection = Connection::open(&address).await.expect("it listens");
        let refused = connection.create_topic("t", 1).await.expect_err("it is there already");
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
    }
}
