//! Tests that need root.

pub mod netns;
