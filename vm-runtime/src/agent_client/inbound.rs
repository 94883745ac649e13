//! What the guest says, and who is told.

use guest_agent::protocol::frame::{Frame, Refusal};
use guest_agent::protocol::link::{HostInput, HostLink};
use guest_agent::protocol::message::{Event, GuestMessage, HostMessage, Stream};

use super::actor::{Actor, random};
use super::{AgentError, ConnectError};

impl Actor {
    /// Deals with one frame.
    pub(super) fn hear(&mut self, frame: Frame) {
        match self.link.receive(frame) {
            HostInput::Nothing => {}
            HostInput::Attached => {
                if let Some(attached) = self.attached.take() {
                    attached.send(Ok(())).ok();
                }
            }
            HostInput::Detached(None) => self.begin(),
            HostInput::Detached(Some(Refusal::UnknownSession)) => {
                tracing::warn!("the guest does not know this session: beginning a fresh one");
                self.link = HostLink::fresh(random());
                self.begin();
            }
            HostInput::Detached(Some(Refusal::Version)) => {
                tracing::error!("the guest's agent speaks another protocol version");
                if let Some(attached) = self.attached.take() {
                    attached.send(Err(ConnectError::Version)).ok();
                }
            }
            HostInput::Message(bytes) => match postcard::from_bytes(&bytes) {
                Ok(GuestMessage::Reply { id, result }) => {
                    if let Some(reply) = self.waiting.remove(&id) {
                        let result = result.map(|r| (id, r)).map_err(AgentError::Refused);
                        if result.is_err() {
                            self.execs.remove(&id);
                        }
                        reply.send(result).ok();
                    }
                }
                Ok(GuestMessage::Event(event)) => self.happen(event),
                Err(error) => {
                    tracing::warn!(%error, "the guest sent a message that cannot be read")
                }
            },
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Output {
                container,
                stream,
                offset,
                data,
            } => self.store(container, stream, offset, &data.0),
            Event::ExecOutput { exec, stream, data } => {
                let bytes = data.0.len() as u32;
                let ends = self.execs.get(&exec);
                if ends.is_none_or(|e| e.output.send((stream, data.0)).is_err()) {
                    // Nobody reads it any more: let the process go on to its end.
                    self.tell(&HostMessage::OutputCredit { exec, bytes });
                }
            }
            Event::StdinCredit { exec, bytes } => {
                if let Some(ends) = self.execs.get(&exec) {
                    ends.room.add_permits(bytes as usize);
                }
            }
            Event::ExecExited { exec, code } => {
                if let Some(ends) = self.execs.remove(&exec) {
                    ends.room.close();
                    ends.exit.send(code).ok();
                }
            }
            event @ (Event::Ready { .. }
            | Event::Started { .. }
            | Event::ContainerExited { .. }
            | Event::Stopped
            | Event::Error { .. }) => {
                if let Event::Error { context, message } = &event {
                    tracing::warn!(%context, %message, "the guest's agent reports an error");
                }
                // Nobody may be listening.
                self.events.send(event).ok();
            }
        }
    }

    /// Gives output to the sink, without what it has already.
    fn store(&mut self, container: String, stream: Stream, offset: u64, data: &[u8]) {
        let end = offset + data.len() as u64;
        let stored = self.sink.last_offset(&container, stream);
        if end > stored {
            let known = stored.saturating_sub(offset) as usize;
            self.sink
                .append(&container, stream, offset + known as u64, &data[known..]);
        }
        self.offsets.insert((container, stream), end);
    }
}
