//! `oversold doctor`.

use anyhow::Context;
use box_office::Service;
use suite::backends;

use crate::{Ended, levels::LEVELS};

/// Prints where each backend comes from, or what is missing. Only one that a level needs has to be there.
pub(crate) async fn doctor() -> anyhow::Result<Ended> {
    let (postgres, redis) = (backends::postgres().await, backends::redis().await);
    let with_redis = LEVELS.iter().filter(|level| {
        let mut needs = level.strategies.iter().flat_map(|strategy| strategy.needs);
        needs.any(|service| *service == Service::Redis)
    });
    let with_redis: Vec<&str> = with_redis.map(|level| level.name).collect();
    if let Ok(postgres) = &postgres {
        println!("{}", postgres.report());
    }
    match &redis {
        Ok(redis) => println!("{}", redis.report()),
        Err(missing) if with_redis.is_empty() => {
            println!("redis: optional, as no level that is built needs it; {missing}");
        }
        Err(_) => {}
    }
    postgres?;
    if !with_redis.is_empty() {
        redis.with_context(|| format!("{} can't run, the other levels can", with_redis.join(", ")))?;
    }
    Ok(Ended::AsPromised)
}
