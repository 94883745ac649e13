//! What both sides do in the same way: one input at a time goes into the machine, and what it says is carried out in order.
//!
//! ```text
//!   link, steps, helpers ──▶ queue ──┬─ Input ─▶ machine ── Outputs ──▶ one after the other
//!           timer, wish to cancel ───┘              ▲                          │
//!                                                   └────── JournalFailed ─────┘ what follows is dropped
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{Instant as TokioInstant, sleep_until};
use tokio_util::sync::CancellationToken;
use vm_runtime::vm::Vm;

use super::link::Link;
use super::prepare;
use super::steps::blocking_journal;
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::migration::journal::Entry;
use crate::wire::message::Control;

/// What a runner tells its machine. Both machines have an input of the same name for each.
#[derive(Debug)]
pub(super) enum News {
    /// The time to wake has come.
    Tick,
    /// The user or the end of the service wants it stopped.
    Cancel,
    /// The VMM exited, and how.
    VmDied { reason: String },
    /// A step failed, and why.
    Failed { reason: String },
    /// The journal failed, and what followed it was not carried out.
    JournalFailed { reason: String },
}

/// An entry is not durable: what follows it must not happen.
#[derive(Debug)]
pub(super) struct JournalFailed {
    reason: String,
}

/// One side of a migration: its machine, and how each of its outputs is carried out.
pub(super) trait Side {
    /// What its machine hears.
    type Input: From<News>;
    /// What its machine says.
    type Output;

    /// Gives an input to the machine.
    fn handle(&mut self, input: Self::Input) -> Vec<Self::Output>;

    /// Carries out or begins one output.
    async fn carry_out_one(&mut self, output: Self::Output) -> Result<(), JournalFailed>;

    /// Everything that an input led to is carried out.
    fn all_carried_out(&mut self) {}

    /// Gives an input to the machine and carries out what it says.
    async fn input(&mut self, input: Self::Input) {
        let outputs = self.handle(input);
        self.carry_out(outputs).await;
    }

    /// A journal that fails is the machine's very next input, and what followed it is dropped.
    async fn carry_out(&mut self, mut outputs: Vec<Self::Output>) {
        while let Err(JournalFailed { reason }) = self.carry_out_until(outputs).await {
            outputs = self.handle(News::JournalFailed { reason }.into());
        }
        self.all_carried_out();
    }

    /// Stops at a journal that fails.
    async fn carry_out_until(&mut self, outputs: Vec<Self::Output>) -> Result<(), JournalFailed> {
        for output in outputs {
            self.carry_out_one(output).await?;
        }
        Ok(())
    }
}

/// Where the inputs of one machine come from, and the tasks that work for it.
pub(super) struct Runner<I> {
    pub(super) node: Arc<Node>,
    pod: String,
    pub(super) inputs: UnboundedSender<I>,
    queue: UnboundedReceiver<I>,
    pub(super) link: Option<Link>,
    /// Steps under way; a rollback or a discard cancels them.
    pub(super) steps: JoinSet<()>,
    /// Tasks that outlive that: the pump of the packet log, the watch on the VM.
    pub(super) helpers: JoinSet<()>,
    began: Instant,
    wake: Option<TokioInstant>,
    user: CancellationToken,
    /// The machine has been told to cancel, which it is once.
    cancelled: bool,
    pub(super) done: bool,
}

impl<I: From<News> + Send + 'static> Runner<I> {
    /// A runner for a machine of the pod named `pod`; `user` is the user's wish to cancel.
    pub(super) fn new(node: Arc<Node>, pod: String, user: CancellationToken) -> Self {
        let (inputs, queue) = unbounded_channel();
        Self {
            node,
            pod,
            inputs,
            queue,
            link: None,
            steps: JoinSet::new(),
            helpers: JoinSet::new(),
            began: Instant::now(),
            wake: None,
            user,
            cancelled: false,
            done: false,
        }
    }

    /// The machine's clock: microseconds since it began.
    pub(super) fn now(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    /// The next input. Dropping the future loses none.
    pub(super) async fn next(&mut self) -> I {
        let wake = self.wake;
        tokio::select! {
            Some(input) = self.queue.recv() => input,
            () = sleep_until(wake.unwrap_or_else(TokioInstant::now)), if wake.is_some() => {
                self.wake = None;
                News::Tick.into()
            }
            () = self.user.cancelled(), if !self.cancelled => {
                self.cancelled = true;
                News::Cancel.into()
            }
            () = self.node.shutdown.cancelled(), if !self.cancelled => {
                self.cancelled = true;
                News::Cancel.into()
            }
        }
    }

    /// Puts an input into the queue.
    pub(super) fn tell(&self, input: I) {
        // Its other end is here.
        let _ = self.inputs.send(input);
    }

    /// Tells the machine at that time, in microseconds since it began. Replaces an earlier wish.
    pub(super) fn wake_at(&mut self, at: u64) {
        self.wake = Some((self.began + Duration::from_micros(at)).into());
    }

    /// Makes an entry durable.
    pub(super) async fn journal(&self, entry: Entry) -> Result<(), JournalFailed> {
        self.write(entry)
            .await
            .map_err(|reason| JournalFailed { reason })
    }

    /// Makes an entry durable if possible.
    pub(super) async fn note(&self, entry: Entry) {
        if let Err(reason) = self.write(entry).await {
            tracing::error!(pod = self.pod, reason, "the journal stays behind");
        }
    }

    async fn write(&self, entry: Entry) -> Result<(), String> {
        blocking_journal(&self.node, move |journal| journal.apply(&entry)).await
    }

    /// Sends over the link, if one is up.
    pub(super) async fn send(&self, message: impl Into<Control>) {
        if let Some(link) = &self.link {
            // A lost link is reported by its reader, with the cause.
            let _ = link.control.send(message).await;
        }
    }

    /// Runs a step beside the machine.
    pub(super) fn step(&mut self, step: impl Future<Output = Result<I, String>> + Send + 'static) {
        while self.steps.try_join_next().is_some() {}
        let inputs = self.inputs.clone();
        self.steps.spawn(async move {
            let input = step
                .await
                .unwrap_or_else(|reason| News::Failed { reason }.into());
            // The machine may be done.
            let _ = inputs.send(input);
        });
    }

    /// Tells the machine when the VM has exited.
    pub(super) fn watch_vm(&mut self, vm: Arc<Vm>) {
        let inputs = self.inputs.clone();
        self.helpers.spawn(async move {
            let reason = match vm.wait_exit().await {
                Ok(exit) => prepare::died(&exit),
                Err(error) => chain(&error),
            };
            // The machine may be done.
            let _ = inputs.send(News::VmDied { reason }.into());
        });
    }

    /// Ends what works for a machine that is done; its steps are cancelled before.
    pub(super) async fn close(&mut self) {
        self.done = true;
        // What was queued is written before the connection closes.
        if let Some(link) = self.link.take() {
            let _ = link.control.flush().await;
        }
        self.helpers.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers what it heard and what was carried out; its first `fails` journals fail.
    #[derive(Default)]
    struct Recorder {
        fails: u32,
        heard: Vec<String>,
        carried_out: Vec<&'static str>,
    }

    impl Side for Recorder {
        type Input = News;
        type Output = &'static str;

        fn handle(&mut self, input: News) -> Vec<&'static str> {
            self.heard.push(format!("{input:?}"));
            match input {
                News::Tick => vec!["before", "journal", "after", "last"],
                News::JournalFailed { .. } => vec!["journal", "undo"],
                News::Cancel | News::VmDied { .. } | News::Failed { .. } => Vec::new(),
            }
        }

        async fn carry_out_one(&mut self, output: &'static str) -> Result<(), JournalFailed> {
            if output == "journal" && self.fails > 0 {
                self.fails -= 1;
                let reason = "disk full".to_owned();
                return Err(JournalFailed { reason });
            }
            self.carried_out.push(output);
            Ok(())
        }

        fn all_carried_out(&mut self) {
            self.carried_out.push("shown");
        }
    }

    #[tokio::test]
    async fn outputs_are_carried_out_in_order() {
        let mut side = Recorder::default();
        side.input(News::Tick).await;
        let expected = ["before", "journal", "after", "last", "shown"];
        assert_eq!(side.carried_out, expected);
        assert_eq!(side.heard, ["Tick"]);
    }

    #[tokio::test]
    async fn a_journal_that_fails_is_the_next_input_and_what_followed_it_is_dropped() {
        let mut side = Recorder {
            fails: 2,
            ..Recorder::default()
        };
        side.input(News::Tick).await;
        let expected = ["before", "journal", "undo", "shown"];
        assert_eq!(side.carried_out, expected);
        let failed = "JournalFailed { reason: \"disk full\" }";
        assert_eq!(side.heard, ["Tick", failed, failed]);
    }
}
