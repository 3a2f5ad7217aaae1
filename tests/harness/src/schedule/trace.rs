//! The trace of a schedule: the events of all requests in order. Tests print it, the runner shows
//! it, and the book includes it.

use std::fmt;

use comfy_table::{Table, TableStyle, presets};

/// The events of a schedule, in order.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// The name of each request, in the order in which they were added.
    pub requests: Vec<String>,
    /// Every step of every request, in order.
    pub events: Vec<Event>,
}

/// One step of one request.
#[derive(Clone, Debug)]
pub struct Event {
    /// Index into [`Trace::requests`].
    pub request: usize,
    /// What happened.
    pub kind: EventKind,
}

/// What a request did.
#[derive(Clone, Debug)]
pub enum EventKind {
    /// The request passed a scheduling point.
    Passed {
        /// The point's name.
        step: &'static str,
        /// The value that the strategy reported there.
        saw: Option<String>,
        /// `levels/…/file.rs:12`.
        place: String,
    },
    /// The request waits for another.
    Waits {
        /// The reason, such as `waits for Ann's row lock`.
        why: String,
    },
    /// The request got its answer.
    Answered {
        /// The answer in words.
        answer: String,
    },
}

impl Trace {
    /// The trace as a Markdown table, for the book.
    pub fn markdown(&self) -> String {
        self.table(presets::ASCII_MARKDOWN)
    }

    /// A column for each request, a row for each event.
    fn table(&self, style: TableStyle) -> String {
        let mut table = Table::new();
        table.load_style(style);
        let names = self.requests.iter().map(String::as_str);
        table.set_header(["#"].into_iter().chain(names).chain(["where"]));
        for (index, event) in self.events.iter().enumerate() {
            let (text, place) = match &event.kind {
                EventKind::Passed { step, saw, place } => {
                    let saw = saw.as_ref().map(|saw| format!(": {saw}"));
                    let file = place.rsplit('/').next().unwrap_or(place);
                    (format!("{step}{}", saw.unwrap_or_default()), file)
                }
                EventKind::Waits { why } => (why.clone(), ""),
                EventKind::Answered { answer } => (format!("→ {answer}"), ""),
            };
            let mut cells = vec![String::new(); self.requests.len() + 2];
            cells[0] = (index + 1).to_string();
            cells[event.request + 1] = text;
            cells[self.requests.len() + 1] = place.to_owned();
            table.add_row(cells);
        }
        table.trim_fmt()
    }
}

impl fmt::Display for Trace {
    /// The trace as a table for a terminal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.table(presets::UTF8_FULL_CONDENSED))
    }
}
