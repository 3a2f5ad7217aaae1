//! Postgres in a container.

use anyhow::bail;
use rand::distr::{Alphanumeric, SampleString};
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use testcontainers_modules::{postgres, testcontainers::ImageExt};

use super::{Durability, SERVICE, answers, settings};
use crate::backends::docker::{Container, ImageName};

const IMAGE: ImageName = ImageName {
    variable: "OVERSOLD_POSTGRES_IMAGE",
    default: "postgres:17-alpine",
};
const PORT: u16 = 5432;

pub(super) struct Server {
    container: Container<postgres::Postgres>,
    password: String,
}

impl Server {
    /// Starts a container, and waits until the server in it answers.
    pub(super) async fn start(durability: Durability) -> anyhow::Result<Self> {
        let password = Alphanumeric.sample_string(&mut rand::rng(), 32);
        let request = {
            let password = password.clone();
            move || {
                postgres::Postgres::default()
                    .with_password(&password)
                    .with_cmd(settings(durability))
            }
        };
        let container = Container::start(SERVICE, IMAGE, request, PORT).await?;
        let server = Self { container, password };
        server.ready().await?;
        Ok(server)
    }

    async fn ready(&self) -> anyhow::Result<()> {
        answers(&self.admin(), async || {
            if self.container.pid().await?.is_none() {
                bail!("its container ended: {}", self.container.log().await?);
            }
            Ok(())
        })
        .await
    }

    /// How to reach its database for administration.
    pub(super) fn admin(&self) -> PgConnectOptions {
        let (host, port) = self.container.address();
        PgConnectOptions::new_without_pgpass()
            .host(host)
            .port(port)
            .username("postgres")
            .password(&self.password)
            .database("postgres")
            .ssl_mode(PgSslMode::Disable)
    }

    /// Starts it again, unless it is up, and waits until it answers.
    pub(super) async fn launch(&self) -> anyhow::Result<()> {
        self.container.start_again().await?;
        self.ready().await
    }

    /// Shuts it down in order, unless it is down.
    pub(super) async fn stop(&self) -> anyhow::Result<()> {
        self.container.stop().await
    }

    /// Kills every process of it, unless it is down.
    pub(super) async fn kill(&self) -> anyhow::Result<()> {
        self.container.kill().await
    }

    /// The server's pid as the engine sees it, while it is up.
    pub(super) async fn pid(&self) -> anyhow::Result<Option<u32>> {
        self.container.pid().await
    }
}
