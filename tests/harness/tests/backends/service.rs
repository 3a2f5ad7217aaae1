//! The three services, with their names and settings, and whether a source is available.

use std::sync::OnceLock;

use harness::backends::Source;

use crate::child::{Role, temp};

/// A service under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    Postgres,
    Redis,
    Kafka,
}

impl Service {
    pub(crate) const ALL: [Self; 3] = [Self::Postgres, Self::Redis, Self::Kafka];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Redis => "redis",
            Self::Kafka => "kafka",
        }
    }

    /// One of its settings, such as `OVERSOLD_REDIS_BIN`.
    pub(crate) fn setting(self, what: &str) -> String {
        format!("OVERSOLD_{}_{what}", self.name().to_uppercase())
    }

    /// The setting that names the folder of its programs.
    pub(crate) fn folder_variable(self) -> String {
        self.setting(if self == Self::Kafka { "JARS" } else { "BIN" })
    }

    pub(crate) fn url_variable(self) -> &'static str {
        match self {
            Self::Postgres => "DATABASE_URL",
            Self::Redis => "REDIS_URL",
            Self::Kafka => "KAFKA_BOOTSTRAP_SERVERS",
        }
    }

    /// The reason without native programs, as in [`crate::sources::nowhere`].
    pub(crate) fn not_native(self) -> &'static str {
        match self {
            Self::Postgres => "OVERSOLD_POSTGRES_BIN is `/nowhere`, which does not hold initdb and postgres",
            Self::Redis => "OVERSOLD_REDIS_BIN is `/nowhere`, which does not hold redis-server",
            Self::Kafka => "OVERSOLD_KAFKA_JARS is `/nowhere`, which does not hold the jars of Kafka",
        }
    }
}

/// Why a source is not available on this machine; `None` if it is.
pub(crate) fn absent(service: Service, source: Source) -> Option<&'static str> {
    static KNOWN: [OnceLock<Option<String>>; 6] = [const { OnceLock::new() }; 6];
    let known = &KNOWN[service as usize * 2 + usize::from(source == Source::Native)];
    let reason = known.get_or_init(|| {
        let temp = temp();
        let report = Role::new(service, "find", temp.path()).forced(source).json();
        report["error"].as_str().map(|error| {
            let line = error.lines().find_map(|line| line.trim().strip_prefix(source.name()));
            line.unwrap_or(error).trim_start_matches(": ").to_owned()
        })
    });
    reason.as_deref()
}
