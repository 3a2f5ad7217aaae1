//! k6 with the script `load/k6/rush.js`.

use std::{path::PathBuf, process::Stdio};

use anyhow::{bail, ensure};
use box_office::{Invariant, Promise};
use harness::backends::reaper;

use crate::{Rush, RushArgs, outcome::Outcome};

/// The exit code of k6 when a threshold was crossed.
const THRESHOLDS_CROSSED: i32 = 99;

/// Sends the rush with k6.
pub(crate) async fn run(args: &RushArgs, rush: &Rush) -> anyhow::Result<Outcome> {
    let folder = reaper::folder("k6")?;
    let summary: PathBuf = folder.join("summary.json");
    let codes = |promise| {
        let codes: Vec<&str> = rush.promises.those(promise).map(Invariant::code).collect();
        codes.join(",")
    };
    let mut command = tokio::process::Command::from(reaper::command(std::path::absolute(&args.k6)?)?);
    let output = command
        .args(["run", "--quiet", "--no-usage-report", "--no-color", "--address", ""])
        .arg(&args.script)
        .env("BASE_URL", rush.host.to_string())
        .env("OVERSOLD_ADMIN_TOKEN", &rush.admin_token)
        .env("SALE", rush.sale.to_string())
        .env("BUYERS", rush.size.buyers.to_string())
        .env("CAPACITY", rush.size.capacity.to_string())
        .env("CLICKS", rush.clicks.to_string())
        .env("PATIENCE", rush.size.patience.to_string())
        .env("BREAKS", codes(Promise::Breaks))
        .env("LEAVES_OPEN", codes(Promise::NotPromised))
        .env(
            "PAYMENT_URL",
            rush.payments.as_ref().map(ToString::to_string).unwrap_or_default(),
        )
        .env("SUMMARY", &summary)
        .stdin(Stdio::null())
        .output()
        .await?;
    let printed = || {
        let (out, err) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        format!("{out}{err}")
    };
    match output.status.code() {
        Some(0 | THRESHOLDS_CROSSED) => {}
        _ => bail!("it exited with {}\n{}", output.status, printed()),
    }
    let outcome = Outcome::of_k6(rush, &summary)?;
    ensure!(
        outcome.passes() == output.status.success(),
        "its thresholds and its summary disagree\n{}",
        printed()
    );
    std::fs::remove_dir_all(folder)?;
    Ok(outcome)
}
