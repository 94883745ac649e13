//! Load from the client's namespace: a thread that does one thing after the other, or a program.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::process::poll_until;
use crate::{cmd, netns};

/// Load on one server.
pub(super) trait Load {
    /// Things done so far: it grows as long as the server answers.
    fn done(&self) -> u64;

    /// What is wrong with it. Load never ends by itself.
    fn fault(&self) -> Option<String>;

    /// Ends it, and compares what clients were told with what the server has; what was done, in words.
    ///
    /// # Errors
    /// A client saw an error, or the server does not have what it said to have.
    fn end(self: Box<Self>) -> Result<String>;
}

/// A client that does one thing after the other, until it is stopped.
pub(super) struct Client<T> {
    shared: Arc<Shared>,
    thread: JoinHandle<T>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    done: AtomicU64,
    fault: Mutex<Option<String>>,
}

impl<T: Send + 'static> Client<T> {
    /// Starts it: `step` gets what it works with and the number of the step, from 1. It ends with the first error.
    pub(super) fn start(
        mut with: T,
        mut step: impl FnMut(&mut T, u64) -> Result<()> + Send + 'static,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                for number in 1.. {
                    if shared.stop.load(Ordering::Relaxed) {
                        break;
                    }
                    if let Err(error) = step(&mut with, number) {
                        let fault = format!("step {number}: {error:#}");
                        *shared.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
                        break;
                    }
                    shared.done.store(number, Ordering::Relaxed);
                }
                with
            }
        });
        Self { shared, thread }
    }

    /// Steps done.
    pub(super) fn done(&self) -> u64 {
        self.shared.done.load(Ordering::Relaxed)
    }

    /// Why it has ended.
    pub(super) fn fault(&self) -> Option<String> {
        let fault = self.shared.fault.lock();
        fault.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets it finish its step; what it worked with, and how many steps it has done.
    ///
    /// # Errors
    /// A step failed.
    pub(super) fn stop(self) -> Result<(T, u64)> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let shared = Arc::clone(&self.shared);
        let with = self.thread.join();
        let with = with.map_err(|_| anyhow!("the client panicked"))?;
        let fault = shared.fault.lock();
        if let Some(fault) = fault.unwrap_or_else(PoisonError::into_inner).take() {
            bail!("{fault}");
        }
        Ok((with, shared.done.load(Ordering::Relaxed)))
    }
}

/// A program in the client's namespace. It is killed when this is dropped.
pub(super) struct Program {
    what: String,
    child: Child,
    out: File,
    err: File,
}

impl Program {
    /// Starts it.
    ///
    /// # Errors
    /// It cannot be started.
    pub(super) fn start(namespace: &str, command: &mut Command) -> Result<Self> {
        // Files, because a pipe that nobody empties would hold it up.
        let (out, err) = (tempfile::tempfile()?, tempfile::tempfile()?);
        command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(err.try_clone()?);
        Ok(Self {
            what: cmd::show(command),
            child: netns::spawn(namespace, command)?,
            out,
            err,
        })
    }

    /// What it has written to its standard error so far.
    pub(super) fn stderr(&self) -> String {
        text(&self.err)
    }

    /// That it has ended, if it has.
    pub(super) fn ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok()??;
        let said = text(&self.err);
        let last = said.lines().rev().take(5).collect::<Vec<_>>().join(" | ");
        Some(format!("`{}` ended with {status}: {last}", self.what))
    }

    /// Asks it to end by a signal that it takes for that.
    ///
    /// # Errors
    /// It may not be signalled.
    pub(super) fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id())?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("cannot signal `{}`", self.what))
    }

    /// Waits until it has ended well; all that it wrote.
    ///
    /// # Errors
    /// It failed, or has not ended after `limit`.
    pub(super) fn ends_well(mut self, limit: Duration) -> Result<String> {
        let mut status = None;
        poll_until(limit, || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        });
        let said = text(&self.out) + &text(&self.err);
        match status {
            Some(status) if status.success() => Ok(said),
            Some(status) => bail!("`{}` ended with {status}: {}", self.what, said.trim()),
            None => bail!(
                "`{}` has not ended after {limit:?}: {}",
                self.what,
                said.trim()
            ),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// All that a program has written. Read without moving the place where it writes, which both share.
fn text(file: &File) -> String {
    let length = file.metadata().map_or(0, |m| m.len());
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    let read = file.read_at(&mut bytes, 0).unwrap_or(0);
    bytes.truncate(read);
    String::from_utf8_lossy(&bytes).into_owned()
}
