//! The service that moves running pods between nodes, and the command line that talks to it.
//!
//! Four movers (`memory`, `image`, `network`, and the VM's device state in `vm-runtime`) do not know
//! each other. One conductor (`migration`) knows the order of things.

#![cfg_attr(
    test,
    allow(
        clippy::duplicate_mod,
        reason = "loom's models compile the source that they try once more"
    )
)]

pub mod api;
pub mod block;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod directory;
pub mod doctor;
pub mod image;
pub mod memory;
pub mod migration;
pub mod network;
pub mod pods;
pub mod registry;
pub mod storage;
pub mod supply;
pub mod templates;
pub mod volumes;
pub mod wire;
