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
            Frame::Attached { nonce, next_rx, .. } if nonce == self.nonce && !self.attached => {
                if !self.state.numbers.release(next_rx) {
                    return HostInput::Detached(Some(Refusal::UnknownSession));
                }
                self.state.numbers.rewind();
                self.state.established = true;
                self.attached = true;
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
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::super::frame::Decoder;
    use super::*;

    /// A host, a guest, and the two streams between them.
    struct Pair {
        host: HostLink,
        guest: GuestLink,
        to_guest: VecDeque<u8>,
        to_host: VecDeque<u8>,
        guest_decoder: Decoder,
        host_decoder: Decoder,
        nonce: u64,
        got_by_guest: Vec<Vec<u8>>,
        got_by_host: Vec<Vec<u8>>,
    }

    impl Pair {
        fn new() -> Self {
            let mut pair = Self {
                host: HostLink::fresh([1; 16]),
                guest: GuestLink::new(),
                to_guest: VecDeque::new(),
                to_host: VecDeque::new(),
                guest_decoder: Decoder::new(),
                host_decoder: Decoder::new(),
                nonce: 0,
                got_by_guest: Vec::new(),
                got_by_host: Vec::new(),
            };
            pair.attach();
            pair
        }

        fn attach(&mut self) {
            self.nonce += 1;
            self.host.attach(self.nonce);
        }

        fn host_writes(&mut self) {
            let mut out = Vec::new();
            while self.host.pull(&mut out) {}
            self.to_guest.extend(out);
        }

        fn guest_writes(&mut self) {
            let mut out = Vec::new();
            while self.guest.pull(&mut out) {}
            self.to_host.extend(out);
        }

        fn guest_reads(&mut self, count: usize) {
            let count = count.min(self.to_guest.len());
            let bytes: Vec<u8> = self.to_guest.drain(..count).collect();
            let mut frames = Vec::new();
            self.guest_decoder.push(&bytes, |f| frames.push(f));
            for frame in frames {
                if let GuestInput::Message(m) = self.guest.receive(frame) {
                    self.got_by_guest.push(m);
                }
            }
        }

        fn host_reads(&mut self, count: usize) {
            let count = count.min(self.to_host.len());
            let bytes: Vec<u8> = self.to_host.drain(..count).collect();
            let mut frames = Vec::new();
            self.host_decoder.push(&bytes, |f| frames.push(f));
            for frame in frames {
                match self.host.receive(frame) {
                    HostInput::Message(m) => self.got_by_host.push(m),
                    HostInput::Detached(None) => self.attach(),
                    HostInput::Detached(Some(r)) => panic!("refused: {r:?}"),
                    HostInput::Nothing | HostInput::Attached => {}
                }
            }
        }

        /// The connection ends with bytes under way; a new one begins. The state moves as in a migration.
        fn cut(&mut self, keep_to_guest: usize, keep_to_host: usize) {
            self.to_guest.truncate(keep_to_guest);
            self.to_host.truncate(keep_to_host);
            let blob = postcard::to_allocvec(&self.host.state()).expect("serialises");
            let state: HostLinkState = postcard::from_bytes(&blob).expect("comes back");
            self.host = HostLink::resume(state);
            self.host_decoder = Decoder::new();
            self.attach();
        }

        fn run_dry(&mut self) {
            for _ in 0..64 {
                self.host_writes();
                self.guest_writes();
                self.guest_reads(usize::MAX);
                self.host_reads(usize::MAX);
            }
        }
    }

    fn numbered(from: u32, to: u32) -> Vec<Vec<u8>> {
        (from..to).map(|n| n.to_le_bytes().to_vec()).collect()
    }

    #[test]
    fn a_cut_at_any_byte_in_either_direction_loses_and_doubles_nothing() {
        let length = |pair: &mut Pair| {
            pair.run_dry();
            for m in numbered(0, 6) {
                pair.host.send(m.clone()).expect("short");
                pair.guest.send(m).expect("short");
            }
            pair.host_writes();
            pair.guest_writes();
            (pair.to_guest.len(), pair.to_host.len())
        };
        let (to_guest, to_host) = length(&mut Pair::new());
        for at_guest in 0..=to_guest {
            for at_host in 0..=to_host {
                let mut pair = Pair::new();
                length(&mut pair);
                pair.guest_reads(at_guest / 2);
                pair.host_reads(at_host / 2);
                pair.cut(at_guest - at_guest / 2, at_host - at_host / 2);
                pair.guest.send(6u32.to_le_bytes().to_vec()).expect("short");
                pair.run_dry();
                assert_eq!(pair.got_by_guest, numbered(0, 6), "{at_guest} {at_host}");
                assert_eq!(pair.got_by_host, numbered(0, 7), "{at_guest} {at_host}");
                assert!(pair.host.settled());
            }
        }
    }

    #[test]
    fn a_fresh_host_gets_what_the_dead_one_had_not_acknowledged() {
        let mut pair = Pair::new();
        pair.run_dry();
        for m in numbered(0, 4) {
            pair.guest.send(m).expect("short");
        }
        pair.guest_writes();
        pair.host_reads(usize::MAX);
        let mut ack = Vec::new();
        assert!(pair.host.pull_ack(&mut ack));
        pair.to_guest.extend(ack);
        pair.guest_reads(usize::MAX);
        assert_eq!(pair.guest.released(), 4);
        for m in numbered(4, 6) {
            pair.guest.send(m).expect("short");
        }
        pair.guest_writes();
        pair.to_host.truncate(9);
        pair.host = HostLink::fresh([2; 16]);
        pair.attach();
        pair.run_dry();
        assert_eq!(pair.got_by_host, numbered(0, 6));
        pair.host.send(b"hello".to_vec()).expect("short");
        pair.run_dry();
        assert_eq!(pair.got_by_guest, vec![b"hello".to_vec()]);
    }

    #[test]
    fn a_session_that_the_guest_does_not_know_is_refused_and_nothing_changes() {
        let mut pair = Pair::new();
        pair.run_dry();
        pair.guest.send(b"x".to_vec()).expect("short");
        let stranger = Frame::Attach {
            min: 1,
            max: 1,
            session: [9; 16],
            nonce: 5,
            next_rx: 3,
            fresh: false,
        };
        assert_eq!(pair.guest.receive(stranger), GuestInput::Nothing);
        let mut out = Vec::new();
        assert!(pair.guest.pull(&mut out));
        let mut seen = Vec::new();
        Decoder::new().push(&out, |f| seen.push(f));
        let reason = Refusal::UnknownSession;
        assert_eq!(seen, vec![Frame::Refused { nonce: 5, reason }]);
        pair.run_dry();
        assert_eq!(pair.got_by_host, vec![b"x".to_vec()]);
    }

    #[test]
    fn a_repeated_attach_is_answered_again_and_changes_nothing() {
        let mut pair = Pair::new();
        pair.host_writes();
        let again: Vec<u8> = pair.to_guest.iter().copied().collect();
        pair.to_guest.extend(again);
        pair.guest.send(b"x".to_vec()).expect("short");
        pair.run_dry();
        assert_eq!(pair.got_by_host, vec![b"x".to_vec()]);
    }

    #[test]
    fn a_corrupt_frame_makes_the_host_attach_again() {
        let mut pair = Pair::new();
        pair.run_dry();
        for m in numbered(0, 3) {
            pair.host.send(m.clone()).expect("short");
            pair.guest.send(m).expect("short");
        }
        pair.host_writes();
        pair.guest_writes();
        pair.to_guest[4] ^= 0x40;
        pair.to_host[4] ^= 0x40;
        pair.run_dry();
        assert_eq!(pair.got_by_guest, numbered(0, 3));
        assert_eq!(pair.got_by_host, numbered(0, 3));
    }

    #[derive(Clone, Debug)]
    enum Step {
        HostSends(u8),
        GuestSends(u8),
        HostWrites,
        GuestWrites,
        GuestReads(u8),
        HostReads(u8),
        Cut(u8, u8),
        FlipToGuest(u16),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (1u8..4).prop_map(Step::HostSends),
            (1u8..4).prop_map(Step::GuestSends),
            Just(Step::HostWrites),
            Just(Step::GuestWrites),
            any::<u8>().prop_map(Step::GuestReads),
            any::<u8>().prop_map(Step::HostReads),
            (any::<u8>(), any::<u8>()).prop_map(|(a, b)| Step::Cut(a, b)),
            any::<u16>().prop_map(Step::FlipToGuest),
        ]
    }

    proptest! {
        #[test]
        fn every_message_arrives_once_and_in_order(steps in proptest::collection::vec(any_step(), 0..120)) {
            let mut pair = Pair::new();
            let (mut by_host, mut by_guest) = (0u32, 0u32);
            for step in steps {
                match step {
                    Step::HostSends(n) => for _ in 0..n {
                        pair.host.send(by_host.to_le_bytes().to_vec()).expect("short");
                        by_host += 1;
                    },
                    Step::GuestSends(n) => for _ in 0..n {
                        pair.guest.send(by_guest.to_le_bytes().to_vec()).expect("short");
                        by_guest += 1;
                    },
                    Step::HostWrites => pair.host_writes(),
                    Step::GuestWrites => pair.guest_writes(),
                    Step::GuestReads(n) => pair.guest_reads(n.into()),
                    Step::HostReads(n) => pair.host_reads(n.into()),
                    Step::Cut(a, b) => pair.cut(a.into(), b.into()),
                    Step::FlipToGuest(at) => {
                        let len = pair.to_guest.len();
                        if len > 0 {
                            pair.to_guest[usize::from(at) % len] ^= 0x15;
                        }
                    }
                }
            }
            pair.cut(usize::MAX, usize::MAX);
            pair.run_dry();
            prop_assert_eq!(pair.got_by_guest, numbered(0, by_host));
            prop_assert_eq!(pair.got_by_host, numbered(0, by_guest));
            prop_assert!(pair.host.settled());
            prop_assert_eq!(pair.guest.released(), u64::from(by_guest));
        }
    }
}
