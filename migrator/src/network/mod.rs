//! The network mover: takes a pod's frames along, and tells the network where the pod is.
//!
//! Every frame for a guest leaves through its TAP, so the programs on the TAP see all of them:
//!
//! ```text
//!   uplink --------------> TAP                   [uplink]: the fast way for small packets, where nothing is to be overtaken
//!   bridge --> [gate] --> TAP --> guest          [guard]: what the guest sends, only where it may run
//!                 |        ^
//!                 v        | inject: packet socket, past qdisc and gate
//!               park --> dataplane thread ==log==> wire ==> the other node's dataplane thread
//! ```
//!
//! * [`NodeNetwork`] holds the programs, pinned so that they work while no service does.
//! * [`Port`] is one pod on one node: the source parks, logs and relays; the destination injects,
//!   announces, and opens the gate when each flow's queue is empty.
//! * [`Ledger`] books each frame once.
//!
//! Order is kept by two counters per flow bucket, `parked` and `done`: an open gate lets a frame pass
//! only when nothing of its bucket waits. So a flip is one store, and no flow overtakes itself.

mod announce;
mod copies;
mod dataplane;
mod error;
mod gate;
mod grace;
mod ledger;
mod log;
mod marker;
mod netlink;
mod node;
mod pins;
mod port;
mod spool;
mod sys;
mod uplink;

pub use announce::{SCHEDULE, announcement};
pub use dataplane::Stage;
pub use error::{AttachError, GateError, NetlinkError, OpenError, PortError};
pub use gate::PROGRAMS;
pub use ledger::{Ledger, Reasons};
pub use log::{FIRST_FRAME_SEQ, FIRST_SEQ, LogItem, LogKind};
pub use node::{ExistingDevices, NodeNetConfig, NodeNetwork, PodNetId, Role, park_name, tap_name};
pub use port::Port;
pub use sys::VNET_HEADER;
pub use uplink::{UplinkPath, XdpChoice};
