//! Printing: JSON values, tables, and the units people read.

use std::io::{self, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::Output;
use crate::api::types::PodSummary;

/// Prints one JSON value as one line.
pub(super) fn json(value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    bytes(&line)
}

/// Prints text and a line's end.
pub(super) fn line(text: &str) -> io::Result<()> {
    bytes(format!("{text}\n").as_bytes())
}

/// Prints bytes at once.
pub(super) fn bytes(data: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(data)?;
    out.flush()
}

/// Prints where a pod is and how it fares.
pub(super) fn pod(pod: &PodSummary, form: Output) -> io::Result<()> {
    match form {
        Output::Json => json(pod),
        Output::Text => line(&format!(
            "{} {} on {}",
            pod.name,
            pod.state.as_str(),
            pod.node
        )),
    }
}

/// Prints rows in columns as wide as their widest cell; the last is not padded.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
    bytes(layout(head, rows).as_bytes())
}

fn layout(head: &[&str], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = head.iter().map(|h| (*h).to_owned()).collect();
    let mut widths = vec![0usize; head.len()];
    for row in std::iter::once(&head).chain(rows) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for row in std::iter::once(&head).chain(rows) {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

/// The time since a moment of Unix time, in its two largest units.
pub(super) fn age(since_unix_ms: u64) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    span(now.saturating_sub(Duration::from_millis(since_unix_ms)))
}

/// A time in its two largest units.
pub(super) fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{}h", seconds / 86400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [
            vec!["web".to_owned(), "running".to_owned()],
            vec!["database".to_owned(), "failed".to_owned()],
        ];
        assert_eq!(
            layout(&["POD", "STATE"], &rows),
            "POD       STATE\nweb       running\ndatabase  failed\n"
        );
    }

    #[test]
    fn spans_show_two_units() {
        for (seconds, text) in [(5, "5s"), (65, "1m5s"), (3700, "1h1m"), (90000, "1d1h")] {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
    }
}
