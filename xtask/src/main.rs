//! The driver of the lab, the demo and the checks.

fn main() {}
