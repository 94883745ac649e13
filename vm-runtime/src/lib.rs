//! One pod, one small VM: specifications, the QEMU process, its guest memory, and the agent inside.
//!
//! What is absent: no networking policy, no migration order, no wire. This crate starts, stops,
//! saves, loads and watches a VM; `migrator` decides when.

pub mod agent_client;
pub mod command_line;
pub mod initramfs;
pub mod memory;
pub mod pod;
pub mod probe;
pub mod qemu;
pub mod qmp;
pub mod sched;
pub mod spec;
pub mod units;
pub mod vm;
