//! A unique key prefix for each test, and the cleanup of keys that a killed run left on an external
//! server.

use std::{
    collections::HashSet,
    fmt, io,
    net::TcpStream,
    ops::Deref,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use tokio::time::timeout;

use super::{
    Redis, Server,
    resp::{Connection, Endpoint, Reply},
};
use crate::broken_pipe;

/// Time limit for deleting keys, for a server that hangs or is gone.
const DELETE_TIMEOUT: Duration = Duration::from_secs(10);

impl Redis {
    /// Creates a unique prefix. Dropping it deletes the keys that start with it.
    pub fn prefix(&self) -> Prefix {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let run = match &self.server {
            Server::External(owner) => owner.number,
            Server::Managed(_) => 0,
        };
        Prefix {
            // A hash tag: a cluster would keep all keys of a prefix in one slot.
            text: format!("oversold:{{{run}.{number}}}:"),
            endpoint: self.endpoint.clone(),
            wait: matches!(self.server, Server::External(_)),
        }
    }
}

/// The prefix of all keys of a test, such as `oversold:{1.2}:`. Dropping it deletes the keys.
pub struct Prefix {
    text: String,
    endpoint: Endpoint,
    /// Whether the drop waits for the deletion: true if the server outlives this process.
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
        let (endpoint, pattern) = (self.endpoint.clone(), format!("{}*", self.text));
        // In a separate thread and runtime: the drop may happen inside a runtime, at its end, or
        // outside of any.
        let deleting = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let deleting = async {
                let mut connection = endpoint.connect().await?;
                let keys = keys(&mut connection, &pattern).await?;
                delete(&mut connection, keys).await
            };
            runtime.is_ok_and(|runtime| {
                let deleted = runtime.block_on(async { timeout(DELETE_TIMEOUT, deleting).await });
                matches!(deleted, Ok(Ok(())))
            })
        });
        if self.wait && !deleting.join().unwrap_or(false) {
            broken_pipe::notice(format_args!(
                "the keys under {self} could not be deleted; the next run tries again"
            ));
        }
    }
}

/// The registration of this run on an external server: shows other runs that it is alive and which
/// keys are its own.
pub(super) struct ExternalOwner {
    number: u32,
    /// Listed in `CLIENT LIST` under the owner's name as long as this process lives.
    _connection: TcpStream,
}

impl ExternalOwner {
    /// Registers this run, and deletes the keys of runs that were killed.
    pub(super) async fn register(endpoint: &Endpoint) -> io::Result<Self> {
        let number: u32 = rand::random();
        let mut named = endpoint.connect().await?;
        named.obeyed(&["CLIENT", "SETNAME", &client_name(number)]).await?;

        let mut sweeper = endpoint.connect().await?;
        // In this order: a run whose keys are found here is listed below, or has ended.
        let mut abandoned = keys(&mut sweeper, "oversold:{*}:*").await?;
        let alive = match sweeper.obeyed(&["CLIENT", "LIST"]).await? {
            Reply::Bulk(alive) => alive,
            other => return Err(io::Error::other(format!("CLIENT LIST: {other:?}"))),
        };
        let alive: HashSet<&str> = alive
            .split_whitespace()
            .filter_map(|word| word.strip_prefix("name="))
            .collect();
        abandoned.retain(|key| owner_of(key).is_some_and(|number| !alive.contains(client_name(number).as_str())));
        delete(&mut sweeper, abandoned).await?;
        Ok(Self {
            number,
            _connection: named.into_stream()?,
        })
    }
}

fn client_name(number: u32) -> String {
    format!("oversold:{number}")
}

/// The run that owns a key; `None` for a key of no run.
fn owner_of(key: &str) -> Option<u32> {
    let (run, prefix) = key.strip_prefix("oversold:{")?.split_once("}:")?.0.split_once('.')?;
    prefix.parse::<u32>().ok()?;
    run.parse().ok()
}

/// All keys that match a pattern.
async fn keys(connection: &mut Connection, pattern: &str) -> io::Result<HashSet<String>> {
    let mut keys = HashSet::new();
    let mut cursor = "0".to_owned();
    loop {
        let reply = connection
            .obeyed(&["SCAN", &cursor, "MATCH", pattern, "COUNT", "1000"])
            .await?;
        let Reply::Array(reply) = &reply else {
            return Err(io::Error::other(format!("SCAN: {reply:?}")));
        };
        let [Reply::Bulk(next), Reply::Array(found)] = reply.as_slice() else {
            return Err(io::Error::other(format!("SCAN: {reply:?}")));
        };
        keys.extend(found.iter().filter_map(|key| match key {
            Reply::Bulk(key) => Some(key.clone()),
            _ => None,
        }));
        if next == "0" {
            return Ok(keys);
        }
        cursor.clone_from(next);
    }
}

async fn delete(connection: &mut Connection, keys: HashSet<String>) -> io::Result<()> {
    for key in keys {
        connection.obeyed(&["DEL", &key]).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_keys_of_a_run_have_an_owner() {
        for (key, owner) in [
            ("oversold:{7.0}:lock", Some(7)),
            ("oversold:{4294967295.12}:", Some(u32::MAX)),
            ("oversold:{7}:lock", None),
            ("oversold:{seven.0}:lock", None),
            ("oversold:{7.0}lock", None),
            ("undersold:{7.0}:lock", None),
        ] {
            assert_eq!(owner_of(key), owner, "{key}");
        }
    }
}
