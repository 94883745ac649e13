//! A disk moves to and fro under the writes of QEMU's own NBD client. It holds an ext4, in which one file is written to: whatever was
//! acknowledged is in that file afterwards, and the file system is whole.
#![allow(missing_docs, unreachable_pub)]

mod node;
mod writer;

use anyhow::{Result, ensure};
use node::{Crossing, Node, filled};
use writer::Writer;

/// Data connections.
const LANES: usize = 2;

#[test]
fn what_was_written_is_there_after_moves_to_and_fro() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut here = filled(&dir.path().join("a"))?;
    let mut records = here.records()?;
    for turn in 0..4 {
        let name = if turn % 2 == 0 { "b" } else { "a" };
        let mut writer = Writer::start(&here.socket(), records)?;
        let there = Node::empty(&dir.path().join(name))?;
        let mut crossing = Crossing::begin(&here, &there, LANES)?;
        crossing.round()?;
        // Beside a writer that goes on meanwhile.
        for _ in 0..3 {
            writer.has_written(20)?;
            crossing.round()?;
        }
        writer.has_written(1)?;
        // The guest stops: QEMU waits for what is under way.
        records = writer.end()?;
        let last = crossing.round()?;
        ensure!(last.bytes() > 0, "nothing was left to the freeze: {last:?}");
        crossing.is_equal(&here, &there)?;
        here.remove()?;
        there.holds(&records)?;
        here = there.serve()?;
    }
    Ok(())
}

/// The power of the source fails in the middle of a move: what it has is the disk, with everything that was acknowledged. The next
/// move begins anew, with all of it.
#[test]
fn a_cut_in_the_middle_of_a_move_leaves_the_disk_at_the_source() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let here = filled(&dir.path().join("a"))?;
    let mut writer = Writer::start(&here.socket(), here.records()?)?;
    let there = Node::empty(&dir.path().join("b"))?;
    let mut crossing = Crossing::begin(&here, &there, LANES)?;
    crossing.round()?;
    writer.has_written(20)?;
    let records = writer.cut()?;
    drop(crossing);
    there.remove()?;
    // The service is gone as well: another one opens the file.
    let here = here.restart()?;
    here.holds(&records)?;

    let there = Node::empty(&dir.path().join("b"))?;
    let mut crossing = Crossing::begin(&here, &there, LANES)?;
    crossing.round()?;
    crossing.is_equal(&here, &there)?;
    there.holds(&records)
}
