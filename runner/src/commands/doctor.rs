//! `oversold doctor`: which backends are available, where they come from, and what is missing.

use box_office::Service;
use harness::backends;

use crate::{exit::ExitKind, levels::LEVELS};

/// Prints the source of each backend.
///
/// # Errors
/// A backend is missing that one of the levels needs.
pub(crate) async fn run() -> anyhow::Result<ExitKind> {
    let postgres = backends::postgres().await;
    let redis = backends::redis().await.map(|redis| redis.report().clone());
    let kafka = backends::kafka().await.map(|kafka| kafka.report().clone());
    if let Ok(postgres) = &postgres {
        println!("{}", postgres.report());
    }
    let besides = [(Service::Redis, redis), (Service::Kafka, kafka)];
    for (service, found) in &besides {
        match found {
            Ok(report) => println!("{report}"),
            Err(missing) if strategies_that_need(*service).is_empty() => {
                println!(
                    "{}: optional, as no level that is built needs it; {missing}",
                    service.name()
                );
            }
            Err(_) => {}
        }
    }
    let mut missing = vec![];
    if let Err(why) = postgres {
        missing.push(anyhow::Error::new(why).context("nothing can run"));
    }
    for (service, found) in besides {
        let strategies = strategies_that_need(service);
        if let (Err(why), false) = (found, strategies.is_empty()) {
            let cannot = format!("{} can't run, the other strategies can", strategies.join(", "));
            missing.push(anyhow::Error::new(why).context(cannot));
        }
    }
    let Some(last) = missing.pop() else {
        return Ok(ExitKind::AsPromised);
    };
    for other in missing {
        eprintln!("oversold: {other:#}");
    }
    Err(last)
}

/// The main strategies that need this service besides Postgres.
fn strategies_that_need(service: Service) -> Vec<String> {
    let of_a_level = LEVELS.iter().flat_map(|level| {
        let strategies = level.strategies.iter();
        let needing = strategies.filter(|it| it.needs.contains(&service));
        needing.map(|strategy| format!("{}/{}", level.name, strategy.name))
    });
    of_a_level.collect()
}
