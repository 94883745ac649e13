//! Spans of time as people write them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::cli::output::span;

/// Longest span: ten years of 365 days, in seconds.
const LONGEST: u64 = 10 * 365 * 86400;

/// `90s`, `10m`, `12h`, `7d` or a bare number of seconds, as seconds.
pub(super) fn seconds(text: &str) -> Result<u64, String> {
    let bad = || format!("`{text}` is no time: write a number with s, m, h or d, such as 12h");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => return Err(bad()),
    };
    let number: u64 = digits.parse().map_err(|_| bad())?;
    match number.checked_mul(factor) {
        Some(seconds) if seconds <= LONGEST => Ok(seconds),
        Some(_) | None => Err(format!("`{text}` is longer than ten years")),
    }
}

/// The time from now to a moment of Unix time, in its two largest units.
pub(super) fn until(unix_ms: u64) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    span(Duration::from_secs(
        (unix_ms / 1000).saturating_sub(now.as_secs()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read() {
        for (text, expected) in [
            ("0", 0),
            ("90s", 90),
            ("10m", 600),
            ("12h", 43200),
            ("7d", 604800),
        ] {
            assert_eq!(seconds(text), Ok(expected));
        }
        for text in [
            "",
            "h",
            "-1h",
            "1w",
            "1.5h",
            "4000d",
            "99999999999999999999s",
        ] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
