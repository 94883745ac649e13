//! What can go wrong.

/// One accident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accident {
    /// The source's service is killed, and started again a little later. Its VM stays as it is.
    CrashSource,
    /// The same at the destination.
    CrashDestination,
    /// The same at both.
    CrashBoth,
    /// The link is lost, with all that is under way.
    CutAndLose,
    /// The link is lost, and what is under way still arrives.
    CutAndDeliver,
    /// The link is lost and no dial succeeds for a while.
    Outage,
    /// The user cancels at the source.
    Cancel,
    /// The user cancels at the destination.
    CancelDestination,
    /// The source's VMM dies.
    SourceVmDies,
    /// The destination's VMM dies.
    DestinationVmDies,
    /// A step of the source fails.
    SourceFails,
    /// A step of the destination fails.
    DestinationFails,
    /// The source's disk is full for the next entry that must be written.
    SourceDiskFull,
    /// The destination's disk is full for the next entry that must be written.
    DestinationDiskFull,
    /// The next message arrives twice.
    Double,
}

/// All of them.
pub(super) const EVERY: [Accident; 15] = [
    Accident::CrashSource,
    Accident::CrashDestination,
    Accident::CrashBoth,
    Accident::CutAndLose,
    Accident::CutAndDeliver,
    Accident::Outage,
    Accident::Cancel,
    Accident::CancelDestination,
    Accident::SourceVmDies,
    Accident::DestinationVmDies,
    Accident::SourceFails,
    Accident::DestinationFails,
    Accident::SourceDiskFull,
    Accident::DestinationDiskFull,
    Accident::Double,
];
