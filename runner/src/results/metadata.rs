//! How and where a result was measured.

use std::{collections::BTreeMap, env, fs, process::Command, thread::available_parallelism};

use harness::backends::{Report, Services, Source};
use serde::{Deserialize, Serialize};

use super::disk;

/// How and where a result was measured. Every result file begins with it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunMetadata {
    /// The command line.
    pub command: String,
    /// The commit that was checked out, and `+` if files have changed since. `None` outside a checkout.
    pub commit: Option<String>,
    /// Whether this was a release build.
    pub release: bool,
    /// The machine.
    pub machine: Machine,
    /// The Postgres, if one took part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postgres: Option<Backend>,
    /// The Redis, if one took part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redis: Option<Backend>,
    /// The Kafka, if one took part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kafka: Option<Backend>,
    /// Median duration of an `fdatasync` on the disk of Postgres before the run, in milliseconds. `None` where that disk can't be measured,
    /// as Postgres was not started by this command, where there was no Postgres, and in files that do not record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fdatasync_ms: Option<f64>,
    /// Why the results are void: each check that failed after a round.
    #[serde(default)]
    pub void: Vec<String>,
}

impl RunMetadata {
    /// Of this process, without backends. The commit is read now: call it before the result file is created.
    pub(crate) fn of_this_run() -> Self {
        Self {
            command: command_line(),
            commit: commit(),
            release: !cfg!(debug_assertions),
            machine: Machine::this(),
            postgres: None,
            redis: None,
            kafka: None,
            fdatasync_ms: None,
            void: vec![],
        }
    }

    /// With these services, and the disk of their Postgres, which is measured now: call it before the load.
    ///
    /// # Errors
    /// The disk could not be written to.
    pub(crate) fn with_services(self, services: &Services) -> anyhow::Result<Self> {
        let postgres = services.postgres.report();
        Ok(Self {
            fdatasync_ms: match postgres.source {
                Source::Native => Some(disk::fdatasync()?.as_secs_f64() * 1e3),
                // Their disks are elsewhere.
                Source::Docker | Source::External => None,
            },
            postgres: Some(postgres.into()),
            redis: services.redis.as_ref().map(|redis| redis.report().into()),
            kafka: services.kafka.as_ref().map(|kafka| kafka.report().into()),
            ..self
        })
    }

    /// What every measurement depends on besides the code: build, processors and disk, in one line.
    pub(crate) fn conditions(&self) -> String {
        let Machine { processor, cores, .. } = &self.machine;
        let build = if self.release { "release" } else { "debug" };
        let processor = processor.as_ref().map_or_else(String::new, |name| format!(" ({name})"));
        let disk = match self.fdatasync_ms {
            Some(ms) => format!("one `fdatasync` takes {ms:.2} ms"),
            None if self.postgres.is_none() => "nothing waits for a disk".to_owned(),
            None => "the `fdatasync` of Postgres's disk is not measured: it was not started here".to_owned(),
        };
        format!("{build} build, {cores} cores{processor} that clients, servers and services share; {disk}")
    }
}

/// A backend as a result file describes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Backend {
    /// `postgres`, `redis` or `kafka`.
    pub service: String,
    /// `external`, `docker` or `native`.
    pub source: String,
    /// Why no source of higher priority was used.
    pub reason: String,
    /// The version that the service reports.
    pub version: String,
    /// Host and port.
    pub address: String,
    /// From the start of the search to the first answer, in milliseconds.
    pub start_up_ms: u64,
    /// The settings that decide what a crash can lose, such as `fsync`.
    pub durability: BTreeMap<String, String>,
}

impl From<&Report> for Backend {
    fn from(report: &Report) -> Self {
        let durability = report.durability.iter();
        Self {
            service: report.service.to_owned(),
            source: report.source.to_string(),
            reason: report.reason.clone(),
            version: report.version.clone(),
            address: report.address.clone(),
            start_up_ms: report.start_up_ms,
            durability: durability
                .map(|(&setting, value)| (setting.to_owned(), value.clone()))
                .collect(),
        }
    }
}

/// A machine as a result file describes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// Operating system and architecture.
    pub system: String,
    /// The processor's model, where the system reports it.
    pub processor: Option<String>,
    /// Logical processors that this process may use.
    pub cores: usize,
    /// Total memory, where the system reports it.
    pub memory_mib: Option<u64>,
}

impl Machine {
    /// This one.
    fn this() -> Self {
        Self {
            system: format!("{} {}", env::consts::OS, env::consts::ARCH),
            processor: proc_value("/proc/cpuinfo", "model name"),
            cores: available_parallelism().map_or(1, usize::from),
            memory_mib: proc_value("/proc/meminfo", "MemTotal")
                .and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok())
                .map(|kib| kib / 1024),
        }
    }
}

/// The value after `name:` in a file of Linux's `/proc`.
fn proc_value(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The commit that is checked out, and `+` if files have changed since, other than result files and what is generated from them.
fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let code = [":(top)", ":(top,exclude)results", ":(top,exclude)book/generated"];
    let changed = !git(&[&["status", "--porcelain", "--untracked-files=no", "--"], &code[..]].concat())?.is_empty();
    Some(format!("{commit}{}", if changed { "+" } else { "" }))
}

/// The command line of this process.
fn command_line() -> String {
    env::args()
        .skip(1)
        .fold("oversold".to_owned(), |command, word| command + " " + &word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_conditions_name_build_processors_and_disk() {
        let metadata = |release, fdatasync_ms, postgres: bool| RunMetadata {
            command: String::new(),
            commit: None,
            release,
            machine: Machine {
                system: "linux x86_64".to_owned(),
                processor: Some("Z80".to_owned()),
                cores: 2,
                memory_mib: None,
            },
            postgres: postgres.then(|| Backend {
                service: "postgres".to_owned(),
                source: "docker".to_owned(),
                reason: String::new(),
                version: "17.2".to_owned(),
                address: String::new(),
                start_up_ms: 1,
                durability: BTreeMap::new(),
            }),
            redis: None,
            kafka: None,
            fdatasync_ms,
            void: vec![],
        };
        let shared = "2 cores (Z80) that clients, servers and services share";
        for (metadata, expected) in [
            (
                metadata(true, Some(0.084), true),
                format!("release build, {shared}; one `fdatasync` takes 0.08 ms"),
            ),
            (
                metadata(false, None, true),
                format!(
                    "debug build, {shared}; the `fdatasync` of Postgres's disk is not measured: it was not started here"
                ),
            ),
            (
                metadata(false, None, false),
                format!("debug build, {shared}; nothing waits for a disk"),
            ),
        ] {
            assert_eq!(metadata.conditions(), expected);
        }
    }
}
