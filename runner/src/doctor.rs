//! `oversold doctor`.

use suite::backends;

use crate::Ended;

/// Prints where each backend comes from, or what is missing.
pub(crate) async fn doctor() -> anyhow::Result<Ended> {
    let postgres = backends::postgres().await?;
    println!("{}", postgres.report());
    Ok(Ended::AsPromised)
}
