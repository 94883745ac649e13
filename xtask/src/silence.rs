//! What a probe's two lists of times say: loss, doubles, order, silence. Pure.

/// One answer, as it came: the packet's number, and when, in microseconds of Unix time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The number that was sent.
    pub sequence: u64,
    /// When the client's kernel saw it.
    pub at_us: u64,
}

/// The probe's result.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Summary {
    /// Packets that left.
    pub sent: u64,
    /// Of these, those that were answered at least once.
    pub received: u64,
    /// Those that never were.
    pub lost: u64,
    /// Answers beyond the first one.
    pub duplicated: u64,
    /// First answers that came after the answer to a later packet.
    pub reordered: u64,
    /// Longest time between two answers, in milliseconds.
    pub longest_silence_ms: f64,
    /// Longest time from a packet to its first answer, in milliseconds: a blackout, or a queue.
    pub longest_round_trip_ms: f64,
}

/// The same, counted while answers come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Whether each packet from `whole` on was answered.
    seen: std::collections::VecDeque<bool>,
    /// Every packet below this number was answered.
    pub whole: u64,
    /// Answers beyond the first one.
    pub duplicated: u64,
    /// First answers that came after the answer to a later packet.
    pub reordered: u64,
}

impl Tally {
    /// Counts one answer. A number so far ahead that it cannot have been sent is left out.
    pub fn add(&mut self, sequence: u64) {
        const FAR: usize = 1 << 24;
        let Some(ahead) = sequence.checked_sub(self.whole) else {
            self.duplicated += 1;
            return;
        };
        let Some(ahead) = usize::try_from(ahead).ok().filter(|ahead| *ahead < FAR) else {
            return;
        };
        if self.seen.len() <= ahead {
            self.seen.resize(ahead + 1, false);
        } else if self.seen[ahead] {
            self.duplicated += 1;
            return;
        } else {
            self.reordered += 1;
        }
        self.seen[ahead] = true;
        while self.seen.front() == Some(&true) {
            self.seen.pop_front();
            self.whole += 1;
        }
    }
}

/// Counts. `sent_us[i]` is when packet `i` left; `answers` are in the order of their arrival.
pub fn summarise(sent_us: &[u64], answers: &[Answer]) -> Summary {
    let mut seen = vec![false; sent_us.len()];
    let mut highest = None;
    let mut summary = Summary {
        sent: sent_us.len() as u64,
        ..Summary::default()
    };
    for answer in answers {
        let Some(first) = usize::try_from(answer.sequence)
            .ok()
            .and_then(|index| seen.get_mut(index))
        else {
            continue;
        };
        if std::mem::replace(first, true) {
            summary.duplicated += 1;
            continue;
        }
        summary.received += 1;
        let sent_at_us = sent_us[answer.sequence as usize];
        let round_trip_ms = answer.at_us.saturating_sub(sent_at_us) as f64 / 1e3;
        summary.longest_round_trip_ms = summary.longest_round_trip_ms.max(round_trip_ms);
        if highest.is_some_and(|highest| answer.sequence < highest) {
            summary.reordered += 1;
        } else {
            highest = Some(answer.sequence);
        }
    }
    summary.lost = summary.sent - summary.received;
    let last_sent = sent_us.last().copied();
    summary.longest_silence_ms = longest(answers, last_sent, 0, u64::MAX);
    summary
}

/// A packet that was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundTrip {
    /// When it left, in microseconds of Unix time.
    pub sent_us: u64,
    /// Until its first answer.
    pub took_us: u64,
}

/// The round trips of all packets that were answered, in the order in which these left.
pub fn round_trips(sent_us: &[u64], answers: &[Answer]) -> Vec<RoundTrip> {
    let mut first = vec![None; sent_us.len()];
    for answer in answers {
        if let Some(first) = usize::try_from(answer.sequence)
            .ok()
            .and_then(|index| first.get_mut(index))
        {
            first.get_or_insert(answer.at_us);
        }
    }
    sent_us
        .iter()
        .zip(first)
        .filter_map(|(sent_us, answered_us)| {
            Some(RoundTrip {
                sent_us: *sent_us,
                took_us: answered_us?.saturating_sub(*sent_us),
            })
        })
        .collect()
}

/// Longest time without an answer, in milliseconds, of all silences that touch `[from_us, until_us]`. A silence is not cut
/// at the window's edges. Packets that still leave after the last answer make a silence as well.
pub fn longest(answers: &[Answer], last_sent_us: Option<u64>, from_us: u64, until_us: u64) -> f64 {
    let times = answers.iter().map(|answer| answer.at_us);
    let ends = times.clone().skip(1).chain(last_sent_us);
    let longest = times
        .zip(ends)
        .filter(|(start, end)| *end >= from_us && *start <= until_us)
        .map(|(start, end)| end.saturating_sub(start))
        .max()
        .unwrap_or(0);
    longest as f64 / 1e3
}

/// The lowest numbers that were never answered, with the time at which they left: for a message about a loss.
pub fn unanswered(sent_us: &[u64], answers: &[Answer], at_most: usize) -> Vec<(u64, u64)> {
    let mut seen = vec![false; sent_us.len()];
    for answer in answers {
        if let Some(first) = usize::try_from(answer.sequence)
            .ok()
            .and_then(|index| seen.get_mut(index))
        {
            *first = true;
        }
    }
    sent_us
        .iter()
        .enumerate()
        .filter(|(index, _)| !seen[*index])
        .map(|(index, at)| (index as u64, *at))
        .take(at_most)
        .collect()
}

/// Median and extremes of figures.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Spread {
    /// The least.
    pub min: f64,
    /// Half are below.
    pub median: f64,
    /// 95 of 100 are at or below (nearest rank).
    pub p95: f64,
    /// The greatest.
    pub max: f64,
}

/// The spread of `figures`; none of an empty list.
pub fn spread(figures: &[f64]) -> Option<Spread> {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (min, max) = (*sorted.first()?, *sorted.last()?);
    let middle = sorted.len() / 2;
    let median = if sorted.len().is_multiple_of(2) {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    } else {
        sorted[middle]
    };
    let p95 = sorted[(sorted.len() * 95).div_ceil(100) - 1];
    Some(Spread {
        min,
        median,
        p95,
        max,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(list: &[(u64, u64)]) -> Vec<Answer> {
        list.iter()
            .map(|&(sequence, at_us)| Answer { sequence, at_us })
            .collect()
    }

    #[test]
    fn a_late_answer_is_reordered_and_a_second_one_duplicated() {
        let sent = [0, 200, 400, 600, 800];
        let got = answers(&[(0, 100), (2, 500), (1, 510), (2, 520), (9, 600)]);
        let summary = summarise(&sent, &got);
        assert_eq!((summary.sent, summary.received, summary.lost), (5, 3, 2));
        assert_eq!((summary.duplicated, summary.reordered), (1, 1));
        assert_eq!(unanswered(&sent, &got, 9), [(3, 600), (4, 800)]);
    }

    #[test]
    fn a_round_trip_ends_with_the_first_answer() {
        let got = answers(&[(2, 500), (0, 510), (2, 900), (9, 910)]);
        let trips: Vec<(u64, u64)> = round_trips(&[0, 200, 400], &got)
            .into_iter()
            .map(|trip| (trip.sent_us, trip.took_us))
            .collect();
        assert_eq!(trips, [(0, 510), (400, 100)]);
    }

    #[test]
    fn counting_on_the_way_finds_the_same_as_counting_at_the_end() {
        let mut tally = Tally::default();
        let mut got = Vec::new();
        for sequence in [0, 2, 1, 2, 0, 4, 5, 5, 7, 6] {
            tally.add(sequence);
            got.push((sequence, 0));
        }
        let summary = summarise(&[0; 8], &answers(&got));
        assert_eq!((tally.duplicated, tally.reordered), (3, 2));
        assert_eq!((summary.duplicated, summary.reordered), (3, 2));
        assert_eq!(tally.whole, 3);
        tally.add(3);
        assert_eq!((tally.whole, tally.reordered), (8, 3));
        tally.add(u64::MAX);
        assert_eq!(tally.whole, 8);
    }

    #[test]
    fn only_a_silence_that_touches_the_window_counts() {
        let got = answers(&[(0, 0), (1, 50_000), (2, 51_000), (3, 91_000), (4, 92_000)]);
        assert_eq!(longest(&got, None, 60_000, 70_000), 40.0);
        assert_eq!(longest(&got, None, 0, u64::MAX), 50.0);
        assert_eq!(longest(&got, None, 91_500, u64::MAX), 1.0);
    }

    #[test]
    fn a_pod_that_falls_silent_for_good_is_noticed() {
        let sent: Vec<u64> = (0..10).map(|index| index * 1_000).collect();
        let got = answers(&[(0, 100), (1, 1_100)]);
        assert_eq!(summarise(&sent, &got).longest_silence_ms, 7.9);
    }

    #[test]
    fn nothing_sent_and_nothing_answered_is_no_silence() {
        assert_eq!(summarise(&[], &[]), Summary::default());
    }

    #[test]
    fn spread_of_even_and_odd_counts() {
        assert_eq!(spread(&[]), None);
        assert_eq!(
            spread(&[3.0, 1.0, 2.0]),
            Some(Spread {
                min: 1.0,
                median: 2.0,
                p95: 3.0,
                max: 3.0
            })
        );
        assert_eq!(spread(&[4.0, 1.0]).unwrap().median, 2.5);
    }
}
