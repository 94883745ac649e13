//! Why tests failed, for the end of the output: what the harness prints in between is long.

/// So many lines of a test are kept, counted from the one that tells why it failed.
const LINES: usize = 12;

/// So many characters of a line.
const WIDTH: usize = 400;

/// The reasons, by the lines of the harness.
#[derive(Debug, Default)]
pub(super) struct Failures {
    tests: Vec<Failure>,
    /// The lines belong to the last test.
    inside: bool,
}

#[derive(Debug)]
struct Failure {
    name: String,
    /// Empty up to the line that tells why.
    why: Vec<String>,
    /// What follows tells where, not why.
    told: bool,
}

impl Failures {
    pub(super) fn line(&mut self, line: &str) {
        if let Some(name) = begins(line) {
            self.inside = true;
            self.tests.push(Failure {
                name: name.to_owned(),
                why: Vec::new(),
                told: false,
            });
        } else if line == "failures:" {
            self.inside = false;
        } else if let (true, Some(test)) = (self.inside, self.tests.last_mut()) {
            test.line(line);
        }
    }

    pub(super) fn add(&mut self, other: Self) {
        self.tests.extend(other.tests);
    }

    /// Each test with the lines that tell why it failed; nothing if none did.
    pub(super) fn text(&self) -> String {
        let lines = self.tests.iter().flat_map(|test| {
            let why = test.why.iter().map(|line| format!("    {line}\n"));
            std::iter::once(format!("failed: {}\n", test.name)).chain(why)
        });
        lines.collect()
    }
}

impl Failure {
    fn line(&mut self, line: &str) {
        let tells = line.starts_with("Error: ") || line.contains("' panicked at ");
        self.told |= !self.why.is_empty() && is_backtrace(line);
        let wanted = !self.told && (tells || !self.why.is_empty());
        if wanted && self.why.len() < LINES && !line.trim().is_empty() {
            self.why.push(line.chars().take(WIDTH).collect());
        }
    }
}

/// Whether a list of stack frames begins with it.
fn is_backtrace(line: &str) -> bool {
    matches!(line, "Stack backtrace:" | "stack backtrace:")
}

/// The name of the test whose output begins with a line.
fn begins(line: &str) -> Option<&str> {
    line.strip_prefix("---- ")?.strip_suffix(" stdout ----")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_that_tell_why_are_kept() {
        let mut failures = Failures::default();
        let output = "\
running 3 tests
Error: of no test
failures:

---- a::first stdout ----
the end of a log:
    a line of it
Error: the pod is gone

Caused by:
    nobody knows

Stack backtrace:
   0: of no use here

---- second stdout ----

thread 'second' panicked at tests/second.rs:1:2:
it was so
note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace


failures:
    a::first
    second
Error: of no test
";
        for line in output.lines() {
            failures.line(line);
        }
        assert_eq!(
            failures.text(),
            "\
failed: a::first
    Error: the pod is gone
    Caused by:
        nobody knows
failed: second
    thread 'second' panicked at tests/second.rs:1:2:
    it was so
    note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace
"
        );
    }

    #[test]
    fn long_reasons_are_cut() {
        let mut failures = Failures::default();
        failures.line("---- long stdout ----");
        for _ in 0..2 * LINES {
            failures.line(&format!("Error: {}", "x".repeat(2 * WIDTH)));
        }
        let text = failures.text();
        assert_eq!(text.lines().count(), 1 + LINES);
        assert!(text.lines().all(|line| line.len() <= WIDTH + 4));
    }
}
