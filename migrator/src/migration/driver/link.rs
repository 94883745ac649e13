//! The control connection of a migration: what comes in becomes inputs of a machine.

use tokio::sync::mpsc::UnboundedSender;
use tokio::task::AbortHandle;

use crate::api::error::chain;
use crate::wire::conn::Connection;
use crate::wire::control::{self, ControlSender};
use crate::wire::message::Control;

/// What a link tells its machine.
#[derive(Debug)]
pub(super) enum LinkEvent {
    /// A message.
    Message(Control),
    /// The link is lost, and why.
    Lost(String),
}

/// A link that is up. Dropping it closes the connection once what was sent is written.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) control: ControlSender,
    reader: AbortHandle,
}

impl Link {
    /// Starts the connection; each event that `convert` does not drop becomes an input.
    pub(super) fn start<I: Send + 'static>(
        connection: Connection<Control>,
        inputs: UnboundedSender<I>,
        convert: impl Fn(LinkEvent) -> Option<I> + Send + 'static,
    ) -> Self {
        let (sender, mut receiver) = control::start(connection);
        let reader = tokio::spawn(async move {
            loop {
                let event = match receiver.recv().await {
                    Ok(message) => LinkEvent::Message(message),
                    Err(error) => LinkEvent::Lost(chain(&error)),
                };
                let last = matches!(event, LinkEvent::Lost(_));
                let told = convert(event).map_or(Ok(()), |input| inputs.send(input));
                if told.is_err() || last {
                    return;
                }
            }
        });
        Self {
            control: sender,
            reader: reader.abort_handle(),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.reader.abort();
    }
}
