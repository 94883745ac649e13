//! The driver of the lab, the demo and the checks. One file per verb.
//!
//! A library too, so that the tests that need root use the same lab, probe and reports as the demo.

pub mod apps;
pub mod bench;
pub mod check;
pub mod cmd;
pub mod data_image;
pub mod deb;
pub mod demo_image;
pub mod guest;
pub mod iperf;
pub mod lab;
pub mod licences;
pub mod migrate;
pub mod netns;
pub mod oci;
pub mod probe;
pub mod process;
pub mod project;
pub mod qemu10;
pub mod report;
pub mod run;
pub mod sched;
pub mod setup;
pub mod silence;
pub mod soak;
pub mod test;
