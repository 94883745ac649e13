//! A gate at which nothing waits passes frames without looking into them.
//!
//! In LOCAL a frame is parked only behind another one of its bucket. So once no bucket has anything parked, and no program runs that
//! has seen it otherwise, nothing is parked any more until the word changes. The service finds that out, and says it in a bit of the
//! word itself: with it, the word is all that the gate has to read. Every flip writes a new word, which lacks the bit.
//!
//! The service reads the word, then each bucket's `done` and `parked`, and finds nothing waiting; waits until every run that began before
//! has ended; finds the word and each `parked` unchanged; and sets the bit by an exchange that fails if the word has changed since. No run parks a frame later:
//! one that does read `parked > done` after the first look, whose `done` has at least the value of the first look, so `parked` had
//! grown before it, after the second look found it unchanged; then the run that made it grow is another one that parked, and there is no first one.

use crate::Mode;

/// The bit.
const SETTLED: u64 = 1 << 9;
/// The bits that must be right for a frame to pass by the word alone.
const LOOKED_AT: u64 = 0xff | SETTLED | 0xffff << 16;

/// Whether frames for the pod in `slot` pass by this word alone.
#[inline(always)]
pub const fn is_settled(word: u64, slot: u16) -> bool {
    word & LOOKED_AT == Mode::Local as u64 | SETTLED | (slot as u64) << 16
}

/// The word of the same flip, with the bit.
pub const fn settle(word: u64) -> u64 {
    word | SETTLED
}

/// The same for all words of one flip.
#[inline(always)]
pub const fn flip_of(word: u64) -> u64 {
    word & !SETTLED
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gate;

    const LOCAL: Gate = Gate {
        mode: Mode::Local,
        may_send: true,
        slot: 7,
        epoch: 9,
    };

    #[test]
    fn only_a_local_gate_of_its_own_slot_settles() {
        let word = LOCAL.to_word();
        assert!(!is_settled(word, 7), "a flip writes no such word");
        assert!(is_settled(settle(word), 7));
        assert!(!is_settled(settle(word), 8));
        let silent = Gate {
            may_send: false,
            ..LOCAL
        };
        assert!(is_settled(settle(silent.to_word()), 7));
        for mode in [Mode::Shut, Mode::Hold, Mode::Forward, Mode::Tunnel] {
            let other = Gate { mode, ..LOCAL };
            assert!(!is_settled(settle(other.to_word()), 7), "{mode:?}");
        }
        assert!(!is_settled(u64::MAX, 0xffff));
    }

    #[test]
    fn a_settled_word_is_of_the_same_flip_and_says_the_same() {
        let word = LOCAL.to_word();
        assert_eq!(flip_of(settle(word)), word);
        assert_eq!(Gate::from_word(settle(word)), LOCAL);
        let next = Gate { epoch: 10, ..LOCAL };
        assert_ne!(flip_of(settle(next.to_word())), flip_of(settle(word)));
    }
}
