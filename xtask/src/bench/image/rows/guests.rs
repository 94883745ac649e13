//! Guests with a disk that they write to, under migrator and under QEMU alone: what reading costs them, and what moving them costs.

mod moves;
mod reads;

use anyhow::Result;

use super::Bench;
use crate::bench::stage::{Stage, Which};

/// Guest RAM in MiB.
const MIB: u32 = 512;
/// The disks in MiB; half of each is the load's file.
const SIZES: [u32; 2] = [256, 1024];

pub(super) fn cases(quick: bool) -> Vec<String> {
    let sizes: &[u32] = if quick { &SIZES[..1] } else { &SIZES };
    let mut cases = reads::cases();
    cases.extend(sizes.iter().map(|mib| moves::case(*mib)));
    cases
}

pub(super) fn run(bench: &mut Bench<'_>, wanted: &[String]) -> Result<()> {
    for mib in SIZES {
        let reads = mib == SIZES[0] && reads::cases().iter().any(|case| wanted.contains(case));
        let moves = wanted.contains(&moves::case(mib));
        if !reads && !moves {
            continue;
        }
        let mut stage = Stage::up_with_disks(bench.project, Which::Ten, mib)?;
        if reads {
            reads::measure(bench, &mut stage, wanted)?;
        }
        if moves {
            moves::measure(bench, &mut stage, mib)?;
        }
    }
    Ok(())
}
