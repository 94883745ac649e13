//! How long tests take: what the harness does not say.

use std::time::{Duration, Instant};

/// So many are named at the end.
const NAMED: usize = 10;

/// The times of tests that run one after the other, by the lines that tell of them.
#[derive(Debug)]
pub(super) struct Times {
    last: Instant,
    tests: Vec<(Duration, String)>,
}

impl Times {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            last: now,
            tests: Vec::new(),
        }
    }

    /// Looks at a line that came just now. If a test has ended with it: how long that took.
    pub(super) fn line(&mut self, line: &str, now: Instant) -> Option<Duration> {
        let took = now - std::mem::replace(&mut self.last, now);
        let name = ended(line)?;
        self.tests.push((took, name.to_owned()));
        Some(took)
    }

    pub(super) fn add(&mut self, other: Self) {
        self.tests.extend(other.tests);
    }

    /// The slowest ones, a line each.
    pub(super) fn slowest(mut self) -> String {
        self.tests.sort_by_key(|(took, _)| std::cmp::Reverse(*took));
        let lines = self.tests.iter().take(NAMED);
        lines
            .map(|(took, name)| format!("{:7.1} s  {name}\n", took.as_secs_f64()))
            .collect()
    }
}

/// The name of the test that a line of the harness tells the end of.
fn ended(line: &str) -> Option<&str> {
    let (name, how) = line.strip_prefix("test ")?.split_once(" ... ")?;
    ["ok", "FAILED"].contains(&how).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_test_is_from_the_line_before_to_its_own() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut times = Times::new(start);
        assert_eq!(times.line("running 3 tests", at(5)), None);
        let took = times.line("test a::short ... ok", at(6));
        assert_eq!(took, Some(Duration::from_secs(1)));
        assert_eq!(times.line("test b ... ignored", at(6)), None);
        let took = times.line("test long ... FAILED", at(9));
        assert_eq!(took, Some(Duration::from_secs(3)));
        let line = "test result: ok. 2 passed; 0 failed; finished in 4.00s";
        assert_eq!(times.line(line, at(9)), None);
        let mut all = Times::new(start);
        all.add(times);
        assert_eq!(all.slowest(), "    3.0 s  long\n    1.0 s  a::short\n");
    }
}
