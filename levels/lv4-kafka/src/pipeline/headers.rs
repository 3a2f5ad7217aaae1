//! The headers of messages. They are untrusted input: any client of the broker can write any.

use std::{
    num::IntErrorKind,
    panic::{AssertUnwindSafe, catch_unwind},
};

use rdkafka::message::{Header, Headers, OwnedHeaders};

/// The number of earlier attempts. A replayed dead letter carries it, too.
pub(super) const ATTEMPTS: &str = "attempts";
/// The name of a command. A message without it is an order.
pub(super) const COMMAND: &str = "command";
/// Why a message is a dead letter.
pub(super) const REASON: &str = "reason";
/// The place of the original message.
pub(super) const ORIGIN_TOPIC: &str = "origin-topic";
pub(super) const ORIGIN_PARTITION: &str = "origin-partition";
pub(super) const ORIGIN_OFFSET: &str = "origin-offset";
/// The length of the payload in bytes, if it was truncated.
pub(super) const LENGTH: &str = "length";
/// Marks the dead letter of this origin as resolved: it was replayed or skipped.
pub(super) const RESOLVED: &str = "resolved";

/// The maximum number of headers that are read: many times what this level writes.
const MAX_HEADERS: usize = 100;

/// The value of the first header with this name. `None` if there is none, or it is not UTF-8.
pub(super) fn text<'a>(headers: Option<&'a impl Headers>, name: &str) -> Option<&'a str> {
    let headers = headers?;
    // rdkafka panics on a header whose name is not UTF-8.
    let header = |index| catch_unwind(AssertUnwindSafe(|| headers.try_get(index))).ok().flatten();
    let mut named = (0..headers.count().min(MAX_HEADERS)).filter_map(header);
    let header = named.find(|header| header.key == name)?;
    str::from_utf8(header.value?).ok()
}

/// The value of [`ATTEMPTS`], at most [`u32::MAX`]. 0 if there is none, or it is not a number.
pub(super) fn attempts(headers: Option<&impl Headers>) -> u32 {
    match text(headers, ATTEMPTS).map(str::parse) {
        Some(Ok(attempts)) => attempts,
        Some(Err(why)) if *why.kind() == IntErrorKind::PosOverflow => u32::MAX,
        _ => 0,
    }
}

/// Headers with these names and values.
pub(super) fn headers_of(headers: &[(&str, impl AsRef<[u8]>)]) -> OwnedHeaders {
    headers.iter().fold(OwnedHeaders::new(), |all, (key, value)| {
        all.insert(Header {
            key,
            value: Some(value.as_ref()),
        })
    })
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// Headers as rdkafka presents them: it panics on a name that is not UTF-8.
    struct Raw(Vec<(Vec<u8>, Option<Vec<u8>>)>);

    impl Headers for Raw {
        fn count(&self) -> usize {
            self.0.len()
        }

        fn try_get(&self, index: usize) -> Option<Header<'_, &[u8]>> {
            let (name, value) = self.0.get(index)?;
            Some(Header {
                key: str::from_utf8(name).expect("rdkafka unwraps the name"),
                value: value.as_deref(),
            })
        }
    }

    fn raw(headers: &[(&[u8], &[u8])]) -> Raw {
        let owned = |&(name, value): &(&[u8], &[u8])| (name.to_vec(), Some(value.to_vec()));
        Raw(headers.iter().map(owned).collect())
    }

    #[test]
    fn attempts_are_counted_as_far_as_they_go() {
        let attempts_of = |value: &[u8]| attempts(Some(&raw(&[(b"attempts", value)])));
        assert_eq!(attempts_of(b"7"), 7);
        assert_eq!(attempts_of(b"4294967295"), u32::MAX);
        assert_eq!(attempts_of(b"99999999999999999999999999"), u32::MAX);
        for junk in [b"".as_slice(), b"-1", b"seven", b"7 ", b"\xff\xfe", "٧".as_bytes()] {
            assert_eq!(attempts_of(junk), 0, "{junk:?}");
        }
        assert_eq!(attempts(None::<&Raw>), 0);
        assert_eq!(attempts(Some(&Raw(vec![(b"attempts".to_vec(), None)]))), 0);
    }

    #[test]
    fn of_duplicates_the_first_counts_and_foreign_names_are_skipped() {
        let headers = raw(&[
            (b"\xff\xfe", b"7"),
            (b"ATTEMPTS", b"7"),
            (b"attempts", b"2"),
            (b"attempts", b"3"),
        ]);
        assert_eq!(attempts(Some(&headers)), 2);
        let many = Raw(vec![(b"x".to_vec(), None); MAX_HEADERS]);
        assert_eq!(text(Some(&many), REASON), None);
    }

    proptest! {
        #[test]
        fn no_headers_are_too_strange(
            names_and_values in vec((
                prop_oneof![Just(b"attempts".to_vec()), Just(b"reason".to_vec()), vec(any::<u8>(), 0..4)],
                prop::option::of(prop_oneof![
                    any::<u64>().prop_map(|number| number.to_string().into_bytes()),
                    vec(any::<u8>(), 0..40)
                ]),
            ), 0..8)
        ) {
            let headers = Raw(names_and_values);
            let first = headers.0.iter().find(|(name, _)| name == REASON.as_bytes());
            let expected = first.and_then(|(_, value)| str::from_utf8(value.as_ref()?).ok());
            prop_assert_eq!(text(Some(&headers), REASON), expected);
            let _ = attempts(Some(&headers));
        }
    }
}
