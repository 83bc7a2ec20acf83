//! Deadlines on the wire: the `grpc-timeout` header, and the time kept back to answer with a reason.
//!
//! A server answers a little before its caller's deadline, so that the caller learns what it waited
//! for and not only that it waited.

use std::time::Duration;

use tonic::{Status, metadata::MetadataMap};

/// The most that a server keeps back of its caller's time.
const MOST_KEPT_BACK: Duration = Duration::from_millis(100);

/// The part of `timeout` after which a server answers with the reason.
#[must_use]
pub fn answer_within(timeout: Duration) -> Duration {
    timeout.saturating_sub((timeout / 5).min(MOST_KEPT_BACK))
}

/// The time that the caller gives, from its `grpc-timeout` header; `None` when it gives no bound.
///
/// # Errors
/// `InvalidArgument` for a header that is not at most eight digits and a unit.
pub fn timeout_of(metadata: &MetadataMap) -> Result<Option<Duration>, Status> {
    let Some(header) = metadata.get("grpc-timeout") else {
        return Ok(None);
    };
    let text = header.to_str().unwrap_or("");
    match parse(text) {
        Some(timeout) => Ok(Some(timeout)),
        None => Err(Status::invalid_argument(format!(
            "grpc-timeout {text:?} is not of the form <at most 8 digits><H|M|S|m|u|n>"
        ))),
    }
}

fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(n * 3600)),
        "M" => Some(Duration::from_secs(n * 60)),
        "S" => Some(Duration::from_secs(n)),
        "m" => Some(Duration::from_millis(n)),
        "u" => Some(Duration::from_micros(n)),
        "n" => Some(Duration::from_nanos(n)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_read() {
        assert_eq!(parse("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(parse("3M"), Some(Duration::from_secs(180)));
        assert_eq!(parse("4S"), Some(Duration::from_secs(4)));
        assert_eq!(parse("00000005m"), Some(Duration::from_millis(5)));
        assert_eq!(parse("6u"), Some(Duration::from_micros(6)));
        assert_eq!(parse("7n"), Some(Duration::from_nanos(7)));
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["", "S", "1", "1s", "123456789S", "-1S", "1é"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_fifth_but_at_most_a_tenth_of_a_second_is_kept_back() {
        let ms = Duration::from_millis;
        assert_eq!(answer_within(ms(100)), ms(80));
        assert_eq!(answer_within(ms(60_000)), ms(59_900));
    }
}
