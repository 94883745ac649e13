//! The stream that `rbd import-diff` reads (doc/dev/rbd-diff.rst of Ceph, version 1), of a sparse file: what is a hole there is none of
//! it, so that an empty file system of any size is a few megabytes.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use crate::block::Extent;

const HEADER: &[u8] = b"rbd diff v1\n";
/// Bytes of one record of data.
const PIECE: u64 = 1 << 20;

/// The stream of a file.
pub(super) struct Diff {
    file: File,
    /// What is to come, the next one last.
    left: Vec<Extent>,
    ready: io::Cursor<Vec<u8>>,
    ended: bool,
}

impl Diff {
    /// Of the data of a file of `size` bytes.
    pub(super) fn new(file: File, size: u64, data: &[Extent]) -> Self {
        let mut head = HEADER.to_vec();
        head.push(b's');
        head.extend(size.to_le_bytes());
        let mut left: Vec<Extent> = data.iter().flat_map(pieces).collect();
        left.reverse();
        Self {
            file,
            left,
            ready: io::Cursor::new(head),
            ended: false,
        }
    }
}

fn pieces(extent: &Extent) -> impl Iterator<Item = Extent> {
    let (start, end) = (extent.offset, extent.end());
    (start..end)
        .step_by(PIECE as usize)
        .map(move |offset| Extent {
            offset,
            len: PIECE.min(end - offset),
        })
}

impl Read for Diff {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.ready.read(into)?;
            if read > 0 || into.is_empty() || self.ended {
                return Ok(read);
            }
            let next = match self.left.pop() {
                Some(extent) => {
                    let mut record = vec![b'w'];
                    record.extend(extent.offset.to_le_bytes());
                    record.extend(extent.len.to_le_bytes());
                    let at = record.len();
                    record.resize(at + extent.len as usize, 0);
                    self.file
                        .read_exact_at(record.get_mut(at..).unwrap_or_default(), extent.offset)?;
                    record
                }
                None => {
                    self.ended = true;
                    vec![b'e']
                }
            };
            self.ready = io::Cursor::new(next);
            if self.ended {
                return self.ready.read(into);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_stream_has_the_size_the_data_and_an_end() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 3000]).unwrap();
        let data = [Extent {
            offset: 16,
            len: 32,
        }];
        let mut stream = Vec::new();
        Diff::new(file, 1 << 40, &data)
            .read_to_end(&mut stream)
            .unwrap();
        let mut wanted = b"rbd diff v1\ns".to_vec();
        wanted.extend((1_u64 << 40).to_le_bytes());
        wanted.push(b'w');
        wanted.extend(16_u64.to_le_bytes());
        wanted.extend(32_u64.to_le_bytes());
        wanted.extend([7; 32]);
        wanted.push(b'e');
        assert_eq!(stream, wanted);
    }

    #[test]
    fn long_extents_are_cut() {
        let extent = Extent {
            offset: 5,
            len: 2 * PIECE + 1,
        };
        let lengths: Vec<u64> = pieces(&extent).map(|piece| piece.len).collect();
        assert_eq!(lengths, [PIECE, PIECE, 1]);
    }
}
