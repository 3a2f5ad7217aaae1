//! `oversold doctor`.

use box_office::Service;
use harness::backends;

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
    let mut missing = vec![];
    if let Err(why) = postgres {
        missing.push(anyhow::Error::new(why).context("nothing can run"));
    }
    for (service, found) in besides {
        let strategies = in_need_of(service);
        if let (Err(why), false) = (found, strategies.is_empty()) {
            let cannot = format!("{} can't run, the other strategies can", strategies.join(", "));
            missing.push(anyhow::Error::new(why).context(cannot));
        }
    }
    let Some(last) = missing.pop() else {
        return Ok(Ended::AsPromised);
    };
    for other in missing {
        eprintln!("oversold: {other:#}");
    }
    Err(last)
}

/// The strategies on the trail that need this service besides Postgres.
fn in_need_of(service: Service) -> Vec<String> {
    let of_a_level = LEVELS.iter().flat_map(|level| {
        let strategies = level.strategies.iter();
        let in_need = strategies.filter(|it| it.needs.contains(&service));
        in_need.map(|strategy| format!("{}/{}", level.name, strategy.name))
    });
    of_a_level.collect()
}
