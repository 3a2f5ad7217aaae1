//! A unique prefix for the topics and groups of each test, and the cleanup of topics that a killed
//! run left on an external cluster.

use std::{
    fmt, io,
    ops::Deref,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::time::timeout;

use super::{Kafka, Server, wire_protocol::Connection};
use crate::broken_pipe;

/// Time limit for deleting topics, for a broker that hangs or is gone.
const DELETE_TIMEOUT: Duration = Duration::from_secs(10);
/// Age in seconds of a run whose topics are deleted; no run lasts as long. Unlike Redis, a broker
/// does not list its clients.
const ABANDONED_AFTER_S: u64 = 24 * 60 * 60;

impl Kafka {
    /// Creates a unique prefix. Dropping it deletes the topics that start with it, and with them
    /// the groups' committed offsets.
    pub fn prefix(&self) -> Prefix {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let run = match &self.server {
            Server::External(run) => run.to_string(),
            Server::Managed(_) => "own".to_owned(),
        };
        Prefix {
            text: format!("oversold-{run}-{number}-"),
            servers: self.servers.clone(),
            wait: matches!(self.server, Server::External(_)),
        }
    }
}

/// The prefix of all topics and groups of a test, such as `oversold-own-2-`. Dropping it deletes
/// the topics.
pub struct Prefix {
    text: String,
    servers: String,
    /// Whether the drop waits for the deletion: true if the broker outlives this process.
    wait: bool,
}

impl Deref for Prefix {
    type Target = str;

    fn deref(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

impl Drop for Prefix {
    fn drop(&mut self) {
        let (servers, prefix) = (self.servers.clone(), self.text.clone());
        // In a separate thread and runtime: the drop may happen inside a runtime, at its end, or
        // outside of any.
        let deleting = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let deleting = async {
                let mut connection = Connection::open(&servers).await?;
                delete(&mut connection, |topic| topic.starts_with(&prefix)).await
            };
            runtime.is_ok_and(|runtime| {
                let deleted = runtime.block_on(async { timeout(DELETE_TIMEOUT, deleting).await });
                matches!(deleted, Ok(Ok(())))
            })
        });
        if self.wait && !deleting.join().unwrap_or(false) {
            broken_pipe::notice(format_args!(
                "the topics under {self} could not be deleted; a run after a day tries again"
            ));
        }
    }
}

/// A run on an external broker: its start in seconds since 1970, and a random number.
pub(super) struct Run {
    began_s: u64,
    number: u32,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:08x}", self.began_s, self.number)
    }
}

impl Run {
    /// Starts a run, and deletes the topics of runs that were killed.
    pub(super) async fn begin(connection: &mut Connection) -> io::Result<Self> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).map_err(io::Error::other)?;
        let began_s = since_1970.as_secs();
        let abandoned = |began: u64| began.saturating_add(ABANDONED_AFTER_S) < began_s;
        timeout(
            DELETE_TIMEOUT,
            delete(connection, |topic| began(topic).is_some_and(abandoned)),
        )
        .await??;
        Ok(Self {
            began_s,
            number: rand::random(),
        })
    }
}

/// The start of the run that owns a topic; `None` for a topic of no run.
fn began(topic: &str) -> Option<u64> {
    let mut words = topic.strip_prefix("oversold-")?.splitn(4, '-');
    let began = words.next()?.parse().ok()?;
    u32::from_str_radix(words.next()?, 16).ok()?;
    words.next()?.parse::<u32>().ok()?;
    words.next().map(|_| began)
}

/// Deletes all topics whose names `which` accepts.
async fn delete(connection: &mut Connection, which: impl Fn(&str) -> bool) -> io::Result<()> {
    let topics = connection.metadata().await?.topics.into_iter();
    let names: Vec<String> = topics.map(|topic| topic.name).filter(|name| which(name)).collect();
    match names.as_slice() {
        [] => Ok(()),
        names => connection.delete_topics(names).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_topics_of_a_run_name_its_start() {
        let run = Run {
            began_s: 1_700_000_000,
            number: 7,
        };
        for (topic, expected) in [
            (format!("oversold-{run}-0-orders"), Some(1_700_000_000)),
            (format!("oversold-{run}-12-orders-dead"), Some(1_700_000_000)),
            ("oversold-own-0-orders".to_owned(), None),
            (format!("oversold-{run}-orders"), None),
            (format!("undersold-{run}-0-orders"), None),
            ("orders".to_owned(), None),
        ] {
            assert_eq!(began(&topic), expected, "{topic}");
        }
    }
}
