//! Exactly once and in order, over a stream that may be cut anywhere.
//!
//! Each side numbers its messages from 0, keeps them until the other has acknowledged them, and after
//! an Attach sends again from the number that the other asks for. Pure: bytes and time stay outside.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::frame::{self, Frame, MAX_PAYLOAD, Refusal, SessionId};
use super::{MAX_VERSION, MIN_VERSION};

/// A message that is longer than a frame may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message of {0} bytes is longer than the link carries ({MAX_PAYLOAD} bytes)")]
pub struct TooLong(pub usize);

/// One side's numbers and its unacknowledged messages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Numbers {
    /// The number of `queue[0]`.
    base: u64,
    queue: VecDeque<Vec<u8>>,
    /// How many of `queue` have been sent since the last Attach.
    #[serde(skip)]
    sent: usize,
    next_rx: u64,
    #[serde(skip)]
    ack_due: bool,
    /// Messages ever released, whatever their numbers were.
    released: u64,
}

enum Turn {
    Next,
    Repeated,
    Missing,
}

impl Numbers {
    /// Queues a message and returns its ordinal: it is released when `released` exceeds it.
    fn push(&mut self, payload: Vec<u8>) -> Result<u64, TooLong> {
        if payload.len() > MAX_PAYLOAD {
            return Err(TooLong(payload.len()));
        }
        let ordinal = self.released + self.queue.len() as u64;
        self.queue.push_back(payload);
        Ok(ordinal)
    }

    /// The other side has everything before `ack`. One that was never sent is not believed.
    fn release(&mut self, ack: u64) -> bool {
        let Some(count) = ack.checked_sub(self.base) else {
            return true;
        };
        let Ok(count) = usize::try_from(count) else {
            return false;
        };
        if count > self.queue.len() {
            return false;
        }
        self.queue.drain(..count);
        self.sent = self.sent.saturating_sub(count);
        self.base = ack;
        self.released += count as u64;
        true
    }

    fn arrive(&mut self, seq: u64) -> Turn {
        self.ack_due = true;
        match seq.cmp(&self.next_rx) {
            std::cmp::Ordering::Equal => {
                self.next_rx += 1;
                Turn::Next
            }
            std::cmp::Ordering::Less => Turn::Repeated,
            std::cmp::Ordering::Greater => Turn::Missing,
        }
    }

    fn renumber(&mut self) {
        self.base = 0;
        self.next_rx = 0;
        self.rewind();
    }

    fn rewind(&mut self) {
        self.sent = 0;
        self.ack_due = false;
    }

    fn next(&mut self) -> Option<Frame> {
        let ack = self.next_rx;
        if let Some(payload) = self.queue.get(self.sent) {
            let seq = self.base + self.sent as u64;
            self.sent += 1;
            self.ack_due = false;
            return Some(Frame::Data {
                seq,
                ack,
                payload: payload.clone(),
            });
        }
        std::mem::take(&mut self.ack_due).then_some(Frame::Ack { ack })
    }
}

/// What a received frame means to the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum GuestInput {
    /// Nothing to do.
    Nothing,
    /// A message, once.
    Message(Vec<u8>),
    /// A host has attached: bytes not yet written belong to the past, drop them.
    Attached {
        /// It is a new session: what the earlier host had begun has no owner any more.
        fresh: bool,
    },
}

/// The guest's side. It lives in guest RAM, so it moves by itself.
#[derive(Debug, Default)]
pub struct GuestLink {
    numbers: Numbers,
    session: Option<SessionId>,
    attached: bool,
    version: u16,
    control: VecDeque<Frame>,
}

impl GuestLink {
    /// A link that no host has attached to.
    pub fn new() -> Self {
        Self::default()
    }

    /// Queues a message. Returns its ordinal, see [`Self::released`].
    pub fn send(&mut self, payload: Vec<u8>) -> Result<u64, TooLong> {
        self.numbers.push(payload)
    }

    /// Messages that hosts have acknowledged since boot: the one with ordinal `n` is released when this exceeds `n`.
    pub fn released(&self) -> u64 {
        self.numbers.released
    }

    /// The version that the host which attached last speaks; 0 before the first.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// Deals with a frame.
    pub fn receive(&mut self, frame: Frame) -> GuestInput {
        match frame {
            Frame::Attach {
                min,
                max,
                session,
                nonce,
                next_rx,
                fresh,
            } => {
                let version = max.min(MAX_VERSION);
                if version < min.max(MIN_VERSION) {
                    return self.refuse(nonce, Refusal::Version);
                }
                let known = self.session == Some(session);
                if !known && fresh {
                    self.session = Some(session);
                    self.numbers.renumber();
                } else if !known || !self.numbers.release(next_rx) {
                    return self.refuse(nonce, Refusal::UnknownSession);
                }
                self.numbers.rewind();
                self.attached = true;
                self.version = version;
                self.control.clear();
                self.control.push_back(Frame::Attached {
                    version,
                    nonce,
                    next_rx: self.numbers.next_rx,
                });
                GuestInput::Attached { fresh: !known }
            }
            Frame::Data { seq, ack, payload } if self.attached => {
                self.numbers.release(ack);
                match self.numbers.arrive(seq) {
                    Turn::Next => return GuestInput::Message(payload),
                    Turn::Repeated => {}
                    Turn::Missing => self.gap(),
                }
                GuestInput::Nothing
            }
            Frame::Ack { ack } if self.attached => {
                self.numbers.release(ack);
                GuestInput::Nothing
            }
            Frame::Data { .. }
            | Frame::Ack { .. }
            | Frame::Attached { .. }
            | Frame::Refused { .. }
            | Frame::Gap => GuestInput::Nothing,
        }
    }

    /// Appends the next frame to write, if there is one.
    pub fn pull(&mut self, out: &mut Vec<u8>) -> bool {
        let next = self
            .control
            .pop_front()
            .or_else(|| self.attached.then(|| self.numbers.next()).flatten());
        next.inspect(|f| frame::encode(f, out)).is_some()
    }

    fn refuse(&mut self, nonce: u64, reason: Refusal) -> GuestInput {
        self.control.push_back(Frame::Refused { nonce, reason });
        GuestInput::Nothing
    }

    fn gap(&mut self) {
        if !self.control.contains(&Frame::Gap) {
            self.control.push_back(Frame::Gap);
        }
    }
}

/// What a received frame means to the host.
#[derive(Debug, PartialEq, Eq)]
pub enum HostInput {
    /// Nothing to do.
    Nothing,
    /// A message, once. It must be dealt with before the next [`HostLink::pull`] acknowledges it.
    Message(Vec<u8>),
    /// The guest has answered the Attach; messages flow.
    Attached,
    /// The guest does not have this session, or says that a frame is missing. Call [`HostLink::attach`]
    /// again; after [`Refusal::UnknownSession`] with a fresh [`HostLink`].
    Detached(Option<Refusal>),
}

/// The host's memory of the link: what has to move with the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLinkState {
    session: SessionId,
    numbers: Numbers,
    /// The guest has this session, as far as the host knows.
    established: bool,
}

/// The host's side.
#[derive(Debug)]
pub struct HostLink {
    state: HostLinkState,
    nonce: u64,
    attached: bool,
    version: u16,
    control: VecDeque<Frame>,
}

impl HostLink {
    /// A new session. `session` must be random: a guest knows its host by it.
    pub fn fresh(session: SessionId) -> Self {
        Self::resume(HostLinkState {
            session,
            numbers: Numbers::default(),
            established: false,
        })
    }

    /// Goes on with a session.
    pub fn resume(mut state: HostLinkState) -> Self {
        state.numbers.rewind();
        Self {
            state,
            nonce: 0,
            attached: false,
            version: 0,
            control: VecDeque::new(),
        }
    }

    /// What has to move: take it when the guest stands still, and deal with no message after it.
    pub fn state(&self) -> HostLinkState {
        self.state.clone()
    }

    /// Whether the guest has answered.
    pub fn attached(&self) -> bool {
        self.attached
    }

    /// The version that the guest speaks, once it has answered; 0 before.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// Whether the guest has acknowledged every message.
    pub fn settled(&self) -> bool {
        self.state.numbers.queue.is_empty()
    }

    /// Begins on a new connection, or again on the same. `nonce` must differ from earlier ones.
    /// Bytes not yet written belong to the past: drop them. Repeat with the same nonce until attached.
    pub fn attach(&mut self, nonce: u64) {
        self.attached = false;
        self.nonce = nonce;
        self.control.clear();
        self.control.push_back(Frame::Attach {
            min: MIN_VERSION,
            max: MAX_VERSION,
            session: self.state.session,
            nonce,
            next_rx: self.state.numbers.next_rx,
            fresh: !self.state.established,
        });
    }

    /// Queues a message.
    pub fn send(&mut self, payload: Vec<u8>) -> Result<u64, TooLong> {
        self.state.numbers.push(payload)
    }

    /// Deals with a frame. Until the guest has answered this Attach, everything else is from the past.
    pub fn receive(&mut self, frame: Frame) -> HostInput {
        match frame {
            Frame::Attached {
                version,
                nonce,
                next_rx,
            } if nonce == self.nonce && !self.attached => {
                if !self.state.numbers.release(next_rx) {
                    return HostInput::Detached(Some(Refusal::UnknownSession));
                }
                self.state.numbers.rewind();
                self.state.established = true;
                self.attached = true;
                self.version = version;
                HostInput::Attached
            }
            Frame::Refused { nonce, reason } if nonce == self.nonce && !self.attached => {
                HostInput::Detached(Some(reason))
            }
            Frame::Data { seq, ack, payload } if self.attached => {
                self.state.numbers.release(ack);
                match self.state.numbers.arrive(seq) {
                    Turn::Next => HostInput::Message(payload),
                    Turn::Repeated => HostInput::Nothing,
                    Turn::Missing => HostInput::Detached(None),
                }
            }
            Frame::Ack { ack } if self.attached => {
                self.state.numbers.release(ack);
                HostInput::Nothing
            }
            Frame::Gap if self.attached => HostInput::Detached(None),
            Frame::Attach { .. }
            | Frame::Attached { .. }
            | Frame::Refused { .. }
            | Frame::Data { .. }
            | Frame::Ack { .. }
            | Frame::Gap => HostInput::Nothing,
        }
    }

    /// Appends the next frame to write, if there is one.
    pub fn pull(&mut self, out: &mut Vec<u8>) -> bool {
        let next = self
            .control
            .pop_front()
            .or_else(|| self.attached.then(|| self.state.numbers.next()).flatten());
        next.inspect(|f| frame::encode(f, out)).is_some()
    }

    /// Appends an acknowledgement and nothing else, for a host that has stopped sending.
    pub fn pull_ack(&mut self, out: &mut Vec<u8>) -> bool {
        let due = self.attached && std::mem::take(&mut self.state.numbers.ack_due);
        if due {
            let ack = self.state.numbers.next_rx;
            frame::encode(&Frame::Ack { ack }, out);
        }
        due
    }
}

#[cfg(test)]
mod tests;
