//! Tests that need root.

pub mod images;
pub mod lab;
pub mod netns;
