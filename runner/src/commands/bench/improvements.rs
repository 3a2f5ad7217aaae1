//! `oversold bench lv4/… --rate-limit …`: how many orders per second are accepted with the settings of improvements, next to the same
//! strategy without them, in rounds that take turns.

use anyhow::{Context, ensure};

use super::{
    BenchArgs, MeasurementTable,
    accept::{CLIENTS, without_consumers},
    bench_setup::BenchEnvironment,
    progress,
    wrk::Wrk,
};
use crate::{exit::ExitKind, interrupt::Signals, levels::SelectedStrategy, statistics::MedianRange};

/// Measures how fast orders are accepted with the settings and without.
pub(super) async fn run(selected: SelectedStrategy, args: &BenchArgs) -> anyhow::Result<ExitKind> {
    ensure!(
        args.json.is_none(),
        "--json has no place for what an improvement costs: leave it out"
    );
    let wrk = Wrk::find()?;
    let mut signals = Signals::listen()?;
    let mut bench = signals.or_end(BenchEnvironment::new(selected, args, CLIENTS)).await?;
    bench.program = without_consumers(bench.program);
    let wrk = Wrk::new(wrk)?;

    let settings = args.sale.given();
    let given: Vec<String> = settings.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let improved = settings
        .into_iter()
        .fold(bench.program.clone(), |program, (name, value)| {
            program.variable(name, value)
        });
    let (mut with, mut without) = (vec![], vec![]);
    let rounds = args.rounds.unwrap_or(5);
    let measured = signals.or_end(async {
        for number in 1..=rounds {
            for (program, rounds, what) in [
                (&improved, &mut with, "with"),
                (&bench.program, &mut without, "without"),
            ] {
                progress(&format!("round {number}: {what} {}", given.join(" ")));
                let round = bench.accept_round(&wrk, program, selected.strategy, args.pool).await?;
                ensure!(round.missing_messages().is_none(), "{:?}", round.missing_messages());
                rounds.push(round.load);
            }
        }
        Ok(())
    });
    measured.await?;
    progress("");

    let a_second = |load: &crate::results::bench::WrkReport| load.confirmed_a_second();
    let mut table = MeasurementTable::new(
        bench.selected.name(),
        format!("median (range) of {rounds} rounds of {} s", bench.duration.as_secs()),
    );
    table.row(
        format!("orders accepted a second with {}", given.join(" ")),
        MedianRange::over(&with, a_second)?.to_string(),
    );
    table.row(
        "orders accepted a second without",
        MedianRange::over(&without, a_second)?.to_string(),
    );
    let ratio = MedianRange::of_ratios(with.iter().map(a_second), without.iter().map(a_second));
    table.row("ratio", format!("{:.2}", ratio.context("there was no round")?));
    let refused: u64 = with.iter().map(|load| load.refused + load.cut_off).sum();
    table.row("not accepted with", refused.to_string());
    table.print();
    Ok(ExitKind::AsPromised)
}
