//! What the servers of one run share.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use box_office::{KafkaConfig, RedisConfig, Schema, Service, Strategy};

use super::{Database, Durability, Kafka, KafkaPrefix, Missing, Postgres, Prefix, Redis, kafka, postgres, redis};

/// Backends that were found for a command, which measures on them.
pub struct Services {
    /// The database server.
    pub postgres: Postgres,
    /// There if it was asked for.
    pub redis: Option<Redis>,
    /// There if it was asked for.
    pub kafka: Option<Kafka>,
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
        let kafka = match needs.contains(&Service::Kafka) {
            true => Some(Kafka::find().await?),
            false => None,
        };
        Ok(Self { postgres, redis, kafka })
    }

    /// A environment on them.
    ///
    /// # Errors
    /// There is no database to be had.
    pub async fn environment(&self, schema: Schema) -> anyhow::Result<TestEnvironment> {
        Ok(TestEnvironment::on(&self.postgres, self.redis.as_ref(), schema)
            .await?
            .with_kafka(self.kafka.as_ref()))
    }
}

/// A database of their own, and a prefix in Redis and one in Kafka where their strategy needs them. All go when this is dropped.
pub struct TestEnvironment {
    database: Database,
    redis: Option<RedisShare>,
    kafka: Option<KafkaShare>,
}

struct RedisShare {
    url: String,
    prefix: Prefix,
    /// One that is shared stays for as long as somebody stands on it.
    _server: Option<Arc<Redis>>,
}

struct KafkaShare {
    bootstrap_servers: String,
    prefix: KafkaPrefix,
    /// As that of Redis.
    _server: Option<Arc<Kafka>>,
}

impl TestEnvironment {
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
                let mut redis = RedisShare::on(&server);
                redis._server = Some(server);
                Some(redis)
            }
        };
        let kafka = match strategy.needs.contains(&Service::Kafka) {
            false => None,
            true => {
                let server = kafka().await?;
                let mut kafka = KafkaShare::on(&server);
                kafka._server = Some(server);
                Some(kafka)
            }
        };
        Ok(Self { database, redis, kafka })
    }

    /// On backends of the caller's.
    ///
    /// # Errors
    /// There is no database to be had.
    pub async fn on(postgres: &Postgres, redis: Option<&Redis>, schema: Schema) -> anyhow::Result<Self> {
        Ok(Self {
            database: postgres.database(schema).await?,
            redis: redis.map(RedisShare::on),
            kafka: None,
        })
    }

    /// The same, and on a Kafka of the caller's.
    #[must_use]
    pub fn with_kafka(mut self, kafka: Option<&Kafka>) -> Self {
        self.kafka = kafka.map(KafkaShare::on);
        self
    }

    /// The database.
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// What all keys in Redis begin with, if there is one.
    pub fn prefix(&self) -> Option<&str> {
        self.redis.as_ref().map(|redis| &*redis.prefix)
    }

    /// What all topics and groups in Kafka begin with, if there is one.
    pub fn kafka_prefix(&self) -> Option<&str> {
        self.kafka.as_ref().map(|kafka| &*kafka.prefix)
    }

    /// Reaches Redis at another address, such as that of a proxy before it.
    ///
    /// # Errors
    /// There is none.
    pub fn redirect_redis(&mut self, port: u16) -> anyhow::Result<()> {
        let redis = self.redis.as_mut().context("there is no Redis")?;
        let mut url = url::Url::parse(&redis.url)?;
        url.set_host(Some("127.0.0.1"))?;
        url.set_port(Some(port)).ok().context("a Redis has a port")?;
        redis.url = url.into();
        Ok(())
    }

    /// How a server is told of all this.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let mut variables = vec![("DATABASE_URL", self.database.url())];
        if let Some(redis) = &self.redis {
            variables.push(("REDIS_URL", redis.url.clone()));
            variables.push(("REDIS_PREFIX", redis.prefix.to_string()));
        }
        if let Some(kafka) = &self.kafka {
            variables.push(("KAFKA_BOOTSTRAP_SERVERS", kafka.bootstrap_servers.clone()));
            variables.push(("KAFKA_PREFIX", kafka.prefix.to_string()));
        }
        variables
    }

    /// How a strategy in this process is told of Redis, with locks that outlive their holder for so long.
    ///
    /// # Errors
    /// The URL of Redis is none that a server would take.
    pub fn redis(&self, lease: Duration) -> anyhow::Result<Option<RedisConfig>> {
        let Some(redis) = &self.redis else { return Ok(None) };
        Ok(Some(RedisConfig {
            url: redis.url.parse().map_err(anyhow::Error::msg)?,
            prefix: redis.prefix.to_string(),
            lease,
        }))
    }

    /// How a strategy in this process is told of Kafka, with so many consumers, each missed after so long.
    pub fn kafka(&self, consumers: u32, session: Duration) -> Option<KafkaConfig> {
        self.kafka.as_ref().map(|kafka| KafkaConfig {
            bootstrap_servers: kafka.bootstrap_servers.clone(),
            prefix: kafka.prefix.to_string(),
            consumers,
            session,
        })
    }
}

impl RedisShare {
    fn on(redis: &Redis) -> Self {
        Self {
            url: redis.url().to_owned(),
            prefix: redis.prefix(),
            _server: None,
        }
    }
}

impl KafkaShare {
    fn on(kafka: &Kafka) -> Self {
        Self {
            bootstrap_servers: kafka.bootstrap_servers().to_owned(),
            prefix: kafka.prefix(),
            _server: None,
        }
    }
}
