//! The evidence of a finding: its smallest case, as a table with a column for each request.

use std::fmt;

use comfy_table::{Table, presets};
use serde::Serialize;

use crate::history::{Answer, Micros, Refused, Request, Row};

/// One or two requests, or a row, that show what is broken.
#[derive(Clone, Debug, Serialize)]
pub struct Evidence {
    /// The name of each column: one for each request.
    pub columns: Vec<String>,
    /// The steps, in order of time.
    pub steps: Vec<EvidenceStep>,
}

/// One step of one column.
#[derive(Clone, Debug, Serialize)]
pub struct EvidenceStep {
    /// Microseconds since the first step shown.
    pub at_us: Micros,
    /// Index into [`Evidence::columns`].
    pub column: usize,
    /// What happened.
    pub what: String,
    /// The source line, if the step was traced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
}

impl Evidence {
    /// The steps of these requests.
    pub(super) fn of(requests: &[&Request]) -> Self {
        let mut steps: Vec<EvidenceStep> = vec![];
        for (column, request) in requests.iter().enumerate() {
            let mut step = |at_us, what: String, place: Option<String>| {
                steps.push(EvidenceStep {
                    at_us,
                    column,
                    what,
                    place,
                });
            };
            step(request.sent_us, format!("sent, key {}", request.key), None);
            for taken in &request.steps {
                let saw = taken.saw.as_ref().map(|saw| format!(": {saw}")).unwrap_or_default();
                let file = taken.place.rsplit('/').next().unwrap_or(&taken.place);
                step(taken.at_us, format!("{}{saw}", taken.step), Some(file.to_owned()));
            }
            if let Some(answered_us) = request.answered_us {
                step(answered_us, format!("→ {}", in_words(&request.answer)), None);
            }
        }
        steps.sort_by_key(|step| step.at_us);
        let start_us = steps.first().map_or(0, |step| step.at_us);
        for step in &mut steps {
            step.at_us -= start_us;
        }
        Self {
            columns: requests
                .iter()
                .map(|request| format!("buyer {}", request.buyer))
                .collect(),
            steps,
        }
    }

    /// These rows, each in a column with its buyer's name.
    pub(super) fn of_rows(rows: &[&Row]) -> Self {
        let start_us = rows.iter().map(|row| row.taken_us).min().unwrap_or(0);
        let steps = rows.iter().enumerate().map(|(column, row)| EvidenceStep {
            at_us: row.taken_us - start_us,
            column,
            what: format!("reservation {}, key {}, {:?}", row.reservation, row.key, row.status),
            place: None,
        });
        Self {
            columns: rows.iter().map(|row| format!("row of buyer {}", row.buyer)).collect(),
            steps: steps.collect(),
        }
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        let columns = self.columns.iter().map(String::as_str);
        table.set_header(["ms"].into_iter().chain(columns).chain(["where"]));
        for step in &self.steps {
            let mut cells = vec![String::new(); self.columns.len() + 2];
            cells[0] = format!("{:.3}", step.at_us as f64 / 1000.0);
            cells[step.column + 1].clone_from(&step.what);
            cells[self.columns.len() + 1] = step.place.clone().unwrap_or_default();
            table.add_row(cells);
        }
        write!(f, "{table}")
    }
}

/// An answer in words.
pub(crate) fn in_words(answer: &Answer) -> String {
    match answer {
        Answer::Confirmed { .. } => "confirmed".to_owned(),
        Answer::Accepted { ending: None, .. } => "accepted, and never decided".to_owned(),
        Answer::Accepted {
            ending: Some(ending), ..
        } => match &ending.refused {
            None => "accepted, then confirmed".to_owned(),
            Some(refused) => format!("accepted, then {}", refused_in_words(refused)),
        },
        Answer::Refused(refused) => refused_in_words(refused).to_owned(),
        Answer::Indeterminate => "outcome unknown".to_owned(),
        Answer::Unexpected { what } => what.clone(),
    }
}

fn refused_in_words(refused: &Refused) -> &'static str {
    match refused {
        Refused::SoldOut => "sold out",
        Refused::AlreadyReserved { .. } => "already reserved",
        Refused::KeyOfAnotherBuyer => "key of another buyer",
        Refused::UnknownSale => "unknown sale",
        Refused::Expired => "expired",
        Refused::Declined => "declined",
        Refused::Cancelled => "cancelled",
        Refused::RateLimited => "rate limited",
        Refused::NotVip => "not a VIP",
    }
}
