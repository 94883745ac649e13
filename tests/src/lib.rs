//! Tests that need root.
