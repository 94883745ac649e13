//! What each counter is called, and what it counts: for people and for programs that read them.

use crate::{Counter, Mode};

impl Counter {
    /// Its name, as reports show it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::ParkedLocal => "parked_local",
            Self::ParkedHold => "parked_hold",
            Self::ParkedForward => "parked_forward",
            Self::RefusedShut => "refused_shut",
            Self::RefusedEcho => "refused_echo",
            Self::RefusedNoSlot => "refused_no_slot",
            Self::Sent => "sent",
            Self::Blocked => "blocked",
            Self::Fast => "fast",
            Self::FastLost => "fast_lost",
            Self::FastFull => "fast_full",
            Self::SentOut => "sent_out",
            Self::Landed => "landed",
            Self::RefusedGroup => "refused_group",
            Self::ForwardedTunnel => "forwarded_tunnel",
            Self::SentBound => "sent_bound",
            Self::Homed => "homed",
            Self::ForwardedXdp => "forwarded_xdp",
            Self::ForwardedXdpLost => "forwarded_xdp_lost",
        }
    }

    /// What it counts, in a line.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Passed => "for the guest, passed straight to its TAP",
            Self::ParkedLocal => "for the guest, queued behind frames of its flow that still wait",
            Self::ParkedHold => "for the guest, parked while it moves",
            Self::ParkedForward => {
                "for the guest, parked to be relayed to the node it has moved to"
            }
            Self::RefusedShut => {
                "for the guest, dropped: it is not here, and another node's copy counts"
            }
            Self::RefusedEcho => {
                "the pod's own announcement, brought back by the switch: not delivered"
            }
            Self::RefusedNoSlot => "dropped: the device has no valid gate",
            Self::Sent => "from the guest, let out",
            Self::Blocked => "from the guest, dropped: it may not run here",
            Self::Fast => "for the guest, straight from the uplink to its TAP",
            Self::FastLost => "of those, what the TAP's full queue did not take",
            Self::FastFull => "how many times it did not",
            Self::SentOut => {
                "for the guest, from this node's own bridge: sent out of the uplink to where it has gone"
            }
            Self::Landed => "came out of the tunnel; booked once more by what became of it",
            Self::RefusedGroup => {
                "broadcast or multicast, dropped: the node it has moved to has its own copy"
            }
            Self::ForwardedTunnel => {
                "for the guest, sent through the tunnel to the node it has moved to"
            }
            Self::SentBound => {
                "from the guest, sent through the tunnel to the node that translates its flow"
            }
            Self::Homed => {
                "from a pod that has left, came out of the tunnel to be translated by this node"
            }
            Self::ForwardedXdp => {
                "for the guest, sent straight from the uplink to the node it has moved to"
            }
            Self::ForwardedXdpLost => {
                "of all such frames of this node, what the device did not take that they were to leave by"
            }
        }
    }
}

impl Mode {
    /// Its name, as reports show it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Shut => "shut",
            Self::Local => "local",
            Self::Hold => "hold",
            Self::Forward => "forward",
            Self::Tunnel => "tunnel",
        }
    }
}
