//! Moments at which a test kills something, or cuts a link.

/// Set in the environment, it has tests go through all of their moments.
pub const ALL: &str = "MIGRATOR_ALL_MOMENTS";

/// Every second moment, beginning with the one of this number: all of them take longer than one run of all tests may. Where two tests have the same
/// moments, they begin with different ones, and come to all between them.
#[must_use]
pub fn some<T: Copy>(moments: &[T], first: usize) -> Vec<T> {
    match std::env::var_os(ALL) {
        Some(_) => moments.to_vec(),
        None => moments.iter().copied().skip(first).step_by(2).collect(),
    }
}
