//! The ledger: every charge and refund, in a file that survives the process.

use std::{
    collections::{HashMap, HashSet},
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// One line of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Line {
    /// The idempotency key of the request. `None`: it had none.
    pub(crate) key: Option<String>,
    /// The reservation that is paid for.
    pub(crate) reservation: Uuid,
    pub(crate) entry: Entry,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Entry {
    /// The price of a ticket was taken.
    Charge,
    /// It was returned.
    Refund,
    /// A charge was declined, and took nothing.
    Declined,
    /// A refund came before its charge, and closed the key: a later charge is declined.
    Void,
}

/// What has come of a key so far.
#[derive(Default)]
struct Key {
    charge: Option<Entry>,
    refunded: bool,
}

/// All charges and refunds.
#[derive(Default)]
pub(crate) struct Ledger {
    lines: Vec<Line>,
    keys: HashMap<String, Key>,
    /// The keys whose charge is being processed: the money is neither taken nor declined.
    processing: HashSet<String>,
    file: Option<File>,
    /// The charge requests that have arrived, repeats included.
    pub(crate) calls: u64,
}

/// Why a refund has to be asked for again: its charge is being processed.
pub(crate) struct StillProcessing;

impl Ledger {
    /// Reads the ledger back from its file, which is created if it is missing. A line without an end
    /// was never answered: whoever wrote it died meanwhile.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new().create(true).append(true).read(true).open(path)?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        let complete = text.rfind('\n').map_or(0, |end| end + 1);
        file.set_len(complete as u64)?;
        let mut ledger = Self::default();
        for line in text[..complete].lines() {
            ledger.apply(serde_json::from_str(line)?);
        }
        ledger.file = Some(file);
        Ok(ledger)
    }

    fn apply(&mut self, line: Line) {
        if let Some(key) = &line.key {
            let state = self.keys.entry(key.clone()).or_default();
            match line.entry {
                Entry::Refund => state.refunded = true,
                Entry::Void => (state.charge, state.refunded) = (Some(Entry::Declined), true),
                charge => state.charge = Some(charge),
            }
        }
        self.lines.push(line);
    }

    /// Writes a line to the file, then applies it: what was answered survives the process.
    fn append(&mut self, key: Option<&str>, reservation: Uuid, entry: Entry) -> io::Result<()> {
        let key = key.map(str::to_owned);
        let line = Line {
            key,
            reservation,
            entry,
        };
        if let Some(file) = &mut self.file {
            let mut text = serde_json::to_vec(&line)?;
            text.push(b'\n');
            file.write_all(&text)?;
        }
        self.apply(line);
        Ok(())
    }

    /// What an earlier request with this key has come to.
    pub(crate) fn earlier(&self, key: Option<&str>) -> Option<Entry> {
        self.keys.get(key?)?.charge
    }

    /// Marks that the charge of this key is being processed.
    pub(crate) fn begin(&mut self, key: Option<&str>) {
        self.processing.extend(key.map(str::to_owned));
    }

    /// Takes or declines the money, once for each key. Without a key, each request is another
    /// charge.
    pub(crate) fn charge(&mut self, key: Option<&str>, reservation: Uuid, entry: Entry) -> io::Result<Entry> {
        if let Some(key) = key {
            self.processing.remove(key);
        }
        if let Some(earlier) = self.earlier(key) {
            return Ok(earlier);
        }
        self.append(key, reservation, entry)?;
        Ok(entry)
    }

    /// Returns the money of a charge, once for each key. If there was no charge, a later one is
    /// declined. Without a key, each request is another refund.
    pub(crate) fn refund(
        &mut self,
        key: Option<&str>,
        reservation: Uuid,
    ) -> io::Result<Result<Entry, StillProcessing>> {
        if key.is_some_and(|key| self.processing.contains(key)) {
            return Ok(Err(StillProcessing));
        }
        let entry = match key.and_then(|key| self.keys.get(key)) {
            Some(Key { refunded: true, .. }) => return Ok(Ok(Entry::Refund)),
            Some(Key {
                charge: Some(Entry::Declined),
                ..
            }) => return Ok(Ok(Entry::Void)),
            Some(_) => Entry::Refund,
            None if key.is_some() => Entry::Void,
            None => Entry::Refund,
        };
        self.append(key, reservation, entry)?;
        Ok(Ok(entry))
    }

    /// The charges and refunds, in their order.
    pub(crate) fn entries(&self) -> Vec<&Line> {
        let moved = |line: &&Line| matches!(line.entry, Entry::Charge | Entry::Refund);
        self.lines.iter().filter(moved).collect()
    }
}
