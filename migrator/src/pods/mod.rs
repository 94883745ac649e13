//! Pods.

pub mod logs;
