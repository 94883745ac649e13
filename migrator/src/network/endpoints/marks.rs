//! Which senders have ended their old way to a pod that has left. Pure.

use std::collections::BTreeMap;

use migrator_ebpf::EndMarker;

/// The end markers of one departure.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    senders: BTreeMap<String, Sender>,
}

#[derive(Debug)]
struct Sender {
    nonce: u64,
    /// Which of its markers have come; empty before the first.
    seen: Vec<bool>,
    left: usize,
}

impl Sender {
    fn has_ended(&self) -> bool {
        !self.seen.is_empty() && self.left == 0
    }
}

impl Marks {
    /// Waits for these nodes, each of which is given a number of its own that nobody can guess.
    pub(crate) fn of(
        senders: impl IntoIterator<Item = String>,
        mut nonce: impl FnMut() -> u64,
    ) -> Self {
        let waits = |name| {
            let sender = Sender {
                nonce: nonce(),
                seen: Vec::new(),
                left: 0,
            };
            (name, sender)
        };
        Self {
            senders: senders.into_iter().map(waits).collect(),
        }
    }

    /// A marker has come. One that is nobody's, or has come before, changes nothing.
    pub(crate) fn note(&mut self, marker: EndMarker) {
        let mut senders = self.senders.values_mut();
        let Some(sender) = senders.find(|sender| sender.nonce == marker.nonce) else {
            return;
        };
        let parts = usize::from(marker.parts);
        if sender.has_ended() || marker.part >= marker.parts {
            return;
        }
        // Another number of CPUs than when it began: all of them again.
        if sender.seen.len() != parts {
            sender.seen = vec![false; parts];
            sender.left = parts;
        }
        if let Some(seen) = sender.seen.get_mut(usize::from(marker.part))
            && !std::mem::replace(seen, true)
        {
            sender.left -= 1;
        }
    }

    /// Whether every sender has ended its old way.
    pub(crate) fn are_complete(&self) -> bool {
        self.senders.values().all(Sender::has_ended)
    }

    /// Those that have not.
    pub(crate) fn missing(&self) -> Vec<&str> {
        let open = self
            .senders
            .iter()
            .filter(|(_, sender)| !sender.has_ended());
        open.map(|(name, _)| name.as_str()).collect()
    }

    /// What a sender that has not ended is to put into its markers.
    pub(crate) fn nonce_of(&self, name: &str) -> Option<u64> {
        let sender = self.senders.get(name)?;
        (!sender.has_ended()).then_some(sender.nonce)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn marks(names: &[&str]) -> Marks {
        let mut next = 100;
        Marks::of(names.iter().map(|name| (*name).to_owned()), || {
            next += 1;
            next
        })
    }

    fn marker(nonce: u64, part: u16, parts: u16) -> EndMarker {
        EndMarker {
            node: 0,
            part,
            parts,
            nonce,
        }
    }

    #[test]
    fn every_sender_must_end_on_every_lane() {
        let mut marks = marks(&["b", "c"]);
        assert_eq!(marks.missing(), ["b", "c"]);
        let nonce = |name: &str, marks: &Marks| marks.nonce_of(name).unwrap();
        let (b, c) = (nonce("b", &marks), nonce("c", &marks));
        for part in 0..3 {
            marks.note(marker(b, part, 4));
            marks.note(marker(b, part, 4));
            marks.note(marker(c, part, 4));
        }
        marks.note(marker(b, 3, 4));
        assert_eq!(marks.missing(), ["c"]);
        assert_eq!(marks.nonce_of("b"), None);
        assert!(!marks.are_complete());
        marks.note(marker(c, 3, 4));
        assert!(marks.are_complete());
    }

    #[test]
    fn nobody_to_wait_for_is_complete() {
        assert!(marks(&[]).are_complete());
    }

    #[test]
    fn what_is_forged_or_malformed_ends_nothing() {
        let mut marks = marks(&["b"]);
        let nonce = marks.nonce_of("b").unwrap();
        marks.note(marker(nonce + 1, 0, 1));
        marks.note(marker(nonce, 0, 0));
        marks.note(marker(nonce, 1, 1));
        assert!(!marks.are_complete());
    }

    #[test]
    fn a_sender_whose_cpus_change_begins_again() {
        let mut marks = marks(&["b"]);
        let nonce = marks.nonce_of("b").unwrap();
        marks.note(marker(nonce, 0, 2));
        marks.note(marker(nonce, 1, 3));
        marks.note(marker(nonce, 2, 3));
        assert!(!marks.are_complete());
        marks.note(marker(nonce, 0, 3));
        assert!(marks.are_complete());
    }

    proptest! {
        #[test]
        fn markers_in_any_order_and_number_end_it_once_all_have_come(
            parts in 1u16..40,
            order in proptest::collection::vec(any::<prop::sample::Index>(), 0..80),
        ) {
            let mut marks = marks(&["b"]);
            let nonce = marks.nonce_of("b").unwrap();
            let mut came = vec![false; usize::from(parts)];
            for index in order {
                let part = index.index(usize::from(parts));
                came[part] = true;
                marks.note(marker(nonce, part as u16, parts));
                prop_assert_eq!(marks.are_complete(), came.iter().all(|came| *came));
            }
        }
    }
}
