//! What the guest says, and who is told. The guest is not trusted: what makes no sense is dropped.

use guest_agent::protocol::frame::{Frame, Refusal};
use guest_agent::protocol::link::{HostInput, HostLink};
use guest_agent::protocol::message::{
    EXEC_WINDOW, Event, ExecId, GuestMessage, HostMessage, Stream,
};

use super::actor::{Actor, random};
use super::{AgentError, ConnectError};

/// More streams than any pod has containers to write them: a guest invents them.
const MOST_STREAMS: usize = 1024;

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
            Event::ExecOutput { exec, stream, data } => self.exec_output(exec, stream, data.0),
            Event::StdinCredit { exec, bytes } => {
                if let Some(ends) = self.execs.get(&exec) {
                    // Never more room than there was at first, whatever the guest says.
                    let used = (EXEC_WINDOW as usize).saturating_sub(ends.room.available_permits());
                    ends.room.add_permits(used.min(bytes as usize));
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
            | Event::Condition(_)
            | Event::Error { .. }) => {
                if let Event::Error { context, message } = &event {
                    tracing::warn!(%context, %message, "the guest's agent reports an error");
                }
                // Nobody may be listening.
                self.events.send(event).ok();
            }
        }
    }

    /// Gives output to its exec. A guest that sends more than the window allows loses the exec.
    fn exec_output(&mut self, exec: ExecId, stream: Stream, data: Vec<u8>) {
        let bytes = data.len() as u32;
        let taken = match self.execs.get_mut(&exec) {
            Some(ends) => {
                ends.owed += u64::from(bytes);
                ends.owed <= EXEC_WINDOW && ends.output.send((stream, data)).is_ok()
            }
            None => false,
        };
        if self.execs.get(&exec).is_some_and(|e| e.owed > EXEC_WINDOW) {
            tracing::warn!(exec, "the guest ignores an exec's window");
            self.execs.remove(&exec);
        }
        if !taken {
            // Nobody reads it any more: let the process go on to its end.
            self.tell(&HostMessage::OutputCredit { exec, bytes });
        }
    }

    /// Gives output to the sink, without what it has already.
    fn store(&mut self, container: String, stream: Stream, offset: u64, data: &[u8]) {
        let key = (container, stream);
        let known = self.offsets.contains_key(&key) || self.offsets.len() < MOST_STREAMS;
        let Some(end) = offset.checked_add(data.len() as u64).filter(|_| known) else {
            tracing::warn!("the guest sent output that makes no sense");
            return;
        };
        let stored = self.sink.last_offset(&key.0, stream);
        if end > stored {
            let skip = stored.saturating_sub(offset) as usize;
            let from = offset + skip as u64;
            self.sink.append(&key.0, stream, from, &data[skip..]);
        }
        self.offsets.insert(key, end);
    }
}
