//! The environment of one test or run: a database, and a prefix in Redis and Kafka where the
//! strategy needs them.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use box_office::{KafkaConfig, RedisConfig, Schema, Service, Strategy};

use super::{Database, Durability, Kafka, KafkaPrefix, Missing, Postgres, Prefix, Redis, kafka, postgres, redis};

/// The backends of a command that measures.
pub struct Services {
    /// The database server.
    pub postgres: Postgres,
    /// Present if it was requested.
    pub redis: Option<Redis>,
    /// Present if it was requested.
    pub kafka: Option<Kafka>,
}

impl Services {
    /// Finds Postgres and the services in `needs`.
    ///
    /// # Errors
    /// [`Missing`] if no source provides one of them.
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

    /// Creates an environment on these backends.
    ///
    /// # Errors
    /// Fails if the database can't be created.
    pub async fn environment(&self, schema: Schema) -> anyhow::Result<TestEnvironment> {
        Ok(TestEnvironment::on(&self.postgres, self.redis.as_ref(), schema)
            .await?
            .with_kafka(self.kafka.as_ref()))
    }
}

/// A database, and a prefix in Redis and in Kafka where the strategy needs them. Dropping it
/// removes all of them.
pub struct TestEnvironment {
    database: Database,
    redis: Option<RedisShare>,
    kafka: Option<KafkaShare>,
}

struct RedisShare {
    url: String,
    prefix: Prefix,
    /// Keeps a shared server alive.
    _server: Option<Arc<Redis>>,
}

struct KafkaShare {
    bootstrap_servers: String,
    prefix: KafkaPrefix,
    /// Keeps a shared server alive.
    _server: Option<Arc<Kafka>>,
}

impl TestEnvironment {
    /// Creates an environment for a strategy on the backends that all tests of this process share.
    ///
    /// # Errors
    /// Fails with [`Missing`] if no source provides a required backend, or if the database can't be
    /// created.
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

    /// Creates an environment on the caller's backends.
    ///
    /// # Errors
    /// Fails if the database can't be created.
    pub async fn on(postgres: &Postgres, redis: Option<&Redis>, schema: Schema) -> anyhow::Result<Self> {
        Ok(Self {
            database: postgres.database(schema).await?,
            redis: redis.map(RedisShare::on),
            kafka: None,
        })
    }

    /// Adds a prefix on the caller's Kafka.
    #[must_use]
    pub fn with_kafka(mut self, kafka: Option<&Kafka>) -> Self {
        self.kafka = kafka.map(KafkaShare::on);
        self
    }

    /// The database.
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// The prefix of all keys in Redis, if the environment has a Redis.
    pub fn prefix(&self) -> Option<&str> {
        self.redis.as_ref().map(|redis| &*redis.prefix)
    }

    /// The prefix of all topics and groups in Kafka, if the environment has a Kafka.
    pub fn kafka_prefix(&self) -> Option<&str> {
        self.kafka.as_ref().map(|kafka| &*kafka.prefix)
    }

    /// Redirects connections to Redis to a local port, such as that of a proxy.
    ///
    /// # Errors
    /// Fails if the environment has no Redis.
    pub fn redirect_redis(&mut self, port: u16) -> anyhow::Result<()> {
        let redis = self.redis.as_mut().context("there is no Redis")?;
        let mut url = url::Url::parse(&redis.url)?;
        url.set_host(Some("127.0.0.1"))?;
        url.set_port(Some(port)).ok().context("a Redis has a port")?;
        redis.url = url.into();
        Ok(())
    }

    /// The environment variables that configure a server for this environment.
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

    /// The Redis configuration for a strategy in this process, with this lease.
    ///
    /// # Errors
    /// Fails if a server would not accept the URL of Redis.
    pub fn redis(&self, lease: Duration) -> anyhow::Result<Option<RedisConfig>> {
        let Some(redis) = &self.redis else { return Ok(None) };
        Ok(Some(RedisConfig {
            url: redis.url.parse().map_err(anyhow::Error::msg)?,
            prefix: redis.prefix.to_string(),
            lease,
        }))
    }

    /// The Kafka configuration for a strategy in this process, with this number of consumers and
    /// this session timeout.
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
