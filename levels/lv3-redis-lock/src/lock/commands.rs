//! The connection for commands, which all tasks of a process share.
//!
//! redis-rs replaces a connection that breaks. It keeps one that has fallen silent: every command
//! then runs into its time limit, although Redis would answer on a new connection.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use redis::{
    Client, Cmd, Pipeline, RedisFuture, RedisResult, Value,
    aio::{ConnectionLike, ConnectionManager, ConnectionManagerConfig},
};

/// A connection that is replaced when it falls silent.
#[derive(Clone)]
pub(super) struct Commands(Arc<Shared>);

struct Shared {
    client: Client,
    config: ConnectionManagerConfig,
    current: Mutex<ConnectionManager>,
    /// A task is trying to replace it.
    is_replacing: AtomicBool,
}

impl Commands {
    /// Connects.
    ///
    /// # Errors
    /// Redis does not answer.
    pub(super) async fn open(client: Client, config: ConnectionManagerConfig) -> RedisResult<Self> {
        let connection = ConnectionManager::new_with_config(client.clone(), config.clone()).await?;
        Ok(Self(Arc::new(Shared {
            client,
            config,
            current: Mutex::new(connection),
            is_replacing: AtomicBool::new(false),
        })))
    }

    /// This connection, for commands whose order matters: it is not replaced.
    pub(super) fn pinned(&self) -> Self {
        Self(Arc::new(Shared {
            client: self.0.client.clone(),
            config: self.0.config.clone(),
            current: Mutex::new(self.current()),
            is_replacing: AtomicBool::new(true),
        }))
    }

    fn current(&self) -> ConnectionManager {
        let current = self.0.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.clone()
    }

    /// Replaces a connection on which a command timed out, if Redis answers on another one. A Redis
    /// that is slow keeps it: it runs the commands of one connection in order.
    fn check<T>(&self, answer: &RedisResult<T>) {
        let timed_out = answer.as_ref().is_err_and(|why| why.is_timeout());
        if !timed_out || self.0.is_replacing.swap(true, Relaxed) {
            return;
        }
        let shared = self.0.clone();
        tokio::spawn(async move {
            let answering = async {
                let mut new = ConnectionManager::new_with_config(shared.client.clone(), shared.config.clone()).await?;
                Cmd::ping().exec_async(&mut new).await?;
                RedisResult::Ok(new)
            };
            if let Ok(new) = answering.await {
                tracing::warn!("the connection to Redis fell silent and is replaced");
                *shared.current.lock().unwrap_or_else(PoisonError::into_inner) = new;
            }
            shared.is_replacing.store(false, Relaxed);
        });
    }
}

impl ConnectionLike for Commands {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        Box::pin(async move {
            let answer = self.current().req_packed_command(command).await;
            self.check(&answer);
            answer
        })
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        Box::pin(async move {
            let answer = self.current().req_packed_commands(pipeline, offset, count).await;
            self.check(&answer);
            answer
        })
    }

    fn get_db(&self) -> i64 {
        self.current().get_db()
    }
}
