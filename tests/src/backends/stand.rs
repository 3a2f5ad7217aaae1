//! What the servers of one run share.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use box_office::{RedisPlace, Schema, Service, Strategy};

use super::{Database, Durability, Missing, Postgres, Prefix, Redis, postgres, redis};

/// Backends that were found for a command, which measures on them.
pub struct Services {
    /// The database server.
    pub postgres: Postgres,
    /// There if it was asked for.
    pub redis: Option<Redis>,
}

impl Services {
    /// Finds Postgres, and what else is needed.
    ///
    /// # Errors
    /// One is missing.
    pub async fn find(durability: Durability, needs: &[Service]) -> Result<Self, Missing> {
        let postgres = Postgres::find(durability).await?;
        let redis = match needs.contains(&Service::Redis) {
            true => Some(Redis::find().await?),
            false => None,
        };
        Ok(Self { postgres, redis })
    }

    /// A stand on them.
    ///
    /// # Errors
    /// There is no database to be had.
    pub async fn stand(&self, schema: Schema) -> anyhow::Result<Stand> {
        Stand::on(&self.postgres, self.redis.as_ref(), schema).await
    }
}

/// A database of their own, and a prefix in Redis where their strategy needs one. Both go when this is dropped.
pub struct Stand {
    database: Database,
    redis: Option<InRedis>,
}

struct InRedis {
    url: String,
    prefix: Prefix,
    /// One that is shared stays for as long as somebody stands on it.
    _server: Option<Arc<Redis>>,
}

impl Stand {
    /// For a strategy, on the backends that all tests of this process share.
    ///
    /// # Errors
    /// One is missing.
    pub async fn shared(strategy: &Strategy) -> anyhow::Result<Self> {
        let database = postgres().await?.database(strategy.schema).await?;
        let redis = match strategy.needs.contains(&Service::Redis) {
            false => None,
            true => {
                let server = redis().await?;
                let mut redis = InRedis::on(&server);
                redis._server = Some(server);
                Some(redis)
            }
        };
        Ok(Self { database, redis })
    }

    /// On backends of the caller's.
    ///
    /// # Errors
    /// There is no database to be had.
    pub async fn on(postgres: &Postgres, redis: Option<&Redis>, schema: Schema) -> anyhow::Result<Self> {
        Ok(Self {
            database: postgres.database(schema).await?,
            redis: redis.map(InRedis::on),
        })
    }

    /// The database.
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// What all keys in Redis begin with, if there is one.
    pub fn prefix(&self) -> Option<&str> {
        self.redis.as_ref().map(|redis| &*redis.prefix)
    }

    /// Reaches Redis at another address, such as that of a proxy before it.
    ///
    /// # Errors
    /// There is none.
    pub fn redis_at(&mut self, port: u16) -> anyhow::Result<()> {
        let redis = self.redis.as_mut().context("there is no Redis")?;
        let mut url = url::Url::parse(&redis.url)?;
        url.set_host(Some("127.0.0.1"))?;
        url.set_port(Some(port)).ok().context("a Redis has a port")?;
        redis.url = url.into();
        Ok(())
    }

    /// How a server is told of all this.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let mut environment = vec![("DATABASE_URL", self.database.url())];
        if let Some(redis) = &self.redis {
            environment.push(("REDIS_URL", redis.url.clone()));
            environment.push(("REDIS_PREFIX", redis.prefix.to_string()));
        }
        environment
    }

    /// How a strategy in this process is told of Redis, with locks that outlive their holder for so long.
    ///
    /// # Errors
    /// The URL of Redis is none that a server would take.
    pub fn redis(&self, lease: Duration) -> anyhow::Result<Option<RedisPlace>> {
        let Some(redis) = &self.redis else { return Ok(None) };
        Ok(Some(RedisPlace {
            url: redis.url.parse().map_err(anyhow::Error::msg)?,
            prefix: redis.prefix.to_string(),
            lease,
        }))
    }
}

impl InRedis {
    fn on(redis: &Redis) -> Self {
        Self {
            url: redis.url().to_owned(),
            prefix: redis.prefix(),
            _server: None,
        }
    }
}
