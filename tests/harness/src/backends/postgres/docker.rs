//! Postgres in a container.

use testcontainers_modules::{postgres, testcontainers::ImageExt};

use super::{Durability, SERVICE, settings};
use crate::backends::docker::{Container, ImageName};

const IMAGE: ImageName = ImageName {
    variable: "OVERSOLD_POSTGRES_IMAGE",
    default: "postgres:17-alpine",
};
const PORT: u16 = 5432;

/// Starts a container whose superuser has this password.
pub(super) async fn start(durability: Durability, password: String) -> anyhow::Result<Container> {
    let request = move |_| {
        postgres::Postgres::default()
            .with_password(&password)
            .with_cmd(settings(durability))
    };
    Container::start(SERVICE.name, IMAGE, request, PORT).await
}
