//! The streams of a process that runs in a container.

use std::sync::Arc;

use guest_agent::protocol::message::{Blob, EXEC_WINDOW, ExecId, HostMessage, MAX_CHUNK, Stream};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::AgentError;
use super::actor::Command;

/// A process that runs in a container. Dropping it does not end the process: see [`ExecControl::signal`].
#[derive(Debug)]
pub struct Exec {
    /// Its standard input, if one was asked for.
    pub input: Option<ExecInput>,
    /// What it writes.
    pub output: ExecOutput,
    /// Its terminal's size, and signals.
    pub control: ExecControl,
    exit: oneshot::Receiver<i32>,
}

/// The client task's ends of the streams.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) output: mpsc::UnboundedSender<(Stream, Vec<u8>)>,
    pub(super) exit: oneshot::Sender<i32>,
    /// Bytes of input that may still be sent.
    pub(super) room: Arc<Semaphore>,
    /// Bytes of output that the consumer has not taken.
    pub(super) owed: u64,
}

pub(super) fn channel(commands: mpsc::UnboundedSender<Command>, stdin: bool) -> (Exec, Ends) {
    let (output, incoming) = mpsc::unbounded_channel();
    let (exit, code) = oneshot::channel();
    let room = Arc::new(Semaphore::new(EXEC_WINDOW as usize));
    let control = ExecControl { id: 0, commands };
    let exec = Exec {
        input: stdin.then(|| ExecInput {
            control: control.clone(),
            room: room.clone(),
        }),
        output: ExecOutput {
            control: control.clone(),
            incoming,
        },
        control,
        exit: code,
    };
    let ends = Ends {
        output,
        exit,
        room,
        owed: 0,
    };
    (exec, ends)
}

impl Exec {
    pub(super) fn named(mut self, id: ExecId) -> Self {
        self.control.id = id;
        self.output.control.id = id;
        if let Some(input) = &mut self.input {
            input.control.id = id;
        }
        self
    }

    /// Waits for its end: the exit code, or 128 plus the number of the signal that ended it. The output
    /// must be read meanwhile, or the process may block.
    ///
    /// # Errors
    /// [`AgentError::Gone`] if the connection ends first, or the pod moves away.
    pub async fn wait(self) -> Result<i32, AgentError> {
        self.exit.await.map_err(|_| AgentError::Gone)
    }

    /// The streams apart, to be moved into tasks of their own.
    pub fn split(
        self,
    ) -> (
        Option<ExecInput>,
        ExecOutput,
        ExecControl,
        oneshot::Receiver<i32>,
    ) {
        (self.input, self.output, self.control, self.exit)
    }
}

/// Standard input.
#[derive(Debug)]
pub struct ExecInput {
    control: ExecControl,
    room: Arc<Semaphore>,
}

impl ExecInput {
    /// Sends bytes; waits while the process does not take them.
    ///
    /// # Errors
    /// [`AgentError::Gone`].
    pub async fn write(&self, bytes: &[u8]) -> Result<(), AgentError> {
        for piece in bytes.chunks(MAX_CHUNK) {
            let permit = self.room.acquire_many(piece.len() as u32).await;
            permit.map_err(|_| AgentError::Gone)?.forget();
            self.send(piece, false)?;
        }
        Ok(())
    }

    /// Closes the input; on a terminal, sends its end-of-file character.
    ///
    /// # Errors
    /// [`AgentError::Gone`].
    pub fn close(self) -> Result<(), AgentError> {
        self.send(&[], true)
    }

    fn send(&self, piece: &[u8], eof: bool) -> Result<(), AgentError> {
        self.control.send(HostMessage::Stdin {
            exec: self.control.id,
            data: Blob(piece.to_vec()),
            eof,
        })
    }
}

/// Standard output and standard error, in the order in which the guest read them.
#[derive(Debug)]
pub struct ExecOutput {
    control: ExecControl,
    incoming: mpsc::UnboundedReceiver<(Stream, Vec<u8>)>,
}

impl ExecOutput {
    /// The next piece; `None` when the process has ended and all is read.
    pub async fn next(&mut self) -> Option<(Stream, Vec<u8>)> {
        let (stream, data) = self.incoming.recv().await?;
        let credit = HostMessage::OutputCredit {
            exec: self.control.id,
            bytes: data.len() as u32,
        };
        // If the connection is gone, so is whoever wanted the credit.
        self.control.send(credit).ok();
        Some((stream, data))
    }
}

/// Control of the process.
#[derive(Clone, Debug)]
pub struct ExecControl {
    id: ExecId,
    commands: mpsc::UnboundedSender<Command>,
}

impl ExecControl {
    /// The exec's id, unique in the guest's life.
    pub fn id(&self) -> ExecId {
        self.id
    }

    /// Tells its terminal a new size, in characters.
    ///
    /// # Errors
    /// [`AgentError::Gone`].
    pub fn resize(&self, rows: u16, cols: u16) -> Result<(), AgentError> {
        self.send(HostMessage::Resize {
            exec: self.id,
            rows,
            cols,
        })
    }

    /// Sends it a signal, by number.
    ///
    /// # Errors
    /// [`AgentError::Gone`].
    pub fn signal(&self, signal: i32) -> Result<(), AgentError> {
        self.send(HostMessage::ExecSignal {
            exec: self.id,
            signal,
        })
    }

    fn send(&self, message: HostMessage) -> Result<(), AgentError> {
        let command = Command::Tell(message);
        self.commands.send(command).map_err(|_| AgentError::Gone)
    }
}
