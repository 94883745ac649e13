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
