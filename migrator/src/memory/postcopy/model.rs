//! Every order in which threads can meet over missing pages, by loom: the same source, compiled with loom's atomics and locks.

use loom::sync::Arc;
use loom::thread;
use vm_runtime::units::{PageIndex, PageRange};

use bits::Bits;
use waits::Waits;

mod sync {
    pub(super) use loom::sync::atomic::{AtomicU64, Ordering};
    pub(super) use loom::sync::{Mutex, MutexGuard};
    pub(super) use std::sync::PoisonError;
}

#[path = "bits.rs"]
#[expect(
    dead_code,
    reason = "what is loaded and stored as a whole is not shared"
)]
mod bits;
#[path = "waits.rs"]
mod waits;

const PAGE: PageIndex = PageIndex(3);
const ONE: PageRange = PageRange::new(3, 4);

/// The missing page and who waits for it.
#[derive(Default)]
struct State {
    missing: Option<Bits>,
    asked: Option<Bits>,
    waits: Waits,
}

impl State {
    fn new() -> Arc<Self> {
        let bits = || Some(Bits::new(64));
        let state = Self {
            missing: bits(),
            asked: bits(),
            waits: Waits::default(),
        };
        state.missing().insert(ONE);
        Arc::new(state)
    }

    fn missing(&self) -> &Bits {
        self.missing.as_ref().unwrap()
    }

    /// Whether it has to be asked for by us; and waits that were over at once.
    fn wanted(&self) -> (bool, u32) {
        let mut over = 0;
        let missing = self
            .waits
            .begin(PAGE, || self.missing().contains(PAGE), |_| over += 1);
        let first = missing && self.asked.as_ref().unwrap().insert(ONE) == 1;
        (first, over)
    }

    /// Pages that left the set by us; and waits that this ended.
    fn placed(&self) -> (u64, u32) {
        let mut over = 0;
        let leave = || self.missing().remove(ONE, |_| {});
        let removed = self.waits.placed(ONE, leave, |_| over += 1);
        (removed, over)
    }
}

#[test]
fn a_wait_that_begins_while_the_page_is_placed_never_stays_behind() {
    loom::model(|| {
        let state = State::new();
        let waiter = Arc::clone(&state);
        let waiter = thread::spawn(move || waiter.wanted());
        let (removed, ended) = state.placed();
        let (asks, over) = waiter.join().unwrap();
        assert_eq!(removed, 1);
        assert_eq!(state.waits.len(), 0, "a wait that nobody ends");
        assert!(ended + over <= 1, "a wait is counted once");
        assert!(!asks || ended == 1, "who asks has waited");
    });
}

#[test]
fn a_page_that_comes_twice_leaves_the_set_once_and_every_wait_ends_once() {
    loom::model(|| {
        let state = State::new();
        let (pushed, waiter) = (Arc::clone(&state), Arc::clone(&state));
        let pushed = thread::spawn(move || pushed.placed());
        let waiter = thread::spawn(move || waiter.wanted());
        let (removed, ended) = state.placed();
        let (also_removed, also_ended) = pushed.join().unwrap();
        let (_, over) = waiter.join().unwrap();
        assert_eq!(removed + also_removed, 1);
        assert_eq!(state.waits.len(), 0);
        assert!(ended + also_ended + over <= 1);
    });
}

#[test]
fn of_two_that_wait_for_a_page_one_asks() {
    loom::model(|| {
        let state = State::new();
        let other = Arc::clone(&state);
        let other = thread::spawn(move || other.wanted());
        let (asks, _) = state.wanted();
        let (also_asks, _) = other.join().unwrap();
        assert!(asks != also_asks, "{asks} {also_asks}");
        assert_eq!(state.waits.len(), 1);
    });
}
