//! `oversold trace LEVEL[/STRATEGY]`.

use suite::schedule::Rehearsal;

use crate::{Ended, levels::Choice};

/// Forces the interleaving in which both look before either writes, and prints it.
pub(crate) async fn trace(name: &str, markdown: bool) -> anyhow::Result<Ended> {
    let chosen = Choice::one(name)?;
    let rehearsal = Rehearsal::of(chosen.strategy).await?;
    let trace = rehearsal.both_look_before_either_writes().await?.trace();
    if markdown {
        println!("{}", trace.markdown());
    } else {
        println!("{}: both look before either writes\n{trace}", chosen.name());
    }
    Ok(Ended::AsPromised)
}
