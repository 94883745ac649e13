//! The control connection as a queue of messages that keeps itself alive.
//!
//! Either side sends a `Ping` every half second whatever else it sends; so whoever hears nothing for three seconds has lost
//! the link. `Ping` and `Pong` never reach the user of this module.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::wire::conn::{Connection, LinkError, Reader, SILENCE, Writer};
use crate::wire::message::{Control, Ping, Pong};

/// Time between two pings.
pub const PING_EVERY: Duration = Duration::from_millis(500);
/// Messages that wait in either direction; with device state that is at most 16 MiB.
const QUEUE: usize = 64;

enum Item {
    Message(Control),
    Flush(oneshot::Sender<()>),
}

/// Sends control messages, in order. Clones share the connection, which closes once all of them are gone and what they sent
/// has been written.
#[derive(Clone, Debug)]
pub struct ControlSender {
    queue: mpsc::Sender<Item>,
}

/// Receives control messages, in order.
#[derive(Debug)]
pub struct ControlReceiver {
    queue: mpsc::Receiver<Result<Control, LinkError>>,
    rtt_us: Arc<AtomicU64>,
}

impl ControlSender {
    /// Queues a message; waits while the queue is full.
    ///
    /// # Errors
    ///
    /// [`LinkError::Closed`] when the link is lost; the receiver has the cause.
    pub async fn send(&self, message: impl Into<Control>) -> Result<(), LinkError> {
        let item = Item::Message(message.into());
        self.queue.send(item).await.map_err(|_| LinkError::Closed)
    }

    /// Waits until everything queued before has been handed to the kernel.
    ///
    /// # Errors
    ///
    /// [`LinkError::Closed`] when the link is lost; the receiver has the cause.
    pub async fn flush(&self) -> Result<(), LinkError> {
        let (done, wait) = oneshot::channel();
        self.queue
            .send(Item::Flush(done))
            .await
            .map_err(|_| LinkError::Closed)?;
        wait.await.map_err(|_| LinkError::Closed)
    }
}

impl ControlReceiver {
    /// The next message that is neither `Ping` nor `Pong`. Cancel safe.
    ///
    /// # Errors
    ///
    /// See [`LinkError`]; after an error every further call fails.
    pub async fn recv(&mut self) -> Result<Control, LinkError> {
        self.queue.recv().await.unwrap_or(Err(LinkError::Closed))
    }

    /// Microseconds that the last ping took to come back, the peer's queues included; `None` before the first.
    pub fn round_trip_us(&self) -> Option<u64> {
        Some(self.rtt_us.load(Ordering::Relaxed)).filter(|us| *us > 0)
    }
}

/// Starts the two tasks that own `connection`. They end when the link is lost, or when both handles have been dropped.
pub fn start(connection: Connection<Control>) -> (ControlSender, ControlReceiver) {
    let (mut reader, writer) = connection.split();
    reader.set_silence(SILENCE);
    let rtt_us = Arc::new(AtomicU64::new(0));
    let (out_tx, out_rx) = mpsc::channel(QUEUE);
    let (in_tx, in_rx) = mpsc::channel(QUEUE);
    // A peer that floods pings gets few pongs: they are for measuring only.
    let (pong_tx, pong_rx) = mpsc::channel(4);
    let epoch = Instant::now();
    tokio::spawn(write(writer, out_rx, pong_rx, in_tx.clone(), epoch));
    tokio::spawn(read(reader, in_tx, pong_tx, Arc::clone(&rtt_us), epoch));
    let sender = ControlSender { queue: out_tx };
    let receiver = ControlReceiver {
        queue: in_rx,
        rtt_us,
    };
    (sender, receiver)
}

async fn write(
    mut writer: Writer<Control>,
    mut queue: mpsc::Receiver<Item>,
    mut pongs: mpsc::Receiver<Pong>,
    errors: mpsc::Sender<Result<Control, LinkError>>,
    epoch: Instant,
) {
    let mut pings = interval_at(Instant::now(), PING_EVERY);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let result: Result<(), LinkError> = async {
        loop {
            tokio::select! {
                biased;
                _ = pings.tick() => {
                    let stamp_us = epoch.elapsed().as_micros() as u64;
                    writer.send(&Ping { stamp_us }.into()).await?;
                }
                Some(pong) = pongs.recv() => writer.send(&pong.into()).await?,
                item = queue.recv() => match item {
                    Some(Item::Message(message)) => {
                        writer.feed(&message).await?;
                        if queue.is_empty() {
                            writer.flush().await?;
                        }
                    }
                    Some(Item::Flush(done)) => {
                        writer.flush().await?;
                        let _ = done.send(());
                    }
                    None => return Ok(()),
                },
            }
        }
    }
    .await;
    match result {
        Ok(()) => {
            let _ = writer.close().await;
        }
        Err(error) => {
            let _ = errors.send(Err(error)).await;
        }
    }
}

async fn read(
    mut reader: Reader<Control>,
    messages: mpsc::Sender<Result<Control, LinkError>>,
    pongs: mpsc::Sender<Pong>,
    rtt_us: Arc<AtomicU64>,
    epoch: Instant,
) {
    loop {
        let next = tokio::select! {
            () = messages.closed() => return,
            next = reader.next() => next,
        };
        let item = match next {
            Ok(Control::Ping(ping)) => {
                let stamp_us = ping.stamp_us;
                let _ = pongs.try_send(Pong { stamp_us });
                continue;
            }
            Ok(Control::Pong(pong)) => {
                let now = epoch.elapsed().as_micros() as u64;
                rtt_us.store(now.saturating_sub(pong.stamp_us).max(1), Ordering::Relaxed);
                continue;
            }
            item => item,
        };
        let last = item.is_err();
        if messages.send(item).await.is_err() || last {
            return;
        }
    }
}
