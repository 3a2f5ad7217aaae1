//! `oversold doctor`.

use anyhow::Context;
use box_office::Service;
use suite::backends;

use crate::{Ended, levels::LEVELS};

/// Prints where each backend comes from, or what is missing. Only one that a level needs has to be there.
pub(crate) async fn doctor() -> anyhow::Result<Ended> {
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
            Err(missing) if in_need_of(*service).is_empty() => {
                println!(
                    "{}: optional, as no level that is built needs it; {missing}",
                    service.name()
                );
            }
            Err(_) => {}
        }
    }
    postgres?;
    for (service, found) in besides {
        let levels = in_need_of(service);
        if !levels.is_empty() {
            found.with_context(|| format!("{} can't run, the other levels can", levels.join(", ")))?;
        }
    }
    Ok(Ended::AsPromised)
}

/// The levels that need this service besides Postgres.
fn in_need_of(service: Service) -> Vec<&'static str> {
    let levels = LEVELS.iter().filter(|level| {
        let mut needs = level.strategies.iter().flat_map(|strategy| strategy.needs);
        needs.any(|needed| *needed == service)
    });
    levels.map(|level| level.name).collect()
}
