//! Messages to the host: encoding, and the link that keeps them until they are acknowledged.

use guest_agent::protocol::CONDITIONS;
use guest_agent::protocol::link::GuestLink;
use guest_agent::protocol::message::{Event, Failure, GuestMessage, Reply, RequestId};
use guest_agent::protocol::settings::Condition;

#[derive(Default)]
pub(crate) struct Outbox {
    pub(crate) link: GuestLink,
}

impl Outbox {
    /// Queues an event. Returns its ordinal, see [`GuestLink::released`].
    pub(crate) fn event(&mut self, event: Event) -> u64 {
        self.send(&GuestMessage::Event(event))
    }

    /// Queues how a container fares. A host of an earlier version could not read it.
    pub(crate) fn condition(&mut self, condition: Condition) {
        if self.link.version() >= CONDITIONS {
            self.event(Event::Condition(condition));
        }
    }

    /// Queues an answer.
    pub(crate) fn reply(&mut self, id: RequestId, result: Result<Reply, Failure>) {
        self.send(&GuestMessage::Reply { id, result });
    }

    /// See [`GuestLink::released`].
    pub(crate) fn released(&self) -> u64 {
        self.link.released()
    }

    fn send(&mut self, message: &GuestMessage) -> u64 {
        let sent = postcard::to_allocvec(message)
            .map_err(anyhow::Error::from)
            .and_then(|bytes| Ok(self.link.send(bytes)?));
        // Every message is far below the limit: chunks are MAX_CHUNK, the rest names and numbers.
        sent.unwrap_or_else(|e| {
            eprintln!("guest-agent: a message to the host was dropped: {e:#}");
            0
        })
    }
}
