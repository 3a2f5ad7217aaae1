//! `oversold doctor`.

use suite::backends;

use crate::Ended;

/// Prints where each backend comes from, or what is missing. Only one that a level needs has to be there.
pub(crate) async fn doctor() -> anyhow::Result<Ended> {
    let postgres = backends::postgres().await;
    if let Ok(postgres) = &postgres {
        println!("{}", postgres.report());
    }
    match backends::redis().await {
        Ok(redis) => println!("{}", redis.report()),
        Err(missing) => println!("redis: only LV.3 needs it; {missing}"),
    }
    postgres?;
    Ok(Ended::AsPromised)
}
