//! Cuts a buffer of pages into runs of zero and of other pages. Pure.

use vm_runtime::memory::is_zero;
use vm_runtime::units::PAGE_SIZE;

/// Neighbouring pages of one kind, as indices into the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First page of the run, counted from the start of the buffer.
    pub first: usize,
    /// How many pages.
    pub count: usize,
    /// Whether all of them are zero.
    pub zero: bool,
}

/// The runs of a buffer whose length is a multiple of [`PAGE_SIZE`], in order, without gaps.
pub fn runs(buffer: &[u8]) -> Vec<Run> {
    let mut out: Vec<Run> = Vec::new();
    for (first, page) in buffer.chunks_exact(PAGE_SIZE).enumerate() {
        let zero = is_zero(page);
        match out.last_mut() {
            Some(run) if run.zero == zero => run.count += 1,
            Some(_) | None => out.push(Run {
                first,
                count: 1,
                zero,
            }),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_cover_the_buffer_and_tell_zero_from_data(kinds in prop::collection::vec(any::<bool>(), 0..40)) {
            let mut buffer = vec![0u8; kinds.len() * PAGE_SIZE];
            for (index, _) in kinds.iter().enumerate().filter(|(_, zero)| !**zero) {
                buffer[index * PAGE_SIZE + (index * 97) % PAGE_SIZE] = 1;
            }
            let mut rebuilt = Vec::new();
            for run in runs(&buffer) {
                prop_assert_eq!(run.first, rebuilt.len());
                rebuilt.extend(std::iter::repeat_n(run.zero, run.count));
            }
            prop_assert_eq!(rebuilt, kinds);
        }
    }
}
