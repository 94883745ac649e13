//! One counter per verdict.

/// Number of counters in a row; a power of two leaves room without moving the others.
pub const COUNTERS_LEN: usize = 32;

/// The last place of a row is no counter: the gate's word that the programs of this CPU have logged last. It lies here because the
/// programs have the row at hand for every frame.
pub const LOGGED_WORD: usize = COUNTERS_LEN - 1;

/// Index of a counter in a row. Each frame that reaches the gate is booked by exactly one of the
/// counters up to [`Counter::RefusedNoSlot`], or by [`Counter::SentOut`], [`Counter::ForwardedTunnel`] or [`Counter::RefusedGroup`]; each one
/// that the uplink's program takes past it by [`Counter::Fast`] or [`Counter::ForwardedXdp`]; each frame from the guest by [`Counter::Sent`], [`Counter::SentBound`] or
/// [`Counter::Blocked`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Counter {
    /// LOCAL, and nothing of its bucket waits: went on to the TAP.
    Passed = 0,
    /// LOCAL, but its bucket still waits: queued behind it.
    ParkedLocal = 1,
    /// HOLD: parked.
    ParkedHold = 2,
    /// FORWARD: parked, for the service to relay.
    ParkedForward = 3,
    /// SHUT: dropped, since the copy that counts is another node's.
    RefusedShut = 4,
    /// From the pod's own MAC while it is away: its announcement, echoed by the switch. Shown to the service, never delivered.
    RefusedEcho = 5,
    /// The device is in no slot, or its gate holds no valid word: dropped.
    RefusedNoSlot = 6,
    /// From the guest, and it may send.
    Sent = 7,
    /// From the guest, and it may not send: dropped.
    Blocked = 8,
    /// From the uplink straight to the TAP, past bridge and gate.
    Fast = 9,
    /// Of those, what the TAP's full queue did not take.
    FastLost = 10,
    /// How often it did not: the kernel adds one to the device's own counter of drops each time, however many were lost.
    FastFull = 11,
    /// FORWARD or TUNNEL, from this node's own bridge, which the network's change has reached: sent out of the uplink.
    SentOut = 12,
    /// Came out of the tunnel for this slot's pod. Its gate books it as any other frame.
    Landed = 13,
    /// TUNNEL: a broadcast or multicast frame, of which the other node has its own copy.
    RefusedGroup = 14,
    /// TUNNEL: went to the other node through the tunnel.
    ForwardedTunnel = 15,
    /// From the guest, of a flow that another node translates: sent there through the tunnel.
    SentBound = 16,
    /// Came out of the tunnel from a pod that has left, of a flow that this node translates: taken for this node's own. In the row of no slot.
    Homed = 17,
    /// TUNNEL: went to the other node straight from the uplink, past bridge and gate.
    ForwardedXdp = 18,
    /// Of those, what the device did not take that they were to leave by. In the row of no slot: a batch may be of several pods.
    ForwardedXdpLost = 19,
}

impl Counter {
    /// All of them, in order.
    pub const ALL: [Self; 20] = [
        Self::Passed,
        Self::ParkedLocal,
        Self::ParkedHold,
        Self::ParkedForward,
        Self::RefusedShut,
        Self::RefusedEcho,
        Self::RefusedNoSlot,
        Self::Sent,
        Self::Blocked,
        Self::Fast,
        Self::FastLost,
        Self::FastFull,
        Self::SentOut,
        Self::Landed,
        Self::RefusedGroup,
        Self::ForwardedTunnel,
        Self::SentBound,
        Self::Homed,
        Self::ForwardedXdp,
        Self::ForwardedXdpLost,
    ];
}

const _: () = assert!(Counter::ALL.len() <= LOGGED_WORD);

/// The counters of one slot, on one CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct CounterRow(pub [u64; COUNTERS_LEN]);

impl CounterRow {
    /// The value of one counter.
    pub const fn get(&self, counter: Counter) -> u64 {
        self.0[counter as usize]
    }

    /// Every frame that reached the gate, or went past it on the fast way.
    pub const fn seen(&self) -> u64 {
        self.get(Counter::Passed)
            + self.get(Counter::ParkedLocal)
            + self.get(Counter::ParkedHold)
            + self.get(Counter::ParkedForward)
            + self.get(Counter::RefusedShut)
            + self.get(Counter::RefusedEcho)
            + self.get(Counter::RefusedNoSlot)
            + self.get(Counter::SentOut)
            + self.get(Counter::RefusedGroup)
            + self.get(Counter::ForwardedTunnel)
            + self.get(Counter::ForwardedXdp)
            + self.get(Counter::Fast)
    }
}
