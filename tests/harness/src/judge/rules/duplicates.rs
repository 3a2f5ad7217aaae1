//! No duplicates (I3).

use super::Found;
use crate::{
    history::{Micros, Request, Row},
    judge::{Evidence, history_index::HistoryIndex},
};

/// Checks I3. With rows: counts rows taken while their buyer had a live one, or after another row
/// under the same key.
pub(super) fn duplicates(index: &HistoryIndex<'_>) -> Option<Found> {
    if !index.has_rows() {
        return duplicate_confirmations(index);
    }
    let mut too_many: Vec<[&Row; 2]> = vec![];
    for rows in index.rows_of_key.all() {
        too_many.extend(rows.iter().skip(1).map(|row| [rows[0], *row]));
    }
    for rows in index.rows_of_buyer.all() {
        // Of the earlier rows, the one that is live the longest.
        let mut longest: Option<(Micros, &Row)> = None;
        for &row in rows {
            let Some((from_us, until_us)) = row.held_us() else {
                continue;
            };
            match longest {
                Some((live_until_us, other)) if from_us < live_until_us => too_many.push([other, row]),
                _ => {}
            }
            if longest.is_none_or(|(live_until_us, _)| live_until_us < until_us) {
                longest = Some((until_us, row));
            }
        }
    }
    // A row that duplicates both its buyer's and its key's is one case, not two.
    too_many.sort_by_key(|[first, row]| (row.taken_us, row.reservation, first.taken_us, first.reservation));
    too_many.dedup_by_key(|[_, row]| std::ptr::from_ref(*row));
    let &[first, second] = too_many.first()?;
    let whose = if first.buyer == second.buyer {
        format!("buyer {}", first.buyer)
    } else {
        format!("key {}", first.key)
    };
    let requests: Vec<&Request> = [first, second]
        .iter()
        .filter_map(|row| index.answers_of(row.reservation).first())
        .map(|&(_, request)| request)
        .collect();
    Some(Found {
        count: too_many.len() as u64,
        summary: format!(
            "{} reservations too many for their buyer or key; the first is one of {whose}",
            too_many.len()
        ),
        evidence: Some(match requests.len() {
            2 => Evidence::of(&requests),
            _ => Evidence::of_rows(&[first, second]),
        }),
    })
}

/// Checks I3 without rows: a confirmation is final, so two confirmed reservations are a duplicate.
fn duplicate_confirmations(index: &HistoryIndex<'_>) -> Option<Found> {
    let mut requests: Vec<&Request> = index.confirmed().collect();
    let mut too_many: Vec<[&Request; 2]> = vec![];
    requests.sort_unstable_by_key(|request| (request.buyer, request.sent_us, request.request));
    for of_buyer in requests.chunk_by(|one, other| one.buyer == other.buyer) {
        too_many.extend(of_buyer[1..].iter().map(|request| [of_buyer[0], *request]));
    }
    requests.sort_unstable_by(|one, other| {
        (&one.key, one.sent_us, one.request).cmp(&(&other.key, other.sent_us, other.request))
    });
    for of_key in requests.chunk_by(|one, other| one.key == other.key) {
        too_many.extend(of_key[1..].iter().map(|request| [of_key[0], *request]));
    }
    too_many.sort_by_key(|[first, second]| (second.sent_us, second.request, first.sent_us, first.request));
    too_many.dedup_by_key(|[_, second]| std::ptr::from_ref(*second));
    let pair = too_many.first()?;
    Some(Found {
        count: too_many.len() as u64,
        summary: format!(
            "buyers were told of {} reservations too many for their buyer or key",
            too_many.len()
        ),
        evidence: Some(Evidence::of(pair)),
    })
}
