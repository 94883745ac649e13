//! The records as a table for people. Pure.

use super::figures::Record;

const HEAD: [&str; 8] = [
    "case",
    "metric",
    "ours",
    "(min-max)",
    "peer",
    "(min-max)",
    "ratio",
    "aim",
];

/// The table, and below it what is missing and what failed.
pub(super) fn render(records: &[Record]) -> String {
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(records.iter().map(row));
    let mut widths = [0; HEAD.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (at, (cell, width)) in row.iter().zip(widths).enumerate() {
            // Names and aims to the left, figures to the right.
            line += &match at {
                0 | 1 | 7 => format!("  {cell:<width$}"),
                _ => format!("  {cell:>width$}"),
            };
        }
        text += line.trim_end();
        text.push('\n');
    }
    let mut told: Vec<&str> = Vec::new();
    for record in records {
        if let Some(note) = record.note.as_deref()
            && !told.contains(&note)
        {
            text += &format!("  {}: {note}\n", record.case);
            told.push(note);
        }
    }
    text
}

fn row(record: &Record) -> [String; HEAD.len()] {
    let aim = match (record.aim.as_str(), record.met) {
        ("", _) => String::new(),
        (aim, true) => format!("{aim}: met"),
        (aim, false) => format!("{aim}: MISSED"),
    };
    [
        record.case.clone(),
        format!("{}, {}", record.metric, record.unit),
        figure(record.ours),
        extremes(record.ours_min, record.ours_max),
        figure(record.peer),
        extremes(record.peer_min, record.peer_max),
        record
            .ratio
            .map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}x")),
        aim,
    ]
}

fn figure(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value.abs() >= 100.0 || value == 0.0 => format!("{value:.0}"),
        Some(value) => format!("{value:.1}"),
    }
}

fn extremes(min: Option<f64>, max: Option<f64>) -> String {
    match (min, max) {
        (Some(min), Some(max)) => format!("({}-{})", figure(Some(min)), figure(Some(max))),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figures::{Aim, Metric, Samples, records};

    #[test]
    fn a_missed_aim_and_a_missing_figure_show() {
        let metrics = [Metric {
            name: "total",
            unit: "ms",
            aims: &[Aim::RatioAtMost(0.5)],
        }];
        let mut peer = Samples::default();
        peer.add(Ok(vec![("total", 1000.0)]));
        peer.add(Ok(vec![("total", 1002.0)]));
        let mut ours = Samples::default();
        ours.add(Ok(vec![("total", 750.75)]));
        let mut all = records("move", "QEMU 10", &metrics, &ours, &peer);
        let none = Samples::unavailable("no verb");
        all.extend(records("replace", "QEMU 10", &metrics, &none, &peer));
        let text = render(&all);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_ascii_whitespace().collect())
            .collect();
        assert_eq!(
            lines[1],
            [
                "move",
                "total,",
                "ms",
                "751",
                "(751-751)",
                "1001",
                "(1000-1002)",
                "0.75x",
                "<=",
                "0.5x:",
                "MISSED"
            ]
        );
        assert_eq!(lines[2][..4], ["replace", "total,", "ms", "-"]);
        assert!(
            text.ends_with("  replace: ours: not available: no verb\n"),
            "{text}"
        );
    }
}
