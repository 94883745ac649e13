//! Tests that need root.

pub mod bpf;
pub mod inbox;
pub mod jobs;
pub mod lab;
pub mod large_pages;
pub mod moments;
pub mod netns;
pub mod packet;
pub mod programs;
pub mod registry;
pub mod stack;
pub mod tracer;
pub mod xsk;
