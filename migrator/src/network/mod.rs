//! The network mover: takes a pod's frames along, and tells the network where the pod is.
//!
//! Every frame for a guest leaves through its TAP, so the programs on the TAP see all of them:
//!
//! ```text
//!   uplink --------------> TAP                   [uplink]: the fast way for small packets, where nothing is to be overtaken
//!   bridge --> [gate] --> TAP --> guest          [guard]: what the guest sends, only where it may run
//!  or routes      |        ^
//!                 v        | inject: packet socket, marked for the gate
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

mod allowance;
mod announce;
pub mod conntrack;
mod copies;
mod dataplane;
mod dissect;
mod endpoints;
mod error;
mod gate;
mod grace;
mod ground;
mod landing;
mod ledger;
mod log;
mod marker;
mod netlink;
mod networks;
mod node;
mod pins;
mod port;
mod show;
mod spool;
mod sys;
mod tunnel;
mod uplink;
mod watch;

pub use allowance::{OnOverflow, Overflow, ParkLimits};
pub use announce::{SCHEDULE, announcement};
pub use dataplane::{Backlog, Stage};
pub use dissect::{Fragment, FrameHead, dissect};
pub use endpoints::{
    Claim, ClusterFacts, EndpointFacts, Endpoints, PeerFacts, Refused, SteeredFacts, TakeError,
    Wanted,
};
pub use error::{AttachError, GateError, GroundError, NetlinkError, OpenError, PortError};
pub use gate::{HookFacts, MapFacts, PROGRAMS, ProgramFacts};
pub use ground::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, Ground, Setting, routing_settings};
pub use ledger::{Ledger, Reasons};
pub use log::{FIRST_FRAME_SEQ, FIRST_SEQ, LogItem, LogKind};
pub use networks::{BadNetwork, BadNetworks, MAX_NETWORKS, PodNetwork, PodNetworks};
pub use node::{
    Cluster, ExistingDevices, NewDevices, NodeNetConfig, NodeNetwork, PodNetId, Role, park_name,
    tap_name,
};
pub use port::{Port, idle_tap};
pub use show::{
    ConntrackFacts, CounterFacts, GateFacts, LinkFacts, NodeFacts, PortFacts, QueueFacts, WaitFacts,
};
pub use sys::VNET_HEADER;
pub use tunnel::{NoTunnel, TUNNEL_DEVICE, TunnelConfig, TunnelInfo};
pub use uplink::{UplinkPath, XdpChoice};
pub use watch::Watch;
