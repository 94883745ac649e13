//! A runtime on a thread in a network namespace, for what must run there.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::mpsc;

use crate::netns::Netns;

/// A job that takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(40);

type Job = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The thread; it ends with this value.
#[derive(Debug)]
pub struct Jobs(mpsc::UnboundedSender<Job>);

impl Jobs {
    /// Starts it.
    pub fn start(netns: &Netns) -> Self {
        Self::start_after(netns, || ())
    }

    /// Starts it, and runs `first` on its thread before anything else.
    pub fn start_after(netns: &Netns, first: impl FnOnce() + Send + 'static) -> Self {
        let (jobs, mut queue) = mpsc::unbounded_channel::<Job>();
        netns.spawn(move || {
            first();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                while let Some(job) = queue.recv().await {
                    tokio::spawn(job);
                }
            });
        });
        Self(jobs)
    }

    /// Runs a future there, and does not wait for it.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn run(&self, work: impl Future<Output = ()> + Send + 'static) -> anyhow::Result<()> {
        let sent = self.0.send(Box::pin(work)).ok();
        sent.context("the thread in the namespace is gone")
    }

    /// What a future there gives.
    ///
    /// # Errors
    /// The thread is gone, or it takes too long.
    pub fn call<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let (reply, answer) = std::sync::mpsc::channel();
        self.run(async move {
            // The asker may have given up.
            let _ = reply.send(work.await);
        })?;
        answer
            .recv_timeout(DEADLINE)
            .context("the thread in the namespace does not answer")
    }
}
