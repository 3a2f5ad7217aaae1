//! Redis in a container.

use testcontainers_modules::{redis, testcontainers::ImageExt};

use super::{SERVICE, settings};
use crate::backends::docker::{Container, ImageName};

const IMAGE: ImageName = ImageName {
    variable: "OVERSOLD_REDIS_IMAGE",
    default: "redis:7-alpine",
};

/// Starts a container whose default user has this password.
pub(super) async fn start(password: &str) -> anyhow::Result<Container> {
    let settings = settings(password);
    let arguments: Vec<String> = settings
        .into_iter()
        .flat_map(|(setting, value)| [format!("--{setting}"), value.to_owned()])
        .collect();
    let request = move |_| redis::Redis::default().with_cmd(arguments.clone());
    Container::start(SERVICE.name, IMAGE, request, redis::REDIS_PORT).await
}
