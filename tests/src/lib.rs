//! Tests that need root.

pub mod lab;
pub mod netns;
