//! The gate's word, and what it decides.

use crate::Counter;

/// What the gate of a pod does with a frame for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Mode {
    /// Drop: the pod does not live here, and the copy that counts is another node's. Zero, so that a
    /// fresh map is shut.
    Shut = 0,
    /// Pass to the TAP, unless an earlier frame of the same bucket is still parked.
    Local = 1,
    /// Park everything.
    Hold = 2,
    /// Park everything: the service relays it to the node that the pod has gone to.
    Forward = 3,
    /// As [`Forward`](Self::Forward), but a bucket that has nothing parked goes to the other node through the kernel's tunnel.
    Tunnel = 4,
}

/// The state of one pod's gate: one aligned `u64`, so that one store flips it.
///
/// ```text
/// bits  0..8   mode
/// bit   8      may_send: frames from the guest may leave
/// bit   9      settled, see the module `settled`
/// bits 16..32  slot
/// bits 32..64  epoch
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    /// What happens to frames for the guest.
    pub mode: Mode,
    /// Whether frames from the guest pass: only on the node that may run it.
    pub may_send: bool,
    /// Whose gate it is; a word in another slot's place opens nothing.
    pub slot: u16,
    /// Grows with every flip, so that two words of one slot are never the same.
    pub epoch: u32,
}

impl Gate {
    const MAY_SEND: u64 = 1 << 8;

    /// The word that the map holds.
    pub const fn to_word(self) -> u64 {
        let send = if self.may_send { Self::MAY_SEND } else { 0 };
        self.mode as u64 | send | (self.slot as u64) << 16 | (self.epoch as u64) << 32
    }

    /// The word after this one that lets nothing through.
    pub const fn shut(self, slot: u16) -> Self {
        Self {
            mode: Mode::Shut,
            may_send: false,
            slot,
            epoch: self.epoch.wrapping_add(1),
        }
    }

    /// Reads a word. An unknown mode is shut and may not send: whoever wrote it is newer than this code.
    pub const fn from_word(word: u64) -> Self {
        let (mode, known) = match word as u8 {
            0 => (Mode::Shut, true),
            1 => (Mode::Local, true),
            2 => (Mode::Hold, true),
            3 => (Mode::Forward, true),
            4 => (Mode::Tunnel, true),
            5.. => (Mode::Shut, false),
        };
        Self {
            mode,
            may_send: known && word & Self::MAY_SEND != 0,
            slot: (word >> 16) as u16,
            epoch: (word >> 32) as u32,
        }
    }
}

/// What becomes of a frame, and the counter that books it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// On to the TAP.
    Pass(Counter),
    /// Into the park, after `parked` of its bucket was raised.
    Park(Counter),
    /// Into the park only to be seen by the service: no bucket waits for it.
    Show(Counter),
    /// Into the tunnel; if there is none, into the park like the frames of a bucket that waits.
    Tunnel(Counter),
    /// Out of the uplink, as the bridge sends whatever it knows to be there.
    Out(Counter),
    /// Dropped.
    Drop(Counter),
}

impl Verdict {
    /// The counter that books the frame.
    pub const fn counter(self) -> Counter {
        match self {
            Self::Pass(c)
            | Self::Park(c)
            | Self::Show(c)
            | Self::Tunnel(c)
            | Self::Out(c)
            | Self::Drop(c) => c,
        }
    }

    /// Of a broadcast or multicast frame the other node has a copy of its own, so none goes into the tunnel.
    #[inline(always)]
    pub const fn of_group(self, is_group: bool) -> Self {
        match self {
            Self::Tunnel(_) if is_group => Self::Drop(Counter::RefusedGroup),
            Self::Pass(_)
            | Self::Park(_)
            | Self::Show(_)
            | Self::Tunnel(_)
            | Self::Out(_)
            | Self::Drop(_) => self,
        }
    }

    /// A frame from the node's own bridge, once the network sends to the pod's new place: it takes that way too. Whatever waits in its
    /// bucket is in the log, whose end the other node waits for before it takes what comes by the new way. Not for group frames, of which the
    /// bridge has sent a copy there itself.
    #[inline(always)]
    pub const fn of_own_bridge(self) -> Self {
        match self {
            Self::Park(Counter::ParkedHold | Counter::ParkedForward) | Self::Tunnel(_) => {
                Self::Out(Counter::SentOut)
            }
            Self::Pass(_) | Self::Park(_) | Self::Show(_) | Self::Out(_) | Self::Drop(_) => self,
        }
    }
}

/// Decides about a frame for the guest. `own_echo`: its source is the pod's own MAC. `parked` and `done`
/// are the counters of its bucket.
#[inline(always)]
pub fn verdict(gate: Gate, slot: u16, own_echo: bool, parked: u64, done: u64) -> Verdict {
    if gate.slot != slot {
        return Verdict::Drop(Counter::RefusedNoSlot);
    }
    // `done` never passes `parked`; the signed difference forgives it if it ever did.
    let waits = parked.wrapping_sub(done) as i64 > 0;
    match gate.mode {
        Mode::Shut => Verdict::Drop(Counter::RefusedShut),
        Mode::Local if waits => Verdict::Park(Counter::ParkedLocal),
        Mode::Local => Verdict::Pass(Counter::Passed),
        Mode::Hold | Mode::Forward if own_echo => Verdict::Show(Counter::RefusedEcho),
        Mode::Hold => Verdict::Park(Counter::ParkedHold),
        Mode::Forward => Verdict::Park(Counter::ParkedForward),
        // The end of the old way has long been seen.
        Mode::Tunnel if own_echo => Verdict::Drop(Counter::RefusedEcho),
        Mode::Tunnel if waits => Verdict::Park(Counter::ParkedForward),
        Mode::Tunnel => Verdict::Tunnel(Counter::ForwardedTunnel),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODES: [Mode; 5] = [
        Mode::Shut,
        Mode::Local,
        Mode::Hold,
        Mode::Forward,
        Mode::Tunnel,
    ];

    fn gate(mode: Mode) -> Gate {
        Gate {
            mode,
            may_send: true,
            slot: 7,
            epoch: 9,
        }
    }

    #[test]
    fn a_word_reads_back_as_it_was_written() {
        for mode in MODES {
            for may_send in [false, true] {
                let gate = Gate {
                    mode,
                    may_send,
                    slot: 0xfedc,
                    epoch: 0xdead_beef,
                };
                assert_eq!(Gate::from_word(gate.to_word()), gate);
            }
        }
    }

    #[test]
    fn zero_and_unknown_words_are_shut_and_silent() {
        for word in [0, 0x0000_0001_0000_0105, 0x1ff, u64::MAX] {
            let gate = Gate::from_word(word);
            assert_eq!((gate.mode, gate.may_send), (Mode::Shut, false), "{word:x}");
        }
    }

    #[test]
    fn the_word_keeps_its_layout() {
        assert_eq!(gate(Mode::Hold).to_word(), 0x0000_0009_0007_0102);
    }

    #[test]
    fn local_passes_only_a_bucket_that_has_nothing_waiting() {
        let local = |parked, done| verdict(gate(Mode::Local), 7, false, parked, done);
        assert_eq!(local(5, 5), Verdict::Pass(Counter::Passed));
        assert_eq!(local(6, 5), Verdict::Park(Counter::ParkedLocal));
        assert_eq!(local(0, u64::MAX), Verdict::Park(Counter::ParkedLocal));
        assert_eq!(local(5, 6), Verdict::Pass(Counter::Passed));
    }

    #[test]
    fn hold_and_forward_park_even_an_empty_bucket() {
        assert_eq!(
            verdict(gate(Mode::Hold), 7, false, 0, 0),
            Verdict::Park(Counter::ParkedHold)
        );
        assert_eq!(
            verdict(gate(Mode::Forward), 7, false, 0, 0),
            Verdict::Park(Counter::ParkedForward)
        );
    }

    #[test]
    fn a_bucket_goes_into_the_tunnel_when_nothing_of_it_waits_and_a_group_frame_never() {
        let tunnel = |parked, done| verdict(gate(Mode::Tunnel), 7, false, parked, done);
        assert_eq!(tunnel(6, 5), Verdict::Park(Counter::ParkedForward));
        assert_eq!(
            tunnel(6, 5).of_group(true),
            Verdict::Park(Counter::ParkedForward)
        );
        let straight = Verdict::Tunnel(Counter::ForwardedTunnel);
        assert_eq!(tunnel(6, 6), straight);
        assert_eq!(tunnel(6, 6).of_group(false), straight);
        assert_eq!(
            tunnel(6, 6).of_group(true),
            Verdict::Drop(Counter::RefusedGroup)
        );
        assert_eq!(
            verdict(gate(Mode::Tunnel), 7, true, 6, 6),
            Verdict::Drop(Counter::RefusedEcho)
        );
    }

    #[test]
    fn a_sender_on_the_nodes_own_bridge_takes_the_new_way_once_there_is_one() {
        let out = Verdict::Out(Counter::SentOut);
        for (mode, waits) in [
            (Mode::Hold, false),
            (Mode::Hold, true),
            (Mode::Forward, false),
            (Mode::Forward, true),
            (Mode::Tunnel, false),
            (Mode::Tunnel, true),
        ] {
            let verdict = verdict(gate(mode), 7, false, u64::from(waits), 0);
            assert_eq!(verdict.of_own_bridge(), out, "{mode:?}, {waits}");
        }
        for (mode, waits) in [
            (Mode::Shut, false),
            (Mode::Local, false),
            (Mode::Local, true),
        ] {
            let verdict = verdict(gate(mode), 7, false, u64::from(waits), 0);
            assert_eq!(verdict.of_own_bridge(), verdict, "{mode:?}, {waits}");
        }
        let echo = verdict(gate(Mode::Forward), 7, true, 0, 0);
        assert_eq!(echo.of_own_bridge(), echo);
    }

    #[test]
    fn an_echo_of_the_pod_is_shown_only_while_it_is_away() {
        let echo = |mode| verdict(gate(mode), 7, true, 3, 3);
        assert_eq!(echo(Mode::Hold), Verdict::Show(Counter::RefusedEcho));
        assert_eq!(echo(Mode::Forward), Verdict::Show(Counter::RefusedEcho));
        assert_eq!(echo(Mode::Local), Verdict::Pass(Counter::Passed));
        assert_eq!(echo(Mode::Shut), Verdict::Drop(Counter::RefusedShut));
    }

    #[test]
    fn a_word_of_another_slot_opens_nothing() {
        for mode in MODES {
            assert_eq!(
                verdict(gate(mode), 8, false, 0, 0),
                Verdict::Drop(Counter::RefusedNoSlot)
            );
        }
    }
}
