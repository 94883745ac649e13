//! The lists of an offer's images: which chunks each has, and in which order they were read. Longer than one message may be, they follow the
//! offer in [pieces](ListPiece).
//!
//! ```text
//! image 0: digest digest ... index index ... | image 1: digest ... | ...        32 bytes a digest, u32 little-endian an index
//! |<-- PIECE -->|<-- PIECE -->|<-- PIECE -->|<- rest ->|
//! ```
//!
//! The offer says how long each list is. So both ends know how many pieces there are, and how long each one is: a piece of another length is
//! an error, and nothing beyond what the offer said is ever kept. That the digests are the right ones shows by the digest over them.

use bytes::Bytes;

use crate::wire::message::{ListLengths, ListPiece};

/// Most chunks that the images of one pod may have together: 64 GiB in chunks of 256 KiB. The answer to the offer names each by up to
/// three bytes, and fits one message.
pub const MAX_CHUNKS: u32 = 1 << 18;
/// Bytes of a piece, but for the last one.
pub const PIECE: usize = 512 << 10;

const DIGEST: usize = 32;
const INDEX: usize = 4;

/// The lists of one image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageList {
    /// SHA-256 of each of its chunks.
    pub chunks: Vec<[u8; DIGEST]>,
    /// Which of them were read, in the order in which they first were. A hint.
    pub order: Vec<u32>,
}

/// Lists that are not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    /// Too long.
    #[error(
        "the pod's images have {found} chunks together, and a pod with more than {MAX_CHUNKS} (64 GiB) does not move: give it smaller images"
    )]
    TooLong {
        /// Chunks of all images.
        found: u64,
    },
    /// More in the order than there are chunks.
    #[error("image {image} has {order} chunks in its order of use, and {chunks} in all")]
    Order {
        /// Which image of the offer.
        image: usize,
        /// As said.
        order: u32,
        /// As said.
        chunks: u32,
    },
    /// A piece that is too long, too short, or one too many.
    #[error(
        "a piece of {found} bytes of the images' lists came where one of {expected} belongs: the peer is broken or of another version"
    )]
    Piece {
        /// Its length.
        found: usize,
        /// What it should be; 0 behind the last one.
        expected: usize,
    },
}

/// How long the lists are, for the offer.
///
/// # Errors
/// [`ListError::TooLong`].
pub fn lengths(lists: &[ImageList]) -> Result<Vec<ListLengths>, ListError> {
    let found: u64 = lists.iter().map(|list| list.chunks.len() as u64).sum();
    if found > u64::from(MAX_CHUNKS) {
        return Err(ListError::TooLong { found });
    }
    let lengths = lists.iter().map(|list| ListLengths {
        chunks: list.chunks.len() as u32,
        order: list.order.len() as u32,
    });
    Ok(lengths.collect())
}

/// The pieces, in order.
pub fn cut(lists: &[ImageList]) -> Vec<ListPiece> {
    let mut all = Vec::new();
    for list in lists {
        all.extend_from_slice(list.chunks.as_flattened());
        all.extend(list.order.iter().flat_map(|index| index.to_le_bytes()));
    }
    let all = Bytes::from(all);
    let starts = (0..all.len()).step_by(PIECE);
    let pieces = starts.map(|at| all.slice(at..all.len().min(at + PIECE)));
    pieces.map(ListPiece).collect()
}

/// Puts the pieces together again.
#[derive(Debug)]
pub struct Gathered {
    lengths: Vec<ListLengths>,
    size: usize,
    bytes: Vec<u8>,
}

impl Gathered {
    /// What an offer says of the lists that follow. Nothing is allocated for them before they come.
    ///
    /// # Errors
    /// [`ListError::TooLong`], [`ListError::Order`].
    pub fn new(lengths: Vec<ListLengths>) -> Result<Self, ListError> {
        let found: u64 = lengths.iter().map(|list| u64::from(list.chunks)).sum();
        if found > u64::from(MAX_CHUNKS) {
            return Err(ListError::TooLong { found });
        }
        let mut size = 0;
        for (image, ListLengths { chunks, order }) in lengths.iter().enumerate() {
            if order > chunks {
                let (order, chunks) = (*order, *chunks);
                return Err(ListError::Order {
                    image,
                    order,
                    chunks,
                });
            }
            size += *chunks as usize * DIGEST + *order as usize * INDEX;
        }
        let bytes = Vec::new();
        Ok(Self {
            lengths,
            size,
            bytes,
        })
    }

    /// Whether no piece is missing.
    pub fn is_complete(&self) -> bool {
        self.bytes.len() == self.size
    }

    /// Takes the next piece.
    ///
    /// # Errors
    /// [`ListError::Piece`].
    pub fn take(&mut self, piece: &ListPiece) -> Result<(), ListError> {
        let expected = PIECE.min(self.size - self.bytes.len());
        let found = piece.0.len();
        if found != expected || found == 0 {
            return Err(ListError::Piece { found, expected });
        }
        self.bytes.extend_from_slice(&piece.0);
        Ok(())
    }

    /// The lists, once they are complete; what is missing is left out.
    pub fn finish(self) -> Vec<ImageList> {
        let mut rest = &self.bytes[..];
        let mut split = |len: usize| {
            let (front, back) = rest.split_at(len.min(rest.len()));
            rest = back;
            front
        };
        let mut one = |list: &ListLengths| {
            let chunks = split(list.chunks as usize * DIGEST).as_chunks().0.to_vec();
            let order = split(list.order as usize * INDEX).as_chunks().0;
            let order = order.iter().map(|index| u32::from_le_bytes(*index));
            ImageList {
                chunks,
                order: order.collect(),
            }
        };
        self.lengths.iter().map(&mut one).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(chunks: u32, order: u32) -> ImageList {
        let digest = |index: u32| {
            let mut digest = [0xab; DIGEST];
            digest[..4].copy_from_slice(&index.to_le_bytes());
            digest
        };
        ImageList {
            chunks: (0..chunks).map(digest).collect(),
            order: (0..order).rev().collect(),
        }
    }

    fn gathered(lists: &[ImageList]) -> Gathered {
        Gathered::new(lengths(lists).unwrap()).unwrap()
    }

    #[test]
    fn the_bytes_of_lists_are_digests_and_then_indices_image_by_image() {
        let lists = [list(2, 1), ImageList::default(), list(1, 0)];
        let mut all = Vec::new();
        for list in &lists {
            all.extend(list.chunks.as_flattened());
            all.extend(list.order.iter().flat_map(|index| index.to_le_bytes()));
        }
        assert_eq!(cut(&lists), [ListPiece(all.into())]);
        assert!(cut(&[]).is_empty());
        assert!(gathered(&[]).is_complete());
    }

    #[test]
    fn the_longest_lists_come_in_few_pieces_that_fit_their_messages() {
        let lists = [list(MAX_CHUNKS - 1, MAX_CHUNKS - 1), list(1, 1)];
        let pieces = cut(&lists);
        assert_eq!(pieces.len(), 18);
        let mut gathered = gathered(&lists);
        for piece in &pieces {
            assert!(!gathered.is_complete());
            gathered.take(piece).unwrap();
        }
        assert!(gathered.is_complete());
        assert_eq!(gathered.finish(), lists);
    }

    #[test]
    fn lists_beyond_the_limit_are_refused_by_both_ends() {
        let found = u64::from(MAX_CHUNKS) + 1;
        let too_long = Err(ListError::TooLong { found });
        assert_eq!(lengths(&[list(MAX_CHUNKS, 0), list(1, 0)]), too_long);
        let claimed = |chunks, order| Gathered::new(vec![ListLengths { chunks, order }; 2]);
        let huge = claimed(u32::MAX, u32::MAX).unwrap_err();
        let found = 2 * u64::from(u32::MAX);
        assert_eq!(huge, ListError::TooLong { found });
        assert!(huge.to_string().contains("64 GiB"), "{huge}");
        let order = claimed(7, 8).unwrap_err();
        assert!(matches!(order, ListError::Order { image: 0, .. }));
    }

    #[test]
    fn a_piece_that_is_one_too_many_or_of_another_length_is_an_error() {
        let lists = [list(20_000, 20_000)];
        let pieces = cut(&lists);
        assert_eq!(pieces.len(), 2);
        let wrong = |pieces: &[&ListPiece]| {
            let mut gathered = gathered(&lists);
            let taken = pieces.iter().try_for_each(|piece| gathered.take(piece));
            let wrong = taken.unwrap_err();
            assert!(matches!(wrong, ListError::Piece { .. }), "{wrong}");
        };
        // The second one first, the first one twice, one too many, an empty one.
        wrong(&[&pieces[1]]);
        wrong(&[&pieces[0], &pieces[0]]);
        wrong(&[&pieces[0], &pieces[1], &pieces[1]]);
        wrong(&[&pieces[0], &pieces[1], &ListPiece(Bytes::new())]);
        wrong(&[&ListPiece(Bytes::new())]);
        wrong(&[&ListPiece(pieces[0].0.slice(1..))]);
        let mut begun = gathered(&lists);
        begun.take(&pieces[0]).unwrap();
        assert!(!begun.is_complete(), "the second one is missing");
    }

    proptest! {
        #[test]
        fn lists_come_out_as_they_went_in(sizes in proptest::collection::vec((0u32..9_000, 0u32..9_000), 0..5)) {
            let lists: Vec<ImageList> = sizes
                .iter()
                .map(|(chunks, order)| list(*chunks, *order.min(chunks)))
                .collect();
            let mut gathered = gathered(&lists);
            for piece in cut(&lists) {
                gathered.take(&piece).unwrap();
            }
            prop_assert!(gathered.is_complete());
            prop_assert_eq!(gathered.finish(), lists);
        }

        #[test]
        fn no_pieces_make_it_keep_more_than_was_said(chunks in 0u32..100, sizes in proptest::collection::vec(0usize..9_000, 0..9)) {
            let order = chunks / 2;
            let mut gathered = Gathered::new(vec![ListLengths { chunks, order }]).unwrap();
            for size in sizes {
                let _ = gathered.take(&ListPiece(vec![1; size].into()));
                prop_assert!(gathered.bytes.len() <= gathered.size);
            }
            prop_assert_eq!(gathered.finish().len(), 1);
        }
    }
}
