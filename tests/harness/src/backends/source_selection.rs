//! The search for a service: tries its sources in order until one provides it.

use std::{
    collections::BTreeMap,
    env,
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::time::timeout;

use super::{Missing, Report, Source, native, setting, without_secrets};
use crate::broken_pipe;

/// Time limit until an external server has answered the first requests.
const EXTERNAL_TIMEOUT: Duration = Duration::from_secs(30);

/// A service as the search knows it.
pub(super) struct Service {
    /// Its name in settings and messages.
    pub(super) name: &'static str,
    /// The environment variable with the URL of an external server.
    pub(super) url_variable: &'static str,
    /// Package managers, each with the command that installs the service. Empty: only
    /// `infra/setup.sh` can install it.
    pub(super) packages: &'static [(&'static str, &'static str)],
}

/// A source that is being tried.
pub(super) struct Candidate {
    service: &'static Service,
    pub(super) source: Source,
    /// The URL of an external server; empty for other sources.
    pub(super) url: String,
    reason: String,
    began: Instant,
}

impl Candidate {
    /// Prints the chosen server on stderr, and returns the report.
    pub(super) fn report(
        self,
        version: String,
        address: String,
        durability: BTreeMap<&'static str, String>,
    ) -> anyhow::Result<Report> {
        let report = Report {
            service: self.service.name,
            source: self.source,
            reason: self.reason,
            version,
            address,
            start_up_ms: u64::try_from(self.began.elapsed().as_millis())?,
            durability,
        };
        broken_pipe::notice(format_args!("{report}"));
        Ok(report)
    }
}

/// Tries the sources in this order with `take`, or only the forced one, and returns the first
/// success.
pub(super) async fn search<T>(
    service: &'static Service,
    order: &[Source],
    mut take: impl AsyncFnMut(Candidate) -> anyhow::Result<T>,
) -> Result<T, Missing> {
    let Service { name, url_variable, .. } = service;
    let began = Instant::now();
    let forced = forced()?;
    let mut rejected = Vec::new();
    for &source in forced.as_ref().map_or(order, std::slice::from_ref) {
        let (url, reason) = match (source, setting(url_variable)) {
            (Source::External, None) => {
                rejected.push((source, format!("{url_variable} is not set")));
                continue;
            }
            (Source::External, Some(url)) => (url.to_string_lossy().into_owned(), format!("{url_variable} is set")),
            _ if forced.is_some() => (String::new(), "OVERSOLD_BACKENDS asks for it".to_owned()),
            _ => (String::new(), reason(&rejected)),
        };
        let candidate = Candidate {
            service,
            source,
            url,
            reason,
            began,
        };
        let shown = without_secrets(&candidate.url);
        let taken = match source {
            Source::External => timeout(EXTERNAL_TIMEOUT, take(candidate))
                .await
                .with_context(|| format!("{shown} does not answer within {EXTERNAL_TIMEOUT:?}"))
                .flatten(),
            _ => take(candidate).await,
        };
        match taken {
            Ok(found) => return Ok(found),
            // A URL selects one server, so no other source is tried if that server does not answer.
            Err(error) if source == Source::External => {
                return Err(Missing::Nowhere {
                    service: name,
                    tried: vec![(source, format!("{error:#}"))],
                    remedy: format!("Set {url_variable} to a server that answers, or unset it to have one started."),
                });
            }
            Err(error) => rejected.push((source, format!("{error:#}"))),
        }
    }
    Err(Missing::Nowhere {
        service: name,
        tried: rejected,
        remedy: remedy(service, forced),
    })
}

/// The source that `OVERSOLD_BACKENDS` forces, if any.
fn forced() -> Result<Option<Source>, Missing> {
    const VARIABLE: &str = "OVERSOLD_BACKENDS";
    match env::var_os(VARIABLE).as_ref().map(|held| held.to_str()) {
        None | Some(Some("")) => Ok(None),
        Some(Some("docker")) => Ok(Some(Source::Docker)),
        Some(Some("native")) => Ok(Some(Source::Native)),
        Some(held) => Err(Missing::BadSetting {
            variable: VARIABLE,
            held: held.unwrap_or("not UTF-8").to_owned(),
            takes: "`docker` or `native`",
        }),
    }
}

/// Why no earlier source was chosen, in one line.
fn reason(rejected: &[(Source, String)]) -> String {
    let reasons: Vec<&str> = rejected
        .iter()
        .filter_map(|(_, reason)| reason.lines().next())
        .collect();
    reasons.join("; ")
}

/// How to get a service that no source provides.
fn remedy(service: &Service, forced: Option<Source>) -> String {
    let start_docker = "start a Docker engine";
    let mut packages = service.packages.iter();
    let install = packages.find(|(manager, _)| native::on_path(manager).is_some());
    let install = match install {
        Some((manager, command)) => {
            // Homebrew refuses to run as root.
            let sudo = if *manager == "brew" { "" } else { "sudo " };
            format!("`{sudo}{command}`")
        }
        None if service.packages.is_empty() => format!("install it with `infra/setup.sh {}`", service.name),
        None => format!("install {}", service.name),
    };
    match forced {
        Some(Source::Docker) => format!("To get one: {start_docker}, or unset OVERSOLD_BACKENDS."),
        Some(_) => format!("To get one: {install}."),
        None => format!("To get one: {install}, or {start_docker}."),
    }
}
