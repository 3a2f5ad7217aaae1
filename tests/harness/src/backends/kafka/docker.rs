//! Kafka in a container.

use testcontainers_modules::{kafka::apache, testcontainers::ImageExt};

use super::{SERVICE, settings};
use crate::backends::docker::{Container, ImageName};

const IMAGE: ImageName = ImageName {
    variable: "OVERSOLD_KAFKA_IMAGE",
    default: "apache/kafka-native:4.1.1",
};

/// Starts a container with a broker that advertises a port of this machine.
pub(super) async fn start() -> anyhow::Result<Container> {
    let request = |port: u16| {
        let mut request = apache::Kafka::default()
            // The port is known in advance, so the broker need not wait for it and becomes the root
            // process, which receives SIGTERM.
            .with_cmd(["-c", "exec /etc/kafka/docker/run"])
            .with_env_var(
                "KAFKA_ADVERTISED_LISTENERS",
                format!("PLAINTEXT://127.0.0.1:{port},BROKER://localhost:9093"),
            )
            .with_env_var("KAFKA_NODE_ID", apache::DEFAULT_BROKER_ID.to_string());
        for (setting, value) in settings() {
            let variable = setting.to_uppercase().replace('.', "_");
            request = request.with_env_var(format!("KAFKA_{variable}"), value);
        }
        request
    };
    Container::start(SERVICE.name, IMAGE, request, apache::KAFKA_PORT.as_u16()).await
}
