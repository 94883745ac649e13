//! Ceph's own programs, each call with a deadline: a cluster that is down answers nothing at all.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Between two looks whether a program has ended: it takes 50 ms at the least.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// The exit status of `rbd` is the error's number (errno(3)); `rados` says 1 and names it in its message.
const NOT_FOUND: i32 = libc::ENOENT;
const EXISTS: i32 = libc::EEXIST;

/// Why a call of a program failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not installed.
    #[error("`{program}` is not installed: apt-get install ceph-common")]
    NotInstalled {
        /// The program.
        program: &'static str,
    },
    /// It cannot be run.
    #[error("cannot run `{program}`")]
    Run {
        /// The program.
        program: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// No answer.
    #[error(
        "`{program} {verb}` has no answer after {seconds} s: look whether the monitors can be reached, and `ceph -s` for the cluster's health"
    )]
    Timeout {
        /// The program.
        program: &'static str,
        /// What was asked.
        verb: String,
        /// The deadline.
        seconds: u64,
    },
    /// It failed.
    #[error("`{program} {verb}` failed ({status}): {said}")]
    Failed {
        /// The program.
        program: &'static str,
        /// What was asked.
        verb: String,
        /// How it ended.
        status: ExitStatus,
        /// Its last words.
        said: String,
    },
    /// What it printed is not what is expected.
    #[error("`{program} {verb}` printed what cannot be read: {problem}")]
    Strange {
        /// The program.
        program: &'static str,
        /// What was asked.
        verb: String,
        /// What is wrong.
        problem: String,
    },
}

impl ToolError {
    /// Whether what was named is not there.
    pub(super) fn is_not_found(&self) -> bool {
        self.says(NOT_FOUND, "(2) No such file")
    }

    /// Whether it is there already.
    pub(super) fn is_taken(&self) -> bool {
        self.says(EXISTS, "(17) File exists")
    }

    /// Whether somebody else is at it.
    pub(super) fn is_busy(&self) -> bool {
        self.says(libc::EBUSY, "(16) Device or resource busy")
    }

    fn says(&self, code: i32, words: &str) -> bool {
        match self {
            Self::Failed { status, said, .. } => {
                status.code() == Some(code) || said.contains(words)
            }
            Self::NotInstalled { .. }
            | Self::Run { .. }
            | Self::Timeout { .. }
            | Self::Strange { .. } => false,
        }
    }
}

/// How a cluster is reached. The key is named by its file only.
#[derive(Clone, Debug)]
pub(super) struct Access {
    pub(super) conf: PathBuf,
    pub(super) user: String,
    pub(super) key_file: PathBuf,
}

impl Access {
    /// Runs a program to its end, and returns what it printed.
    pub(super) fn run(
        &self,
        program: &'static str,
        args: &[&str],
        input: Option<&mut (dyn Read + Send)>,
        within: Duration,
    ) -> Result<Vec<u8>, ToolError> {
        let verb = args.first().copied().unwrap_or_default().to_owned();
        let mut command = Command::new(program);
        command
            .arg("--conf")
            .arg(&self.conf)
            .args(["--id", &self.user, "--keyfile"])
            .arg(&self.key_file)
            .args(args)
            .stdin(match input {
                Some(_) => Stdio::piped(),
                None => Stdio::null(),
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let failed = |source: std::io::Error| match source.kind() {
            std::io::ErrorKind::NotFound => ToolError::NotInstalled { program },
            _ => ToolError::Run { program, source },
        };
        let child = command.spawn().map_err(failed)?;
        let ended = finish(child, input, within).map_err(failed)?;
        match ended {
            None => Err(ToolError::Timeout {
                program,
                verb,
                seconds: within.as_secs(),
            }),
            Some((status, out, _)) if status.success() => Ok(out),
            Some((status, _, err)) => Err(ToolError::Failed {
                program,
                verb,
                status,
                said: last_words(&err),
            }),
        }
    }
}

type Ended = (ExitStatus, Vec<u8>, Vec<u8>);

/// Feeds a program and hears it out. `None`: its time was up, and it was killed.
fn finish(
    mut child: Child,
    input: Option<&mut (dyn Read + Send)>,
    within: Duration,
) -> std::io::Result<Option<Ended>> {
    let deadline = Instant::now() + within;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            scope.spawn(move || {
                // A program that ends early says why.
                let _ = std::io::copy(input, &mut stdin).and_then(|_| stdin.flush());
            });
        }
        let out = scope.spawn(move || read(stdout));
        let err = scope.spawn(move || read(stderr));
        let status = loop {
            match child.try_wait()? {
                Some(status) => break Some(status),
                None if Instant::now() >= deadline => {
                    child.kill()?;
                    child.wait()?;
                    break None;
                }
                None => thread::sleep(LOOK_EVERY),
            }
        };
        let (out, err) = (out.join(), err.join());
        Ok(status.map(|status| (status, out.unwrap_or_default(), err.unwrap_or_default())))
    })
}

fn read(from: Option<impl Read>) -> Vec<u8> {
    let mut all = Vec::new();
    if let Some(mut from) = from {
        // What was read until then is what it said.
        let _ = from.read_to_end(&mut all);
    }
    all
}

/// The last line with words in it, without progress and time stamps.
fn last_words(err: &[u8]) -> String {
    let text = String::from_utf8_lossy(err);
    let lines: Vec<&str> = text
        .split(['\n', '\r'])
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.contains("% complete"))
        .collect();
    let last = lines.last().copied().unwrap_or("it says nothing");
    last.chars().filter(|c| !c.is_control()).take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access() -> Access {
        Access {
            conf: "/dev/null".into(),
            user: "u".to_owned(),
            key_file: "/dev/null".into(),
        }
    }

    #[test]
    fn a_program_that_does_not_end_is_ended() {
        // `tail` takes none of these options: it is the arguments that make it wait.
        let mut sleeper = Command::new("sleep");
        sleeper.arg("600").stdout(Stdio::piped());
        let child = sleeper.spawn().unwrap();
        let ended = finish(child, None, Duration::from_millis(20)).unwrap();
        assert!(ended.is_none());
    }

    #[test]
    fn what_it_said_and_how_it_ended_comes_back() {
        let mut shell = Command::new("sh");
        shell
            .args([
                "-c",
                "cat; echo >&2 'rbd: clone error: (17) File exists'; exit 17",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = shell.spawn().unwrap();
        let mut input: &[u8] = b"hello";
        let ended = finish(child, Some(&mut input), Duration::from_secs(60)).unwrap();
        let (status, out, err) = ended.unwrap();
        assert_eq!(out, b"hello");
        let error = ToolError::Failed {
            program: "rbd",
            verb: "clone".to_owned(),
            status,
            said: last_words(&err),
        };
        assert!(error.is_taken() && !error.is_not_found(), "{error}");
        assert!(error.to_string().contains("`rbd clone` failed"), "{error}");
    }

    #[test]
    fn a_program_that_is_not_there_says_what_to_install() {
        let none = access().run(
            "rbd-that-is-not-there",
            &["ls"],
            None,
            Duration::from_secs(1),
        );
        assert!(none.unwrap_err().to_string().contains("ceph-common"));
    }

    #[test]
    fn last_words_are_without_progress() {
        let err =
            b"Removing image: 10% complete...\rfailed.\nrbd: error: image still has watchers\n";
        assert_eq!(last_words(err), "rbd: error: image still has watchers");
    }
}
